"""GPTQ loses less than rounding where it counts, nothing on a grid, and what it makes runs like any other artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact.names import SITES, bits_and_block
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.build.gptq import LONGEST, Rounding, calibration_ids, gptq, weighted_errors
from models.build.pack import PackedModel, pack
from models.build.quantise import SCHEMES, dequantise, symmetric
from models.runtime.engine import Decoder, Embeddings
from models.runtime.local import LocalTier
from models.runtime.sessions import EngineOptions
from models.runtime.tier import Completion, Limits
from tests.tiny_models import SHAPE, NumpyLlama, quiet, write_gguf

IDS = [5, 77, 140, 9, 260, 33, 34, 35, 8, 8, 120, 61]


def gaussian(*dims: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=dims).astype(np.float32)


def correlated(n_in: int, seed: int = 0) -> np.ndarray:
    """Inputs (T, K) that share a few directions, as hidden states do."""
    return gaussian(4 * n_in, 8, seed=seed) @ gaussian(8, n_in, seed=seed + 1) + 0.3 * gaussian(4 * n_in, n_in, seed=2)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([4, 8]), st.sampled_from([32, 64]), st.sampled_from([64, 96, 200]))
def test_outputs_suffer_less_than_from_rounding(seed: int, bits: int, block: int, n_in: int) -> None:
    weights, inputs = gaussian(12, n_in, seed=seed), correlated(n_in, seed)
    moments = inputs.T @ inputs
    ours, rounded = (
        weighted_errors(dequantise(parts, n_in) - weights, moments).sum()
        for parts in (gptq(weights, moments, bits, block), symmetric(weights, bits, block))
    )
    assert ours < rounded


def test_what_lies_on_the_grid_stays() -> None:
    codes = np.random.default_rng(0).integers(-7, 8, (6, 128))
    codes[:, ::32] = -8  # the block's largest weight says the scale
    weights = (codes * np.repeat(gaussian(6, 2, seed=3), 64, axis=1)).astype(np.float32)
    inputs = correlated(128)
    assert np.allclose(dequantise(gptq(weights, inputs.T @ inputs, 4, 64), 128), weights, atol=1e-6)


def test_inputs_that_are_not_related_make_it_plain_rounding() -> None:
    weights = gaussian(6, 128)
    found = gptq(weights, np.eye(128, dtype=np.float32), 4, 64)
    scale = np.repeat(found["scale"], 64, axis=1)
    rounded = np.clip(np.rint(weights / scale), -8, 7) * scale
    assert np.allclose(dequantise(found, 128), rounded, atol=1e-6)


def test_inputs_that_never_come_do_no_harm() -> None:
    inputs = correlated(96)
    inputs[:, 10:40] = 0
    assert np.isfinite(dequantise(gptq(gaussian(4, 96), inputs.T @ inputs, 4, 64), 96)).all()
    unseen = gptq(gaussian(4, 96), np.zeros((96, 96), np.float32), 4, 64)
    assert np.square(dequantise(unseen, 96) - gaussian(4, 96)).mean() < 0.02


@given(st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers(17, 700))
def test_bits_and_block_are_told_by_the_dims(bits: int, block: int, n_in: int) -> None:
    weights = np.ones((1, n_in), np.float32)
    parts = symmetric(weights, bits, block)
    found = bits_and_block(n_in, parts["q"].shape)
    assert found == (bits, found[1])
    assert found[1] == block or found[1] < 2 * n_in <= 2 * block
    assert np.allclose(dequantise(parts, n_in), weights, rtol=0.01)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny-1M.Q4_1.gguf", Kind.Q4_1)


def decoder(packed: PackedModel) -> Decoder:
    embeddings = Embeddings(packed.embeddings(), None, packed.shape.width)
    return Decoder(packed.shape, packed.segments("plain"), embeddings, EngineOptions(threads=1, context=SHAPE.context))


def test_the_walk_meets_the_states_that_the_model_has(path: Path) -> None:
    """In 8 bits the rounded layers stay near the model, so that the streams must end near its own."""
    source = GgufSource(path)
    table, reference = source.tensor("token_embd.weight"), NumpyLlama(path)
    packed = pack(source, "fp32", None, quiet)
    rounding = Rounding(SHAPE, [table[IDS], table[IDS[::-1]]], dict.fromkeys(SITES, SCHEMES["int8"]["qkv"]))
    for layer in range(SHAPE.n_layers):
        weights = {site: packed.tensors[f"layers.{layer}.{site}.w"] for site in SITES}
        norms = {name: packed.tensors[f"layers.{layer}.{name}"] for name in ("attn_norm", "mlp_norm")}
        rounding.layer(weights, norms, {})
    found = rounding._normed(packed.tensors["final_norm"])
    for states, ids in zip(found, (IDS, IDS[::-1]), strict=True):
        wanted = reference.hidden(ids)
        assert np.sqrt(((states - wanted) ** 2).mean() / (wanted**2).mean()) < 0.03


@pytest.mark.parametrize(("quant", "most"), [("int8", 0.05), ("int4-folded", 0.2), ("int4-gptq", 1.1)])
def test_an_artifact_says_how_it_was_quantised_and_answers(path: Path, tmp_path: Path, quant: str, most: float) -> None:
    m = build(GgufSource(path), tmp_path / "out", quant, None, quiet).manifest
    assert m.quantisation == quant
    assert m.model_version.startswith(f"{quant}-")
    assert 0 < m.losses["token_mean_kl"] < most
    tier = LocalTier.open(tmp_path / "out", "edge", threads=1)
    assert len(list(tier.generate(Completion(" the"), Limits(max_tokens=8)))) > 0


def test_the_head_is_calibrated_and_the_embeddings_lie_apart(path: Path) -> None:
    packed = pack(GgufSource(path), "int4-gptq", None, quiet)
    bits = {
        group: bits_and_block(SHAPE.width, packed.tensors[f"{group}.q"].shape)[0] for group in ("head", "embeddings")
    }
    assert bits == {"head": 4, "embeddings": 8}


def test_calibrated_layers_have_no_offsets_and_beat_rounding(path: Path) -> None:
    source, reference = GgufSource(path), NumpyLlama(path)
    calibrated = pack(source, "int4-gptq", None, quiet, accuracy_level=0)
    assert not [name for name in calibrated.tensors if name.endswith(".shift")]
    plain = dict(calibrated.tensors)
    fp32 = pack(source, "fp32", None, quiet).tensors
    for layer in range(SHAPE.n_layers):
        for site in SITES:
            parts = symmetric(fp32[f"layers.{layer}.{site}.w"], 4, SCHEMES["int4-gptq"][site].block)
            plain |= {f"layers.{layer}.{site}.{key}": value for key, value in parts.items()}
    ids = calibration_ids(source)[0][: SHAPE.context]
    wanted, errors = reference.hidden(ids), []
    for tensors in (calibrated.tensors, plain):
        with decoder(PackedModel(**{**vars(calibrated), "tensors": tensors})).sequence() as sequence:
            errors.append(np.square(sequence.hidden(ids) - wanted).mean())
    assert errors[0] < errors[1]


def test_calibration_texts_are_cut_and_many(path: Path) -> None:
    texts = calibration_ids(GgufSource(path))
    assert max(map(len, texts)) == LONGEST
    assert sum(map(len, texts)) > 3000
