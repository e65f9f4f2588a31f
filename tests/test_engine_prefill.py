"""The second copy of the weights: what reads many tokens, with and without an adapter, whole and cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.artifact.names import FRAMES, PLAIN, graph_file, prefill_file
from models.artifact.store import Artifact
from models.build.adapter import Adapter
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.build.pack import PackedModel, pack
from models.build.quantise import by_columns
from models.runtime import sessions
from models.runtime.engine import Decoder, Embeddings
from models.runtime.layers import LONG
from models.runtime.local import LocalTier
from models.runtime.providers import int8_products_are_exact
from models.runtime.sessions import EngineOptions, load
from models.runtime.tier import Completion, Limits, SkillQuery
from tests.tiny_models import SHAPE, NumpyLlama, quiet, random_head, write_adapter, write_gguf

OPTIONS = EngineOptions(threads=1, context=SHAPE.context)
IDS = np.random.default_rng(3).integers(0, SHAPE.vocab_size, LONG + 6).tolist()

pytestmark = pytest.mark.skipif(not int8_products_are_exact(), reason="this processor saturates products of bytes")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf")


@pytest.fixture(scope="module")
def packed(path: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    adapter = Adapter.open(write_adapter(tmp_path_factory.mktemp("adapter") / "made", GgufSource(path)))
    return pack(GgufSource(path), "int4", adapter, quiet, prefill=True)


def embeddings(packed: PackedModel) -> Embeddings:
    return Embeddings(packed.embeddings(), random_head().inputs, packed.shape.width)


def many(packed: PackedModel, *, adapted: bool) -> Decoder:
    found = load(packed.segments(FRAMES, prefill=True), OPTIONS)
    parts = found if adapted else [part.without_adapter() for part in found]
    return Decoder(packed.shape, parts, embeddings(packed), OPTIONS)


def writer(packed: PackedModel) -> Decoder:
    long = [part.without_adapter() for part in load(packed.segments(FRAMES, prefill=True), OPTIONS, rests=True)]
    return Decoder(packed.shape, packed.segments(PLAIN), embeddings(packed), OPTIONS, long=long)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 70))
def test_a_column_loses_half_a_step_at_most(seed: int, n_out: int, n_in: int) -> None:
    weights = np.random.default_rng(seed).normal(size=(n_out, n_in)).astype(np.float32)
    found = by_columns(weights)
    assert found["i8"].shape == (n_in, n_out)
    assert found["i8"].dtype == np.int8
    assert np.all(np.abs(found["i8"].T * found["scale"][:, None] - weights) <= 0.501 * found["scale"][:, None])


def test_rows_of_zeros_are_kept() -> None:
    assert not by_columns(np.zeros((3, 8), np.float32))["i8"].any()


def test_states_are_near_the_exact_ones(path: Path, packed: PackedModel) -> None:
    with many(packed, adapted=False).sequence() as sequence:
        assert relative_error(sequence.hidden(IDS), NumpyLlama(path).hidden(IDS)) < 0.05


def test_the_adapter_goes_in_with_each_pass(packed: PackedModel) -> None:
    usual = Decoder(packed.shape, packed.segments(FRAMES), embeddings(packed), OPTIONS)
    with many(packed, adapted=True).sequence() as a, usual.sequence() as b, many(packed, adapted=False).sequence() as c:
        adapted, wanted, plain = a.hidden(IDS), b.hidden(IDS), c.hidden(IDS)
    assert relative_error(adapted, wanted) < 0.3 * relative_error(plain, wanted), "the adapter must matter"


@pytest.mark.parametrize("cuts", [[1], [5], [LONG], [1, 2, 3], [7, 8, 20]])
def test_no_token_depends_on_what_shares_its_pass(packed: PackedModel, cuts: list[int]) -> None:
    decoder = many(packed, adapted=True)
    with decoder.sequence() as sequence:
        whole = sequence.hidden(IDS).copy()
    ends = [*cuts, len(IDS)]
    with decoder.sequence() as sequence:
        pieces = [sequence.hidden(IDS[a:b]).copy() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert relative_error(np.concatenate(pieces), whole) < 1e-3  # attention sums in another order


@pytest.mark.parametrize("n_tokens", [1, 2, LONG - 1, LONG, LONG + 1, LONG + 5])
def test_a_writer_reads_prompts_of_any_length(path: Path, packed: PackedModel, n_tokens: int) -> None:
    wanted = NumpyLlama(path)
    with writer(packed).sequence() as sequence:
        assert relative_error(sequence.logits(IDS[:n_tokens]), wanted.logits(IDS[:n_tokens])[-1]) < 0.08
        assert sequence.length == n_tokens
        after = sequence.logits([IDS[n_tokens]])
        assert relative_error(after, wanted.logits(IDS[: n_tokens + 1])[-1]) < 0.08


def test_an_artifact_with_a_second_copy(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_adapter(tmp_path / "adapter", GgufSource(path))
    built = build(GgufSource(path), tmp_path / "out", "int4", adapter, quiet, prefill=True)
    assert built.has(prefill_file(0))
    assert built.has(graph_file(FRAMES, 0, prefill=True))
    assert not built.has(graph_file(PLAIN, 0, prefill=True)), "one graph serves chats and skills"
    part = Artifact.open(tmp_path / "out", layers=range(1, 2))
    assert prefill_file(1) in part.files
    assert prefill_file(0) not in part.files
    asked = SkillQuery(built.manifest.skills.skills[0].name, "one two three") if built.manifest.skills else None
    with_copy = LocalTier.open(tmp_path / "out", "edge", threads=1)
    monkeypatch.setattr(sessions, "int8_products_are_exact", lambda: False)
    without = LocalTier.open(tmp_path / "out", "edge", threads=1)
    for tier in (with_copy, without):
        text = "".join(token.text for token in tier.generate(Completion("a" * (LONG + 4)), Limits(max_tokens=4)))
        assert isinstance(text, str)
    if asked:
        ours, theirs = (tier.label_logits(asked)[0] for tier in (with_copy, without))
        assert relative_error(ours, theirs) < 0.1
        assert not np.array_equal(ours, theirs), "the second copy was not used"


def test_a_build_with_a_second_copy_is_another_build(path: Path, tmp_path: Path) -> None:
    once = build(GgufSource(path), tmp_path / "out", "int4", None, quiet)
    twice = build(GgufSource(path), tmp_path / "out", "int4", None, quiet, prefill=True)
    assert replace(once.manifest, files={}).made["key"] != replace(twice.manifest, files={}).made["key"]
    assert twice.has(graph_file(PLAIN, 0, prefill=True))


@pytest.mark.parametrize("n_draft", [1, LONG + 4])
def test_a_draft_is_verified_by_what_has_a_head(packed: PackedModel, n_draft: int) -> None:
    """However long it is; the prompt before it goes through the copy as it would alone."""
    draft = IDS[::-1][:n_draft]
    with writer(packed).sequence() as sequence:
        wanted = [sequence.logits(ids).copy() for ids in (IDS, *([i] for i in draft))]
    with writer(packed).sequence() as sequence:
        found = sequence.verify(IDS, draft)
    assert found.shape == (n_draft + 1, packed.shape.vocab_size)
    assert relative_error(found, np.array(wanted)) < 0.02


def test_exact_drafts_do_without_the_copy(packed: PackedModel) -> None:
    long = [part.without_adapter() for part in load(packed.segments(FRAMES, prefill=True), OPTIONS, rests=True)]
    options = replace(OPTIONS, exact_drafts=True)
    decoder = Decoder(packed.shape, packed.segments(PLAIN), embeddings(packed), options, long=long)
    assert not decoder.layers.has_long
    with decoder.sequence() as sequence:
        wanted = [sequence.logits(ids).copy() for ids in (IDS, IDS[:1], IDS[1:2])]
    with decoder.sequence() as sequence:
        assert np.array_equal(sequence.verify(IDS, IDS[:2]), wanted)
