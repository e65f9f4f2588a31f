"""Grids are kept to the last bit, other weights come close, and what cannot be read is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from models.build.gguf_source import GgufSource
from models.build.quantise import (
    SCHEMES,
    dequantise,
    fits,
    folded,
    grid_operands,
    operands,
    pack_nibbles,
    symmetric,
    unpack_nibbles,
)
from tests.tiny_models import write_gguf


def gaussian(n_out: int, n_in: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_out, n_in)).astype(np.float32)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_a_grid_is_kept_exactly(kind: Kind) -> None:
    blocks = gguf.quants.quantize(gaussian(10, 96), kind)
    order = np.random.default_rng(1).permutation(10)
    kept = dequantise(grid_operands(blocks, kind.name, order), 96)
    assert np.allclose(kept, gguf.quants.dequantize(blocks, kind)[order], atol=1e-6)


def test_fused_parts_of_unlike_grids_stay_exact(tmp_path: Path) -> None:
    source = GgufSource(write_gguf(tmp_path / "a.gguf", Kind.Q4_1))
    names = [f"blk.0.attn_{part}.weight" for part in "qkv"]
    found = operands(source, names, SCHEMES["int4"]["qkv"])
    assert set(found) == {"q", "scale", "shift"}
    assert np.allclose(dequantise(found, 64), np.concatenate([source.tensor(n) for n in names]), atol=1e-6)


@given(st.integers(0, 10_000))
def test_folded_offsets_stay_within_a_fraction_of_a_step(seed: int) -> None:
    """A whole zero point leaves at most half a step over, which is rounded with its row's others to 4 bits."""
    weights = gaussian(4, 96, seed)
    weights[1, :32] = 0.25  # a block without a step
    blocks = gguf.quants.quantize(weights, Kind.Q4_1)
    parts = grid_operands(blocks, "Q4_1")
    found = folded(parts)
    assert set(found) == {"q", "scale", "zero"}
    assert fits(found, 4, 96, SCHEMES["int4-folded"]["qkv"])
    left = np.maximum(0.5 * parts["scale"].max(-1), np.where(parts["scale"].min(-1) == 0, 0.25, 0))
    error = np.abs(dequantise(found, 96) - gguf.quants.dequantize(blocks, Kind.Q4_1)).max(-1)
    assert (error <= left / 7 + 1e-6).all()


def test_a_grid_without_offsets_is_not_changed_by_folding() -> None:
    parts = grid_operands(gguf.quants.quantize(gaussian(4, 96), Kind.Q4_0), "Q4_0")
    assert folded(parts).keys() == parts.keys()


def test_added_weights_leave_the_grid(tmp_path: Path) -> None:
    source = GgufSource(write_gguf(tmp_path / "a.gguf"))
    name = "blk.0.attn_output.weight"
    extra = gaussian(64, 64)
    found = operands(source, [name], SCHEMES["int8"]["out"], extra)
    assert set(found) == {"q", "scale"}
    assert np.allclose(dequantise(found, 64), source.tensor(name) + extra, atol=0.03)


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.095), (8, 0.006)])
def test_symmetric_rounding_of_gaussian_weights_is_small(bits: int, bound: float) -> None:
    weights = gaussian(64, 256)
    error = dequantise(symmetric(weights, bits), 256) - weights
    assert np.sqrt((error**2).mean()) < bound


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_blocks_and_odd_widths(bits: int) -> None:
    weights = gaussian(3, 44)
    weights[1] = 0
    back = dequantise(symmetric(weights, bits), 44)
    assert back.shape == (3, 44)
    assert not back[1].any()


@given(st.lists(st.integers(0, 15), min_size=32, max_size=32))
def test_nibbles_come_back(codes: list[int]) -> None:
    row = np.array([codes], np.uint8)
    assert np.array_equal(unpack_nibbles(pack_nibbles(row)), row)


@given(st.integers(0, 10_000))
def test_no_weight_moves_further_than_a_step(seed: int) -> None:
    """A whole step only at the far end, which has one code less than the near one."""
    weights = gaussian(2, 32, seed)
    step = np.abs(weights).max(-1, keepdims=True) / 128
    assert (np.abs(dequantise(symmetric(weights, 8), 32) - weights) <= 1.0001 * step).all()
