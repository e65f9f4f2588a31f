"""Ranks: what each holds, that together they are the model, and what cannot be split."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from models.artifact.names import layer_file
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.build.hub_source import HubSource
from models.build.quantise import dequantise, symmetric
from models.build.verify import golden_cases
from models.errors import AbandonedError, ArtifactError, PromptTooLongError
from models.runtime.decode import Vocabulary, decode
from models.runtime.engine import Decoder, Embeddings
from models.runtime.exchange import Threads
from models.runtime.ranked import ranks_of
from models.runtime.ranks import Rank, part, split
from models.runtime.sessions import EngineOptions, segments
from models.runtime.tensor import TensorDecoder, ThreadGroup
from models.runtime.tier import Limits
from tests.test_families import write_folder
from tests.tiny_models import NARROW_HEADS, SHAPE, NumpyLlama, quiet, random_tensors, write_gguf

DATA = Path(__file__).parents[2] / "shared" / "data"
OPTIONS = EngineOptions(threads=1, context=96)
IDS = [5, 9, 30, 2, 77, 14]
SMOLLM2 = replace(SHAPE, n_heads=9, n_kv_heads=3, head_dim=64, width=576, mlp_width=1536)


def decoder_of(artifact, count, options=OPTIONS):
    group = ThreadGroup.open(artifact.keeping(), count, options)
    embeddings = Embeddings(artifact.embeddings(), None, artifact.manifest.architecture.width)
    return TensorDecoder(group, embeddings, "plain")


def opened(artifact, count):
    decoder = decoder_of(artifact, count)
    try:
        with decoder.sequence() as sequence:
            yield sequence
    finally:
        decoder.group.close()


def logits_of(artifact, count, pieces=(IDS,)):
    """Logits after each piece."""
    (found,) = ([sequence.logits(ids).copy() for ids in pieces] for sequence in opened(artifact, count))
    return found


def whole(artifact, pieces=(IDS,)):
    """The same from the engine that is not split."""
    shape = artifact.manifest.architecture
    embeddings = Embeddings(artifact.embeddings(), None, shape.width)
    with Decoder(shape, segments(artifact, "plain"), embeddings, OPTIONS).sequence() as sequence:
        return [sequence.logits(ids).copy() for ids in pieces]


# ---- the split ----


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.integers(1, 40), st.sampled_from([1, 32, 64]))
def test_each_part_has_one_owner(count, n_kv_heads, group, n_blocks, block):
    shape = replace(SHAPE, n_kv_heads=n_kv_heads, n_heads=n_kv_heads * group, mlp_width=n_blocks * block - block // 3)
    try:
        ranks = split(shape, count, block)
    except ArtifactError as error:
        assert count > shape.n_heads or n_blocks < count, error  # noqa: PT017
        return
    for name, total in (("heads", shape.n_heads), ("mlp", shape.mlp_width), ("vocabulary", shape.vocab_size)):
        assert [i for rank in ranks for i in getattr(rank, name)] == list(range(total))
    for rank in ranks:
        assert {head // group for head in rank.heads} == set(rank.kv_heads)
        assert len(rank.heads) % len(rank.kv_heads) == 0
        assert rank.mlp.start % block == 0


@pytest.mark.parametrize(
    ("count", "heads", "kv_heads"),
    [(2, [3, 6], [1, 2]), (3, [3, 3, 3], [1, 1, 1]), (4, [3, 3, 1, 2], [1, 1, 1, 1]), (9, [1] * 9, [1] * 9)],
)
def test_smollm2_s_three_key_value_heads(count, heads, kv_heads):
    ranks = split(SMOLLM2, count, 32)
    assert [len(rank.heads) for rank in ranks] == heads
    assert [len(rank.kv_heads) for rank in ranks] == kv_heads
    assert max(len(rank.mlp) for rank in ranks) - min(len(rank.mlp) for rank in ranks) <= 32


@pytest.mark.parametrize(
    ("shape", "count", "block", "says"),
    [
        (SMOLLM2, 10, 32, "9 attention heads cannot be split among 10 ranks"),
        (SMOLLM2, 0, 32, "cannot be split among 0 ranks"),
        (SHAPE, 4, 32, "blocks of 32, which makes 3 parts, fewer than 4 ranks"),
        (replace(SHAPE, n_experts=2, n_experts_used=1), 2, 1, "a mixture of experts cannot be split"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(shape, count, block, says):
    with pytest.raises(ArtifactError, match=says):
        split(shape, count, block)


@given(st.sampled_from([(4, 32), (8, 64), (8, 32)]), st.integers(1, 3))
def test_slices_of_quantised_matrices_are_slices_of_the_matrices(kind, count):
    shape = replace(SHAPE, n_heads=12, n_kv_heads=6, head_dim=64, mlp_width=64 * 5 + 32)
    rng = np.random.default_rng(1)
    widths = {"qkv": (64, shape.qkv_width), "out": (shape.query_width, 64)}
    widths |= {"gate_up": (64, 2 * shape.mlp_width), "down": (shape.mlp_width, 64)}
    dense = {site: rng.normal(size=(n_out, n_in)).astype(np.float32) for site, (n_in, n_out) in widths.items()}
    packed = {site: symmetric(matrix, *kind) for site, matrix in dense.items()}
    dense = {site: dequantise(parts, widths[site][0]) for site, parts in packed.items()}
    tensors = {f"layers.0.{site}.{key}": v for site, parts in packed.items() for key, v in parts.items()}
    for rank in split(shape, count, kind[1]):
        found, lengths = part(tensors, rank, shape), {"out": 64 * len(rank.heads), "down": len(rank.mlp)}
        for site, matrix in dense.items():
            given_parts = {key: found[f"layers.0.{site}.{key}"] for key in ("q", "scale")}
            mine = dequantise(given_parts, lengths.get(site, 64))
            np.testing.assert_array_equal(mine, expected(site, matrix, rank, shape))


def expected(site, matrix, rank, shape):
    """A rank's part of a dense matrix, by heads and columns one by one."""
    if site == "out":
        return np.concatenate([matrix[:, 64 * h : 64 * h + 64] for h in rank.heads], axis=1)
    if site == "down":
        return matrix[:, list(rank.mlp)]
    if site == "gate_up":
        return np.concatenate([matrix[list(rank.mlp)], matrix[[shape.mlp_width + i for i in rank.mlp]]])
    q, k, v = np.split(matrix, [64 * shape.n_heads, 64 * (shape.n_heads + shape.n_kv_heads)])
    heads = [(q, rank.heads), (k, rank.kv_heads), (v, rank.kv_heads)]
    return np.concatenate([m[64 * h : 64 * h + 64] for m, some in heads for h in some])


