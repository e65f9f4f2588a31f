"""`bench engine`: the figures as values, the files it writes, and a whole run on a toy model."""

import json
import math
import os
import signal
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bench import engine, figures, gguf_files, memory, peers, plot, tables, worker
from bench.errors import BenchError, ContenderError
from bench.figures import LONG, SHORT, Measured, Row
from tests.tiny_models import NumpyLlama, write_gguf

TOY = gguf_files.Shape(2, 64, 4, 2, 96, 320, 10_000.0)
KEYS = [
    "decode_ratio_same_file", "kl_same_file", "decode_ratio_llama_cpp", "prefill512_ratio_llama_cpp",
    "decode_ratio_genai", "bandwidth_share", "memory_ratio_llama_cpp", "kl_ours", "kl_llama_cpp",
]  # fmt: skip


def measured(peer: str, setting: str, decode: float, kl: float | None, **more: object) -> Measured:
    """A row that decodes `decode` tokens a second after 128 and reads prompts ten times as fast."""
    found = Measured(peer, setting, "", weight_bytes=100_000_000, peak_bytes=200_000_000, kl=kl, kl_pieces=kl)
    found.decode_s = {SHORT: [1 / decode], LONG: [2 / decode]}
    found.prefill_s = {length: [length / (10 * decode)] for length in (128, 512, LONG)}
    for name, value in more.items():
        setattr(found, name, value)
    return found


def rows(*found: Measured, ceiling: float | None = 20.0) -> list[Row]:
    return [figures.row(one, ceiling) for one in found]


def test_a_row_is_made_of_medians() -> None:
    found = Measured("ours", "int4", "", weight_bytes=80_000_000)
    for seconds in (0.5, 0.01, 0.02):
        found.add_speed({"prefill_s": {"128": 64 * seconds, "512": seconds}, "decode_s": {"128": seconds}})
    found.cold_s, found.together_ratios = [3.0, 1.0, 2.0], [2.5, 1.5]
    r = figures.row(found, 16.0)
    assert (r.decode_short, r.prefill_128, r.prefill_512) == (50.0, 100.0, 512 / 0.02)
    assert (r.cold_s, r.together_ratio, r.decode_long, r.warm_s, r.kl) == (2.0, 2.0, None, None, None)
    assert r.bandwidth_share == pytest.approx(50 * 0.08 / 16)


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1), st.integers(1, 4096))
def test_a_rate_times_the_median_is_the_tokens(seconds: list[float], tokens: int) -> None:
    found = figures.rate(tokens, seconds)
    assert found is not None
    assert found * figures.middle(seconds) == pytest.approx(tokens)


def test_the_headlines_compare_within_a_class() -> None:
    found = rows(
        measured("ours", "int4", 150, 0.03),
        measured("ours", "Q4_0", 200, 0.30),
        measured("ours", "reckless", 400, 0.90),
        measured("llama.cpp", "file", 100, 0.02),
        measured("llama.cpp", "Q4_0", 125, 0.31, peak_bytes=160_000_000),
        measured("genai", "int4", 80, 0.45),
    )
    line = figures.headlines(found)
    assert list(line) == KEYS
    assert line == {
        "decode_ratio_same_file": pytest.approx(1.5),
        "kl_same_file": 0.03,
        "decode_ratio_llama_cpp": pytest.approx(1.6),
        "prefill512_ratio_llama_cpp": pytest.approx(1.6),
        "decode_ratio_genai": pytest.approx(2.5),
        "bandwidth_share": pytest.approx(1.0),
        "memory_ratio_llama_cpp": 1.25,
        "kl_ours": 0.30,
        "kl_llama_cpp": 0.31,
    }
    more = figures.beside(found)
    assert (more["row_same_file"], more["row_ours"], more["row_genai"]) == ("ours int4", "ours Q4_0", "genai int4")
    assert not set(more) & set(line)


@pytest.mark.parametrize("worse", [{"kl": 0.5}, {"kl_pieces": 0.5}])
def test_no_row_is_fast_by_being_worse(worse: dict[str, float]) -> None:
    """Neither token by token nor over many tokens."""
    ours, theirs = measured("ours", "fast", 300, 0.1), measured("llama.cpp", "Q4_0", 100, 0.3)
    vars(ours).update(worse)
    found = rows(ours, theirs)
    line = figures.headlines(found)
    assert line["decode_ratio_llama_cpp"] is None
    assert line["kl_ours"] is None
    assert line["kl_llama_cpp"] == 0.3


