"""Turn matrices into the operands that a graph multiplies by.

GGUF's own grids are kept exactly. A Q4_1 block says w = d·q + m; the kernel computes d·(q − 8)·x, and what is left,
(m + 8d)·Σx over the block, is one small product with `shift`. Q4_0 has m = −8d, so no shift; Q8_0 fits 8 bits. Other
tensors get the best symmetric scale of a few, block by block. Shapes: N outputs, K inputs, G = ⌈K / 32⌉ blocks.

Offsets can be folded into the product, which costs far less than `shift` and is nearly exact: a block gets the whole
zero point z nearest to −m/d, and what z leaves over, m + d·z, at most d/2, is a weight of the block's Σx. Those G sums
are G more inputs, whose weights are rounded like any others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.names import BLOCK, BYTE, INT8_MAX, NIBBLE, SITES, bits_and_block
from models.build.source import GridSource, TensorSource

Array = NDArray[Any]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

FLOAT = 32


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored: `bits` a code and `block` inputs a scale, or fp32 (32 bits).

    Either the file's own grid is kept where it has one (`keeps_grid`), its offsets folded in if it `folds`, or codes
    are symmetric, fitted to a text's inputs if `calibrated`, else to the weights alone. A head that `is_draft`
    has its best logits computed again from the table of embeddings.
    """

    bits: int
    block: int = BLOCK
    keeps_grid: bool = False
    folds: bool = False
    calibrated: bool = False
    is_draft: bool = False


