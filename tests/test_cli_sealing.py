"""Keys, sealing and verifying from the command line; the page about them runs as printed."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edgecascade
from bench.opening import Pair, compare
from functions.serving import keys as serving_keys
from models.artifact.names import MANIFEST, SIGNATURE
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from tests.tiny_models import quiet, write_adapter, write_gguf

PAGE = Path(__file__).parents[1] / "docs" / "sealing.md"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tier in var/edge."""
    monkeypatch.chdir(tmp_path)
    source = GgufSource(write_gguf(tmp_path / "tiny.gguf"))
    build(source, tmp_path / "var" / "edge", "int4", write_adapter(tmp_path / "adapter", source), quiet)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the door in this process; returns (status, stdout, stderr)."""
    monkeypatch.setattr(serving_keys, "forbid_core_dumps", lambda: None)

    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        capsys.readouterr()
        try:
            edgecascade.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        return status, *capsys.readouterr()

    return call


def printed_lines() -> list[str]:
    """What the page's first block tells to type, as far as it needs no download and no server."""
    lines = PAGE.read_text("utf-8").partition("```\n")[2].partition("```")[0].splitlines()
    return [line for line in lines if line.split()[1] in {"keys", "seal", "verify"}]


def test_the_page_runs_as_printed(place: Path, run: Run) -> None:
    said = [run(line) for line in printed_lines()]
    assert [status for status, _, _ in said] == [0, 0, 0], said
    assert said[0][1].split() == [".secrets/seal.key", ".secrets/sign.key", ".secrets/sign.pub"]
    assert "signed" in said[1][1]
    assert "seals right; signature right" in said[2][1]
    assert (place / "var" / "edge" / SIGNATURE).is_file()


@pytest.fixture
def sealed(place: Path, run: Run) -> Path:
    """A sealed and signed tier, by the page's own lines."""
    for line in printed_lines():
        assert run(line)[0] == 0
    return place / "var" / "edge"


FULL = "edgecascade verify var/edge --key-file .secrets/seal.key --public-key .secrets/sign.pub"


def test_verify_speaks_json(sealed: Path, run: Run) -> None:
    (sealed / "left.over").write_text("x")
    status, out, _ = run(f"{FULL} --json")
    said = json.loads(out)
    assert status == 0
    assert (said["ok"], said["decrypted"], said["signature_verified"]) == (True, True, True)
    assert said["sealed"]["provider"] == "local"
    assert set(said["files"].values()) == {None}
    assert said["unlisted"] == ["left.over"]


def test_verify_without_keys_checks_digests(sealed: Path, run: Run) -> None:
    status, out, _ = run("edgecascade verify var/edge")
    assert (status, "sealed, and no key to try; signature not asked for" in out) == (0, True)


def test_verify_names_the_files_that_are_wrong(sealed: Path, run: Run) -> None:
    for name in ("layer-001.safetensors", "tokenizer.json"):
        data = bytearray((sealed / name).read_bytes())
        data[-1] ^= 1
        (sealed / name).write_bytes(data)
    for line in (FULL, "edgecascade verify var/edge"):
        status, out, err = run(line)
        assert (status, out) == (1, "")
        assert "layer-001" in err
        assert "tokenizer" in err
    status, out, _ = run(f"{FULL} --json")
    said = json.loads(out)
    assert (status, said["ok"]) == (1, False)
    assert {name for name, fault in said["files"].items() if fault} == {"layer-001.safetensors", "tokenizer.json"}


def test_verify_checks_the_signature(sealed: Path, run: Run) -> None:
    text = (sealed / MANIFEST).read_text("utf-8")
    (sealed / MANIFEST).write_text(text.replace('"energy"', ' "energy"'), "utf-8")
    assert run("edgecascade verify var/edge --key-file .secrets/seal.key")[0] == 0
    status, _, err = run(FULL)
    assert (status, "signature" in err) == (1, True)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("edgecascade seal var/edge var/out", "--key-file"),
        ("edgecascade seal var/edge var/out --key-file nowhere", "MODEL_KEY_FILE names a file"),
        ("edgecascade seal var/edge var/out --key-file .secrets/sign.key", "edgecascade-sealing-key"),
        ("edgecascade seal var/edge var/out --key-file .secrets/seal.key", "sealed already"),
        ("edgecascade seal nowhere var/out --key-file .secrets/seal.key", "not an artifact"),
        ("edgecascade seal var/edge var/out --key-file .secrets/seal.key --kms-key-id x", "one place"),
        ("edgecascade verify var/edge --key-file .secrets/sign.pub", "edgecascade-sealing-key"),
        ("edgecascade keys .secrets", "not replaced"),
        ("edgecascade keys .secrets/seal.key/more", "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(sealed: Path, run: Run, line: str, word: str) -> None:
    status, out, err = run(line)
    assert (status, out) == (1, "")
    assert word in err
    assert len([said for said in err.splitlines() if said.startswith("edgecascade: ")]) == 1
    assert not (sealed.parent / "out").exists()


def test_bench_seal_prints_figures_and_leaves_nothing(place: Path, run: Run) -> None:
    status, out, _ = run("edgecascade bench seal var/edge --rounds 3 --threads 1 --json")
    assert status == 0
    figures = json.loads(out.splitlines()[-1])
    assert figures["rounds"] == 3
    assert set(figures) == {"rounds", "reading all weights", "opening the tier"}
    assert figures["opening the tier"]["sealed_s"] > 0
    assert [p.name for p in (place / "var").iterdir()] == ["edge"]


def test_a_comparison_takes_turns_and_leaves_out_the_first() -> None:
    seen: list[str] = []
    clock = [0.0]

    def work(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            seen.append(name)
            clock[0] += 100 * seconds if len(seen) <= 2 else seconds

        return run

    found = compare({"x": Pair(work("plain", 2.0), work("sealed", 3.0))}, 3, quiet, lambda: clock[0])
    assert seen == ["sealed", "plain", "plain", "sealed", "sealed", "plain", "plain", "sealed"]
    assert found["x"] == {"plain_s": 2.0, "sealed_s": 3.0, "plain_min_s": 2.0, "sealed_min_s": 3.0, "cost": 0.5}