def test_a_cut_inside_a_block_is_refused():
    tensors = {"layers.0.out.q": np.zeros((64, 2, 16), np.uint8), "layers.0.out.scale": np.ones((64, 2), np.float32)}
    rank = split(SHAPE, 3)[1]  # heads of 16: one of them is half a block
    with pytest.raises(ArtifactError, match="shares scales in blocks of 32 inputs, and rank 1 of 3 would have"):
        part(tensors, rank, SHAPE)


def test_a_bias_is_added_once():
    tensors = {"layers.0.down.bias": np.ones(64, np.float32)}
    parts = [part(tensors, rank, SHAPE)["layers.0.down.bias"] for rank in split(SHAPE, 2)]
    assert [p.sum() for p in parts] == [64, 0]


# ---- the ranks together ----


@pytest.fixture(scope="module", params=[SHAPE, NARROW_HEADS], ids=["heads of 16", "heads of 8"])
def dense(request, tmp_path_factory):
    """A random model in fp32, and plain numpy's opinion of it."""
    folder, shape = tmp_path_factory.mktemp("ranks"), request.param
    file = write_gguf(folder / "tiny.gguf", shape=shape, tensors=random_tensors(3, shape))
    return build(GgufSource(file), folder / "edge", "fp32", None, quiet), NumpyLlama(file, shape)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_ranks_compute_the_model(dense, count):
    artifact, reference = dense
    pieces = [IDS[:4], IDS[4:5], IDS[5:]]
    found = logits_of(artifact, count, pieces)
    wanted = reference.logits(IDS)[[3, 4, 5]]
    np.testing.assert_allclose(found, wanted, atol=2e-3)


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_ranks_compute_the_quantised_model(tmp_path, quant):
    """Two ranks differ from the whole as little as the whole does from its activations' rounding."""
    shape = replace(SHAPE, n_heads=4, n_kv_heads=2, head_dim=32, mlp_width=256)
    file = write_gguf(tmp_path / "tiny.gguf", Kind.Q4_1, seed=3, shape=shape)
    artifact = build(GgufSource(file), tmp_path / "edge", quant, None, quiet)
    (alone,) = whole(artifact)
    (one,), (two,) = logits_of(artifact, 1), logits_of(artifact, 2)
    spread = alone.std()
    assert np.abs(one - alone).max() < 0.05 * spread
    assert np.abs(two - alone).max() < 0.05 * spread


def family_artifact(folder, family):
    return build(HubSource(write_folder(folder / "model", family, seed=1)), folder / "edge", "fp32", None, quiet)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_ranks_know_the_families(tmp_path, family):
    """Biases, norms of heads, windows, stretched rotations."""
    artifact = build(
        HubSource(write_folder(tmp_path / "model", family, seed=1)), tmp_path / "edge", "fp32", None, quiet
    )
    np.testing.assert_allclose(logits_of(artifact, 2), whole(artifact), atol=2e-3)


