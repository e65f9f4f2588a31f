"""The graph against a forward pass written independently, and against itself cut in every way it can be cut."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from models.artifact.names import FRAMES, PLAIN
from models.build.adapter import Adapter
from models.build.gguf_source import GgufSource
from models.build.graph import BEST
from models.build.pack import PackedModel, pack
from models.errors import ArtifactError, PromptTooLongError
from models.runtime.engine import CHUNK, Decoder, Embeddings
from models.runtime.layers import Layers
from models.runtime.ranks import part, split
from models.runtime.sessions import EngineOptions
from tests.tiny_models import NARROW_HEADS, SHAPE, NumpyLlama, quiet, random_head, write_adapter, write_gguf

IDS = [5, 77, 140, 9, 260, 33, 34, 35, 8, 8, 120, 61]
EXACT_ACTIVATIONS = 0


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf")


@pytest.fixture(scope="module")
def reference(gguf_path: Path) -> NumpyLlama:
    return NumpyLlama(gguf_path)


def decoder(packed: PackedModel, variant: str = PLAIN, context: int = SHAPE.context, **options: int) -> Decoder:
    embeddings = Embeddings(packed.embeddings(), random_head().inputs, packed.shape.width)
    return Decoder(
        packed.shape, packed.segments(variant), embeddings, EngineOptions(threads=1, context=context, **options)
    )


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))


@pytest.mark.parametrize(
    ("kind", "quant", "accuracy_level", "tolerance"),
    [
        (Kind.Q4_1, "fp32", EXACT_ACTIVATIONS, 1e-5),
        (Kind.Q4_1, "int4", EXACT_ACTIVATIONS, 1e-5),  # the file's own grid: nothing is lost
        (Kind.Q4_0, "int4", EXACT_ACTIVATIONS, 1e-5),
        (Kind.Q8_0, "int8", EXACT_ACTIVATIONS, 1e-5),
        (Kind.Q8_0, "int4", EXACT_ACTIVATIONS, 1e-5),  # 8 bits stay 8 bits: four would lose, and save little
        (Kind.Q4_1, "int4", 4, 0.03),  # activations lose 1/254 of a block's peak, each time
        (Kind.Q8_0, "int8", 4, 0.03),
        (Kind.Q4_1, "int8", EXACT_ACTIVATIONS, 0.032),  # requantised: 1/254 of a block's peak weight at most
    ],
)  # fmt: skip
def test_every_format_computes_what_the_file_says(
    tmp_path: Path, kind: Kind, quant: str, accuracy_level: int, tolerance: float
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", kind)
    packed = pack(GgufSource(path), quant, None, quiet, accuracy_level=accuracy_level)
    wanted = NumpyLlama(path)
    with decoder(packed).sequence() as sequence:
        assert relative_error(sequence.hidden(IDS), wanted.hidden(IDS)) < tolerance
    with decoder(packed).sequence() as sequence:
        assert relative_error(sequence.logits(IDS), wanted.logits(IDS)[-1]) < tolerance


@pytest.fixture(scope="module")
def folded(gguf_path: Path) -> PackedModel:
    return pack(GgufSource(gguf_path), "int4-folded", None, quiet, accuracy_level=EXACT_ACTIVATIONS)


def test_folded_offsets_compute_nearly_what_the_file_says(folded: PackedModel, reference: NumpyLlama) -> None:
    """What whole zero points leave over is rounded to 4 bits."""
    with decoder(folded).sequence() as sequence:
        assert relative_error(sequence.hidden(IDS), reference.hidden(IDS)) < 0.02


def test_a_draft_of_logits_is_made_good_where_it_counts(folded: PackedModel) -> None:
    """The best logits are the hidden state's products with the table's rows; all others come from four bits."""
    engine = decoder(folded)
    with engine.sequence() as sequence:
        logits = sequence.logits(IDS).copy()
    with engine.sequence() as sequence:
        exact = engine.embeddings.rows(range(SHAPE.vocab_size)) @ sequence.hidden(IDS)[-1]
    near = np.isclose(logits, exact, atol=1e-5)
    assert BEST <= near.sum() < SHAPE.vocab_size
    assert near[np.argsort(-exact)[: BEST // 2]].all()


def test_a_draft_of_logits_is_the_same_for_each_of_several_sequences(folded: PackedModel) -> None:
    engine = decoder(folded, sequences=2)
    with engine.sequence() as one, engine.sequence() as other:
        wanted = [one.logits(IDS).copy(), other.logits(IDS[::-1]).copy()]
        for sequence in (one, other):
            sequence.rewind(len(IDS) - 1)
        one.next_id, other.next_id = IDS[-1], IDS[0]
        engine.step([one, other])
        for sequence, logits in zip((one, other), wanted, strict=True):
            assert np.allclose(sequence._logits, logits, atol=2e-4)


def test_shards_and_ranks_refuse_a_draft_of_logits(folded: PackedModel) -> None:
    with pytest.raises(ArtifactError, match="--quant int4"):
        Layers(folded.shape, folded.segments(PLAIN), EngineOptions(threads=1))
    with pytest.raises(ArtifactError, match="--quant int4"):
        part(folded.tensors, split(folded.shape, 2)[0], folded.shape)


def test_narrow_heads_are_rotated_by_the_graph(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "narrow.gguf", shape=NARROW_HEADS)
    wanted = NumpyLlama(path, NARROW_HEADS).hidden(IDS)
    with decoder(pack(GgufSource(path), "fp32", None, quiet)).sequence() as sequence:
        assert (
            relative_error(np.concatenate([sequence.hidden(ids) for ids in (IDS[:7], IDS[7:8], IDS[8:])]), wanted)
            < 1e-5
        )


@pytest.mark.parametrize("quant", ["fp32", "int4"])
def test_token_by_token_equals_all_at_once(gguf_path: Path, quant: str) -> None:
    """fp32 and blocks of 32 are row-invariant kernels; attention may sum in another order."""
    engine = decoder(pack(GgufSource(gguf_path), quant, None, quiet))
    with engine.sequence() as sequence:
        whole = sequence.hidden(IDS)
        last = sequence.logits([7]).copy()
    with engine.sequence() as sequence:
        parts = [sequence.hidden(ids) for ids in (IDS[:5], IDS[5:6], IDS[6:9], IDS[9:])]
        assert np.allclose(np.concatenate(parts), whole, atol=2e-5)
        assert np.allclose(sequence.logits([7]), last, atol=2e-4)


def test_a_long_prompt_goes_through_in_pieces(gguf_path: Path) -> None:
    packed = pack(GgufSource(gguf_path), "fp32", None, quiet)
    long = PackedModel(**{**vars(packed), "shape": type(SHAPE)(**{**vars(SHAPE), "context": 2 * CHUNK})})
    ids = [3 + i % 200 for i in range(CHUNK + 40)]
    engine = decoder(long, context=2 * CHUNK)
    with engine.sequence() as sequence:
        hidden = sequence.hidden(ids)
    assert hidden.shape == (len(ids), SHAPE.width)
    with engine.sequence() as sequence:
        parts = [sequence.hidden(ids[at : at + 100]) for at in range(0, len(ids), 100)]
    assert np.allclose(np.concatenate(parts), hidden, atol=2e-5)


def test_a_lent_sequence_begins_empty(gguf_path: Path) -> None:
    engine = decoder(pack(GgufSource(gguf_path), "fp32", None, quiet), sequences=1)
    with engine.sequence() as sequence:
        first = sequence.hidden(IDS[:4])
        sequence.hidden([200, 201, 202])
    with engine.sequence() as sequence:
        assert sequence.room == SHAPE.context
        assert np.array_equal(sequence.hidden(IDS[:4]), first)


def test_a_full_context_is_refused_and_leaves_the_sequence_as_it_was(gguf_path: Path) -> None:
    engine = decoder(pack(GgufSource(gguf_path), "fp32", None, quiet), context=8)
    with engine.sequence() as sequence:
        sequence.hidden(IDS[:6])
        with pytest.raises(PromptTooLongError, match="8 tokens"):
            sequence.hidden([1, 2, 3])
        with pytest.raises(PromptTooLongError, match="no tokens"):
            sequence.hidden([])
        assert sequence.room == 2
        sequence.hidden([1, 2])


def test_sequences_side_by_side_do_not_mix(gguf_path: Path, reference: NumpyLlama) -> None:
    engine = decoder(pack(GgufSource(gguf_path), "fp32", None, quiet), sequences=2)
    prompts = [[3 + (7 * n + i) % 250 for i in range(20)] for n in range(6)]
    found: dict[int, np.ndarray] = {}

    def read(n: int) -> None:
        with engine.sequence() as sequence:
            found[n] = np.concatenate([sequence.hidden([token]) for token in prompts[n]])

    threads = [threading.Thread(target=read, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, prompt in enumerate(prompts):
        assert relative_error(found[n], reference.hidden(prompt)) < 1e-5


def test_an_adapter_beside_the_weights_equals_one_merged_into_them(tmp_path: Path, gguf_path: Path) -> None:
    source = GgufSource(gguf_path)
    adapter = Adapter.open(write_adapter(tmp_path / "adapter", source))
    beside = pack(source, "fp32", adapter, quiet)
    merged = pack(source, "fp32", adapter, quiet, merge=True)
    assert (beside.variants, merged.variants) == ((PLAIN, FRAMES), (PLAIN,))
    ids = [SHAPE.vocab_size, *IDS, SHAPE.vocab_size + 2]
    with decoder(beside, FRAMES).sequence() as a, decoder(merged).sequence() as b, decoder(beside).sequence() as base:
        adapted, plain = a.hidden(ids), base.hidden(ids)
        assert np.allclose(adapted, b.hidden(ids), atol=1e-4)
    assert relative_error(adapted, plain) > 0.1, "the adapter must matter"


def test_an_adapter_leaves_the_plain_graph_as_it_was(tmp_path: Path, gguf_path: Path) -> None:
    source = GgufSource(gguf_path)
    adapter = Adapter.open(write_adapter(tmp_path / "adapter", source))
    with (
        decoder(pack(source, "int4", adapter, quiet)).sequence() as with_adapter,
        decoder(pack(source, "int4", None, quiet)).sequence() as without,
    ):
        assert np.array_equal(with_adapter.logits(IDS), without.logits(IDS))


def test_segments_cut_at_exits_equal_the_whole(gguf_path: Path) -> None:
    source, head = GgufSource(gguf_path), random_head(exits=(1, 2))
    whole = decoder(pack(source, "fp32", None, quiet))
    cut = decoder(pack(source, "fp32", None, quiet, exits=head.exits, exit_norms=head.exit_norms))
    with whole.sequence() as a, cut.sequence() as b:
        assert np.allclose(a.hidden(IDS[:7]), b.hidden(IDS[:7]), atol=1e-5)
        descent = b.descent([IDS[7:]])
        descent.to(1)
        states = descent.to(SHAPE.n_layers)
        assert np.allclose(a.hidden(IDS[7:]), states, atol=1e-5)


def test_an_early_exit_reads_its_own_norm_and_ends_the_sequence(gguf_path: Path) -> None:
    source, head = GgufSource(gguf_path), random_head(exits=(1, 2))
    cut = decoder(pack(source, "fp32", None, quiet, exits=head.exits, exit_norms=head.exit_norms))
    with cut.sequence() as sequence:
        descent = sequence.descent([IDS])
        seen = [descent.to(passed)[-1] for passed in (1, 2)]
        with pytest.raises(PromptTooLongError):
            sequence.hidden([1])
    assert head.exit_norms is not None
    rms = np.sqrt(((seen[0] / head.exit_norms[0]) ** 2).mean())
    assert rms == pytest.approx(1, abs=1e-3)


def test_added_inputs_lie_behind_the_vocabulary() -> None:
    rng = np.random.default_rng(1)
    table, inputs = (rng.normal(size=(n, 4)).astype(np.float32) for n in (6, 2))
    rows = Embeddings({"w": table}, inputs, 4).rows([6, 0, 7, 5])
    assert np.array_equal(rows, np.stack([inputs[0], table[0], inputs[1], table[5]]))
