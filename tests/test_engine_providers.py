"""Execution providers: an ordered list that always ends at the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from models.build.gguf_source import GgufSource
from models.build.pack import pack
from models.runtime.engine import Decoder, Embeddings
from models.runtime.providers import PROVIDERS, usable
from models.runtime.sessions import EngineOptions
from models.runtime.slowed import SlowedSession, Throttle
from tests.tiny_models import quiet, write_gguf

HERE = ("OpenVINOExecutionProvider", "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["CPU"], ["CPUExecutionProvider"]),
        ([], ["CPUExecutionProvider"]),
        (["CUDA", "TensorRT"], ["CPUExecutionProvider"]),
        (["CUDA", "OpenVINO"], list(HERE)),
        (["CPU", "OpenVINO"], list(reversed(HERE))),
        (["OpenVINO", "OpenVINO", "CPU"], list(HERE)),
    ],
)
def test_absent_providers_are_passed_over(wanted: Sequence[str], found: Sequence[str]) -> None:
    assert usable(wanted, HERE) == found


def test_names_are_onnxruntimes() -> None:
    assert set(PROVIDERS.values()) <= {*ort.get_all_providers(), "ROCMExecutionProvider", "QNNExecutionProvider"}


def test_a_decoder_falls_back_to_the_cpu(tmp_path: Path) -> None:
    assert _decoder(tmp_path, "TensorRT", "CUDA").provider == "CPU"


def test_openvino_gives_what_the_cpu_gives(tmp_path: Path) -> None:
    """In an environment of its own: `pip install onnxruntime-openvino` in place of onnxruntime."""
    if PROVIDERS["OpenVINO"] not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no OpenVINO; it comes with the package onnxruntime-openvino")
    ids = [5, 77, 140, 9, 260, 33]
    found = {}
    for provider in ("CPU", "OpenVINO"):
        engine = _decoder(tmp_path, provider)
        assert engine.provider == provider
        with engine.sequence() as sequence:
            found[provider] = np.stack(
                [sequence.logits(ids[:4]).copy(), *(sequence.logits([i]).copy() for i in ids[4:])]
            )
    assert np.allclose(found["CPU"], found["OpenVINO"], atol=0.01 * np.abs(found["CPU"]).max())


def test_a_slowed_session_lasts_a_multiple_of_each_pass() -> None:
    class Session:
        def run_with_iobinding(self, binding: str) -> None:
            ticks.append(ticks[-1] + int(binding))

        def run_with_ort_values(self, names: str, feed: str) -> str:
            ticks.append(ticks[-1] + 10)
            return names + feed

        def get_providers(self) -> list[str]:
            return ["CPU"]

    ticks, slept = [0], []
    slowed = SlowedSession(Session(), 2.5, clock=lambda: ticks[-1], sleep=slept.append)
    slowed.run_with_iobinding("4")
    assert slowed.run_with_ort_values("a", "b") == "ab"
    assert slowed.get_providers() == ["CPU"]
    assert slept == [6.0, 15.0]


def test_what_a_sleep_lasts_too_long_comes_off_the_next_ones() -> None:
    class Session:
        def run_with_iobinding(self) -> None:
            now[0] += 1.0

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds + 0.75

    now, slept = [0.0], []
    slowed = SlowedSession(Session(), 2.0, clock=lambda: now[0], sleep=sleep)
    for _ in range(3):
        slowed.run_with_iobinding()
    assert slept == [1.0, 0.25, 0.25]
    assert now[0] == 3 * 2.0 + 0.75


def test_what_interrupts_a_pass_is_not_slept_off_too() -> None:
    class Session:
        def run_with_iobinding(self) -> None:
            wall[0] += 9.0
            worked[0] += 2.0

    wall, worked, slept = [0.0], [0.0], []
    slowed = SlowedSession(Session(), 3.0, clock=lambda: wall[0], sleep=slept.append, work=lambda: worked[0])
    slowed.run_with_iobinding()
    assert slept == [4.0]


def test_a_file_says_how_slow_a_session_is_and_may_change(tmp_path: Path) -> None:
    file = tmp_path / "slowdown"
    factor = Throttle(file, 2.0)
    assert factor() == 2.0
    for text, wanted in (("3.5", 3.5), ("", 3.5), ("many", 3.5), ("0.5", 1.0), ("12", 12.0)):
        draft = tmp_path / "draft"
        draft.write_text(text)
        draft.replace(file)
        assert factor() == wanted, text
    file.unlink()
    assert factor() == 12.0


def test_a_slowed_decoder_says_the_same(tmp_path: Path) -> None:
    found = []
    for slowdown in (1.0, 1.5):
        with _decoder(tmp_path, "CPU", slowdown=slowdown).sequence() as sequence:
            found.append(np.stack([sequence.logits([5, 77]).copy(), sequence.logits([9]).copy()]))
    assert np.array_equal(found[0], found[1])


def _decoder(folder: Path, *providers: str, slowdown: float = 1.0) -> Decoder:
    packed = pack(GgufSource(write_gguf(folder / "tiny.gguf")), "fp32", None, quiet)
    embeddings = Embeddings(packed.embeddings(), None, packed.shape.width)
    options = EngineOptions(threads=1, providers=providers, slowdown=slowdown)
    return Decoder(packed.shape, packed.segments("plain"), embeddings, options)