def test_a_file_that_is_q4_0_itself_stands_for_both_classes() -> None:
    found = rows(measured("ours", "int4", 150, 0.1), measured("llama.cpp", "Q4_0", 100, 0.1))
    line = figures.headlines(found)
    assert line["decode_ratio_same_file"] == line["decode_ratio_llama_cpp"] == pytest.approx(1.5)


@pytest.mark.parametrize(("kl", "counts"), [(0.3009, True), (0.302, False)])
def test_only_a_rounding_more_is_still_q4_0_s_quality(kl: float, counts: bool) -> None:
    found = rows(measured("ours", "Q4_0", 150, kl), measured("llama.cpp", "Q4_0", 100, 0.3))
    assert (figures.headlines(found)["decode_ratio_llama_cpp"] is not None) is counts


@pytest.mark.parametrize("found", [[], rows(Measured("genai", "", "", "not installed"))])
def test_without_rows_every_figure_is_null(found: list[Row]) -> None:
    line = figures.headlines(found)
    assert list(line) == KEYS
    assert set(line.values()) == {None}


def test_the_tables_name_everybody() -> None:
    found = rows(measured("ours", "int4", 150, 0.03), Measured("genai", "", "", "not installed: there is no module x"))
    console = Console(width=120, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(tables.engine_table(found, "toy"), tables.engine_quality(found, "loss"))
    text = console.export_text()
    assert "ours int4" in text
    assert "150.0" in text
    assert "0.0300" in text
    assert tables.engine_notes(found) == ["genai: not installed: there is no module x"]


def test_the_plot_is_written_twice(tmp_path: Path) -> None:
    found = rows(measured("ours", "int4", 150, 0.03), measured("llama.cpp", "file", 90, None))
    png, svg = plot.engine(found, "toy", tmp_path / "engine.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()


# ---- one position against the reference ----


@settings(deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=20), st.floats(-5, 5))
def test_divergence_is_none_between_equals_and_never_negative(logits: list[float], shift: float) -> None:
    same = worker.Compared.of(np.array(logits), np.array(logits) + shift, [0])
    assert same.kl == pytest.approx(0, abs=1e-9)
    assert same.same
    other = worker.Compared.of(np.array(logits), np.array(logits[::-1]), [])
    assert other.kl >= -1e-9
    assert other.nll is None


def test_divergence_in_nats_by_hand() -> None:
    found = worker.Compared.of(np.log([0.5, 0.5]), np.log([0.75, 0.25]), [1])
    assert found.kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert found.nll == pytest.approx(-math.log(0.25))


# ---- memory ----


def test_a_file_leaves_the_page_cache_and_comes_back(tmp_path: Path) -> None:
    """Some file systems keep what they are asked to forget, so only the way back is certain."""
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(3 << 20))
    (tmp_path / "empty").touch()
    files = memory.files_under(tmp_path)
    memory.drop_from_cache(files)
    assert 0 <= memory.cached_share(files) <= 1
    memory.bring_into_cache(files)
    assert memory.cached_share(files) == 1
    assert memory.files_under(path) == [path]


def test_memory_is_read_at_some_rate() -> None:
    assert memory.ReadTest(2, 4 << 20, huge_pages=True).gb_per_s() > 0
    assert memory.peak_bytes() > 4 << 20


# ---- files ----