@pytest.mark.parametrize(("family", "says"), [("gemma3_text", "normalises what attention"), ("mixtral", "mixture")])
def test_families_that_ranks_cannot_run_are_refused(tmp_path, family, says):
    artifact = build(
        HubSource(write_folder(tmp_path / "model", family, seed=1)), tmp_path / "edge", "fp32", None, quiet
    )
    with pytest.raises(ArtifactError, match=says):
        ThreadGroup.open(artifact, 2, OPTIONS)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_stories260k_tells_its_stories_by_ranks(tmp_path_factory, count, request):
    folder = DATA / "stories260k"
    if not folder.is_dir():
        pytest.skip("the model stories260k is absent")
    out = tmp_path_factory.getbasetemp() / "stories-by-ranks"
    artifact = build(HubSource(folder), out, "fp32", None, quiet).keeping()
    decoder = decoder_of(artifact, count, replace(OPTIONS, context=512))
    request.addfinalizer(decoder.group.close)
    vocabulary = Vocabulary(str, frozenset(artifact.manifest.eos_ids))
    for case in golden_cases(folder / "golden.json"):
        with decoder.sequence() as sequence:
            limits = Limits(max_tokens=len(case.greedy_ids))
            tokens = decode(sequence.logits, case.prompt_ids, vocabulary, limits, sequence.room - len(case.prompt_ids))
            assert tuple(token.id for token in tokens) == case.greedy_ids


def test_int8_stories_cannot_be_cut_inside_their_blocks(tmp_path):
    folder = DATA / "stories260k"
    if not folder.is_dir():
        pytest.skip("the model stories260k is absent")
    artifact = build(HubSource(folder), tmp_path / "out", "int8", None, quiet)
    with pytest.raises(ArtifactError, match="shares scales in blocks of 64"):
        ThreadGroup.open(artifact, 2, OPTIONS)


def test_a_sequence_can_be_reset_and_is_bounded(dense):
    artifact, _ = dense
    for sequence in opened(artifact, 2):
        first = sequence.logits(IDS).copy()
        assert (sequence.length, sequence.room) == (6, 90)
        sequence.reset()
        np.testing.assert_array_equal(sequence.logits(IDS), first)
        with pytest.raises(PromptTooLongError):
            sequence.logits([1] * 91)


def test_nobody_waits_for_the_answer(dense):
    decoder = decoder_of(dense[0], 2)
    with decoder.sequence(gone=lambda: True) as sequence, pytest.raises(AbandonedError):
        sequence.logits(IDS)
    decoder.group.close()


def test_a_rank_that_fails_leaves_no_other_waiting(dense, monkeypatch):
    decoder = decoder_of(dense[0], 3)
    good = decoder.group.ranks[1].run

    def fail(*args, **rest):
        raise MemoryError

    with decoder.sequence() as sequence:
        monkeypatch.setattr(decoder.group.ranks[1], "run", fail)
        with pytest.raises(MemoryError):
            sequence.logits(IDS)
        monkeypatch.setattr(decoder.group.ranks[1], "run", good)
        assert np.isfinite(sequence.logits(IDS)).all()
    decoder.group.close()


def test_a_rank_holds_its_share_only(dense):
    artifact, _ = dense
    shape = artifact.manifest.architecture
    tensors = artifact.tensors(layer_file(0))
    held = [
        sum(v.nbytes for name, v in part(tensors, rank, shape).items() if "norm" not in name)
        for rank in ranks_of(artifact, 2)
    ]
    assert sum(held) == sum(v.nbytes for name, v in tensors.items() if "norm" not in name)
    assert max(held) <= 0.6 * sum(held)


def test_all_ranks_get_bitwise_the_same_sum():
    meeting, found = Threads(3), {}
    parts = np.random.default_rng(1).normal(size=(3, 50, 7)).astype(np.float32)

    def work(n):
        end = meeting.end(n)
        found[n] = [(end.total(row.copy()), end.joined(row)) for row in parts[n]]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step in range(50):
        totals = [found[n][step][0] for n in range(3)]
        np.testing.assert_array_equal(totals[0], parts[0, step] + parts[1, step] + parts[2, step])
        assert all(np.array_equal(totals[0], other) for other in totals)
        np.testing.assert_array_equal(found[0][step][1], parts[:, step].ravel())


def test_a_rank_s_numbers():
    rank = Rank(0, 2, range(3), range(1), range(96), range(10))
    shape = rank.shape(SMOLLM2)
    assert (shape.n_heads, shape.n_kv_heads, shape.mlp_width, shape.head_dim) == (3, 1, 96, 64)