TABLE, HEAD = "table", "head"
"""Stand for the table of embeddings, and for the head where it is not stored like it, beside the projections."""
_FLOATS, _FOUR, _EIGHT = Scheme(FLOAT), Scheme(NIBBLE, keeps_grid=True), Scheme(BYTE, 64, keeps_grid=True)
_FOLDED = Scheme(NIBBLE, keeps_grid=True, folds=True)
_TWO_STEPS = Scheme(NIBBLE, 64, calibrated=True, is_draft=True)
_CALIBRATED = Scheme(NIBBLE, 128, calibrated=True)
SCHEMES: Mapping[str, Mapping[str, Scheme]] = {
    "fp32": dict.fromkeys((*SITES, TABLE), _FLOATS),
    "int8": dict.fromkeys((*SITES, TABLE), _EIGHT),
    "int4": {**dict.fromkeys(SITES, _FOUR), TABLE: _EIGHT},
    "int4-folded": {**dict.fromkeys(SITES, _FOLDED), HEAD: _TWO_STEPS, TABLE: _EIGHT},
    "int4-gptq": {**dict.fromkeys((*SITES, HEAD), _CALIBRATED), TABLE: _EIGHT},
}
"""Quantisations by name. A head has 8 bits unless it is calibrated: four cost a small model too much.

`int4` keeps a 4-bit file's grid to the last bit. Blocks of 64 are the widest in which onnxruntime computes a row of 8
bits alike, whoever shares its pass. `int4-gptq` gives up the grid for speed, and stores embeddings apart from the head.
"""
GRIDS: Mapping[str, int] = {"Q4_0": NIBBLE, "Q4_1": NIBBLE, "Q8_0": BYTE}
"""Block formats that are kept as they are, and their bits."""
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Scales tried by `symmetric`, as shares of the one that just holds the largest weight."""

WEIGHTS_AT_ONCE = 2**19
"""How many weights `symmetric` looks at together."""


def operands(
    source: TensorSource, names: Sequence[str], scheme: Scheme, extra: Floats | None = None
) -> dict[str, Array]:
    """Return the operands of the named matrices, stacked: `w`, or `q`, `scale` and perhaps `shift`.

    `extra` (N, K) is added to the weights, which then leave the file's grid.
    """
    if scheme.keeps_grid and extra is None and isinstance(source, GridSource) and _on_grid(source, names, scheme):
        parts = [grid_operands(source.blocks(n), source.quantisation(n), source.row_order(n)) for n in names]
    else:
        parts = []
        for rows in _matrices(source, names, extra):
            parts.append({"w": rows} if scheme.bits == FLOAT else symmetric(rows, scheme.bits, scheme.block))
    if len(parts) == 1:
        return folded(parts[0]) if scheme.folds else parts[0]
    if "w" in parts[0]:
        return {"w": np.concatenate([part["w"] for part in parts])}
    joined: dict[str, Array] = {key: np.concatenate([p[key] for p in parts]) for key in ("q", "scale")}
    if any("shift" in part for part in parts):
        shifts = [part.get("shift", np.zeros_like(part["scale"].T)) for part in parts]
        joined["shift"] = np.concatenate(shifts, axis=1)
    return folded(joined) if scheme.folds else joined


def expert_operands(weights: Floats, scheme: Scheme) -> dict[str, Array]:
    """Operands of one expert's matrix (N, K) as the mixture's operator reads them: codes (N, K or K/2), no blocks."""
    if scheme.bits == FLOAT:
        return {"w": weights}
    found = symmetric(weights, scheme.bits)
    return {"q": found["q"].reshape(len(weights), -1), "scale": found["scale"]}


def stacked(source: TensorSource, names: Sequence[str], extra: Floats | None = None) -> Floats:
    """The named matrices in fp32, one below the other, with `extra` added."""
    weights = np.concatenate([source.tensor(name) for name in names])
    return weights if extra is None else weights + extra


def _matrices(source: TensorSource, names: Sequence[str], extra: Floats | None) -> Iterator[Floats]:
    """The named matrices, one at a time, each with its rows of `extra` added."""
    row = 0
    for name in names:
        values = source.tensor(name)
        yield values if extra is None else values + extra[row : row + len(values)]
        row += len(values)


def _on_grid(source: GridSource, names: Sequence[str], scheme: Scheme) -> bool:
    """Whether all matrices lie on grids of one width that is at most as wide as asked for, or exact anyway."""
    widths = {GRIDS.get(source.quantisation(name), 0) for name in names}
    return widths in ({scheme.bits}, {BYTE})


def grid_operands(blocks: Bytes, kind: str, row_order: NDArray[np.int64] | None = None) -> dict[str, Array]:
    """Repack GGUF blocks (N, bytes) of `kind` as `q`, `scale` and, for Q4_1, `shift` (G, N); exact."""
    rows = blocks if row_order is None else blocks[row_order]
    cut = rows.reshape(len(rows), -1, {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind])
    scale = _half(cut[..., :2])
    if kind == "Q8_0":
        return {"q": cut[..., 2:] ^ np.uint8(0x80), "scale": scale}
    codes = cut[..., -16:]
    packed: dict[str, Array] = {"q": pack_nibbles(np.concatenate([codes & 15, codes >> 4], axis=-1)), "scale": scale}
    if kind == "Q4_1":
        packed["shift"] = np.ascontiguousarray((_half(cut[..., 2:4]) + 8 * scale).T)
    return packed


def folded(parts: Mapping[str, Array]) -> dict[str, Array]:
    """Operands of 4-bit blocks whose `shift`, if there is one, has become zero points and weights of block sums."""
    if "shift" not in parts:
        return dict(parts)
    scale, shift = parts["scale"], parts["shift"].T
    nearest = np.rint(8 - shift / np.where(scale == 0, 1, scale))
    zero = np.clip(nearest, 0, 15).astype(np.uint8)
    left = symmetric(shift + (zero - np.float32(8)) * scale, NIBBLE)
    middle = np.full(left["scale"].shape, 8, np.uint8)
    zeros = np.concatenate([zero, middle], axis=1)
    return {
        "q": np.concatenate([parts["q"], left["q"]], axis=1),
        "scale": np.concatenate([scale, left["scale"]], axis=1),
        "zero": pack_nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))),
    }


def _half(two_bytes: Bytes) -> Floats:
    return np.ascontiguousarray(two_bytes).view(np.float16)[..., 0].astype(np.float32)


def pack_nibbles(codes: Bytes) -> Bytes:
    """Pack codes 0…15 (…, B) in pairs, the earlier one low, (…, B/2)."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def unpack_nibbles(packed: Bytes) -> Bytes:
    """Undo `pack_nibbles`."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def pack_codes(codes: Bytes, bits: int, block: int) -> Bytes:
    """Pack codes (N, K) in blocks, (N, G, block * bits/8); the last block is filled up with codes that stand for 0."""
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % block)), constant_values=2 ** (bits - 1))
    blocks = padded.reshape(len(codes), -1, block)
    return blocks if bits == BYTE else pack_nibbles(blocks)


def symmetric(weights: Floats, bits: int, block: int = BLOCK) -> dict[str, Array]:
    """Quantise (N, K) to `bits` per `block` inputs, choosing each block's scale by its squared error; K is padded.

    Works through a few rows at a time, so that it needs little more memory than its result.
    """
    n_rows, n_in = weights.shape
    block = block_for(n_in, block)
    n_blocks = -(-n_in // block)
    q = np.empty((n_rows, n_blocks, block * bits // BYTE), np.uint8)
    scale = np.empty((n_rows, n_blocks), np.float32)
    step = max(1, WEIGHTS_AT_ONCE // n_in)
    for at in range(0, n_rows, step):
        rows = slice(at, at + step)
        q[rows], scale[rows] = _symmetric(weights[rows], bits, block)
    return {"q": q, "scale": scale}


def _symmetric(weights: Floats, bits: int, block: int) -> tuple[Bytes, Floats]:
    n_rows, n_in = weights.shape
    padded = np.pad(weights, ((0, 0), (0, -n_in % block))).reshape(n_rows, -1, block)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    peak = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)
    best_scale = peak / low
    best_codes, best_error = _round(padded, best_scale, low, high)
    for share in SHRINK[1:] if bits == NIBBLE else ():
        codes, error = _round(padded, share * peak / low, low, high)
        better = error < best_error
        best_scale = np.where(better, share * peak / low, best_scale)
        best_codes, best_error = np.where(better, codes, best_codes), np.minimum(error, best_error)
    codes = (best_codes - low).astype(np.uint8).reshape(n_rows, -1)
    return pack_codes(codes, bits, block), best_scale[..., 0]


def _round(blocks: Floats, scale: Floats, low: int, high: int) -> tuple[Floats, Floats]:
    codes = np.clip(np.rint(blocks / np.where(scale == 0, 1, scale)), low, high)
    return codes, np.square(codes * scale - blocks).sum(-1, keepdims=True)


def by_columns(weights: Floats) -> dict[str, Array]:
    """Round (N, K) to int8 with one scale an output: `i8` (K, N) and `scale` (N,); for products of many rows."""
    scale = np.abs(weights).max(-1) / INT8_MAX
    codes = np.rint(weights / np.where(scale == 0, 1, scale)[:, None]).astype(np.int8)
    return {"i8": np.ascontiguousarray(codes.T), "scale": scale.astype(np.float32)}


def dequantise(parts: Mapping[str, Array], n_in: int) -> Floats:
    """Return the fp32 matrix (N, K) that the operands stand for."""
    if "w" in parts:
        return np.asarray(parts["w"], np.float32)
    if "zero" in parts:
        return _unfolded(parts, n_in)
    bits, _ = bits_and_block(n_in, parts["q"].shape)
    codes = parts["q"].astype(np.int16) - 128 if bits == BYTE else unpack_nibbles(parts["q"]).astype(np.int16) - 8
    weights = codes * parts["scale"][..., None]
    if "shift" in parts:
        weights = weights + parts["shift"].T[..., None]
    return np.asarray(weights.reshape(len(weights), -1)[:, :n_in], np.float32)


def _unfolded(parts: Mapping[str, Array], n_in: int) -> Floats:
    scale, n_blocks = parts["scale"], -(-n_in // BLOCK)
    zero = unpack_nibbles(parts["zero"])[:, : scale.shape[1]]
    values = (unpack_nibbles(parts["q"]).astype(np.float32) - zero[..., None]) * scale[..., None]
    of_sums = values[:, n_blocks:].reshape(len(values), -1)[:, :n_blocks]
    weights = values[:, :n_blocks] + of_sums[..., None]
    return np.asarray(weights.reshape(len(weights), -1)[:, :n_in], np.float32)


def block_for(n_in: int, block: int) -> int:
    """The block, halved until it is less than twice as wide as the inputs: see `bits_and_block`."""
    while block >= 2 * n_in and block > BLOCK:
        block //= 2
    return block


def fits(parts: Mapping[str, Array], n_out: int, n_in: int, scheme: Scheme) -> bool:
    """Whether operands made by the scheme stand for a matrix (N, K)."""
    if "w" in parts:
        return bool(parts["w"].shape == (n_out, n_in))
    if "zero" in parts:
        n_blocks = -(-n_in // BLOCK)
        return bool(parts["q"].shape[:2] == (n_out, n_blocks + -(-n_blocks // BLOCK)))
    blocks = {block_for(n_in, scheme.block), *([BLOCK] if scheme.keeps_grid else [])}
    return parts["q"].shape[:2] in {(n_out, -(-n_in // block)) for block in blocks}