def test_requantising_keeps_all_but_the_matrices(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    gguf_files.requantise(source, tmp_path / "q4_0.gguf")
    before, after = gguf.GGUFReader(str(source)), gguf.GGUFReader(str(tmp_path / "q4_0.gguf"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in after.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            assert after.fields[name].contents() == field.contents()
    ids = [3, 4, 5, 6]
    a, b = (NumpyLlama(path).logits(ids) for path in (source, tmp_path / "q4_0.gguf"))
    assert 0 < np.abs(a - b).max() < 0.5 * np.abs(a).max()


def test_random_weights_keep_activations_in_bounds(tmp_path: Path) -> None:
    gguf_files.write_random(tmp_path / "a.gguf", TOY)
    gguf_files.write_random(tmp_path / "b.gguf", TOY)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    for tensor in gguf.GGUFReader(str(tmp_path / "a.gguf")).tensors:
        if tensor.tensor_type.name != "F32":
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert values.std() == pytest.approx(values.shape[-1] ** -0.5, rel=0.15)


# ---- a run ----


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> peers.Model:
    home = tmp_path_factory.mktemp("bench")
    gguf_files.write_random(home / "toy.gguf", TOY)
    return engine.at_random(home / "toy.gguf", home)


def quiet(_done: int, _total: int, _text: str) -> None:
    """Take no notice of progress."""


def test_a_whole_run_on_a_toy_model(toy: peers.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "READ_BYTES", 4 << 20)
    monkeypatch.setitem(peers.NEEDS, "genai", ("no_such_module",))
    monkeypatch.setitem(peers.NEEDS, "transformers", ("no_such_module",))
    plan = engine.Plan(threads=1).quick()
    run = engine.measure(toy, ["ours", "genai"], plan, quiet)
    by_name = {r.name: r for r in run.rows}
    assert list(by_name) == ["ours int4", "ours int4+prefill", "ours int8", "genai"]
    assert "no_such_module" in by_name["genai"].skipped
    for name in ("ours int4", "ours int8"):
        r = by_name[name]
        assert not r.skipped
        assert r.kl is not None
        assert 0 <= r.kl < 0.05
        assert r.kl_pieces is not None
        assert r.kl_pieces < 0.05
        assert r.top1 is not None
        assert r.top1 > 0.9
        assert min(r.decode_short, r.decode_long, r.prefill_128, r.prefill_512, r.cold_s, r.warm_s) > 0  # type: ignore[type-var]
        assert r.peak_bytes is not None
        assert r.together_ratio is not None
    assert run.reference == "ours fp32"
    written: list[str] = []
    engine.finish(run, None, "toy", Console(), written.append)
    line = json.loads(written[-1])
    assert list(line)[: len(KEYS)] == KEYS
    assert line["kl_ours"] is not None
    assert line["decode_ratio_llama_cpp"] is None
    assert set(line["rows"]) == set(by_name)


def test_who_fails_is_out_with_the_reason(toy: peers.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    race = engine.Race(toy, engine.Plan(), quiet)
    race.enter(["ours"])
    worked: list[str] = []

    def fail_for_all_but_int8(entrant: peers.Entrant) -> None:
        if entrant.setting != "int8":
            raise ContenderError("it fell over")
        worked.append(entrant.name)

    race._everyone("trying", fail_for_all_but_int8)
    race._everyone("trying", fail_for_all_but_int8)
    assert race.found["ours int4"].skipped == "it fell over"
    assert worked == ["ours int8", "ours int8"]


def test_a_worker_that_dies_is_told_in_one_sentence(toy: peers.Model, tmp_path: Path) -> None:
    entrant = peers.Entrant("ours", "int4", tmp_path / "nothing", "")
    log = tmp_path / "log"
    with worker.Worker(entrant, 1, 64, log) as opened, pytest.raises(ContenderError, match="ours int4 ended") as caught:
        opened.ask("load", first=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ContenderError, match="could not be prepared"):
        worker.prepare(peers.Model("x", tmp_path / "x.gguf", tmp_path / "y.gguf", tmp_path, trained=True), entrant, log)


def test_a_worker_that_is_not_asked_stands_still(toy: peers.Model, tmp_path: Path) -> None:
    entrant = peers.peer("ours").entrants(toy)[0]
    with worker.Worker(entrant, 1, 64, tmp_path / "log") as opened:
        opened.ask("memory")
        _, status = os.waitpid(opened._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGSTOP


def test_unknown_words_are_refused() -> None:
    with pytest.raises(BenchError, match="'llamafile'"):
        peers.chosen("ours,llamafile")
    with pytest.raises(BenchError, match="'7b'"):
        engine.model("7b", Path, Path())
    assert peers.chosen("") == list(peers.MODULES)
    assert peers.chosen(" ours , genai") == ["ours", "genai"]


def test_the_prose_is_the_project_s_own_and_long_enough() -> None:
    assert len(engine.PROSE.read_text("utf-8").split()) > 1100
