"""How a model is split among ranks that run the same layers: whole heads, columns of the MLP, rows of the head.

Each rank holds slices of the same tensors: rows of the projections that widen (queries, keys and values; gate and up;
the vocabulary head), columns of those that narrow again (out, down), whose results are partial sums (Megatron-LM,
Shoeybi et al. 2019, arXiv 1909.08053). Attention is split by key-value heads, evenly or not; where there are more ranks
than those, ranks share one and split its query heads. Pure numpy. Tensors are as in `models.artifact.names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.names import DRAFT, bits_and_block
from models.artifact.shape import LlamaShape
from models.errors import ArtifactError

Array = NDArray[Any]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Rank:
    """What one of `count` ranks runs: query heads, the key-value heads they read, MLP columns, rows of the head."""

    number: int
    count: int
    heads: range
    kv_heads: range
    mlp: range
    vocabulary: range

    def shape(self, whole: LlamaShape) -> LlamaShape:
        """The numbers of this rank's part of the layers."""
        return replace(whole, n_heads=len(self.heads), n_kv_heads=len(self.kv_heads), mlp_width=len(self.mlp))


def split(shape: LlamaShape, count: int, mlp_block: int = 1) -> list[Rank]:
    """Split a model among `count` ranks, as evenly as whole heads and blocks of `mlp_block` columns allow.

    Raises `ArtifactError` with the reason where some rank would have nothing to do.
    """
    if shape.n_experts:
        raise ArtifactError("a mixture of experts cannot be split among ranks; give whole layers to shards")
    if not 0 < count <= shape.n_heads:
        raise ArtifactError(f"{shape.n_heads} attention heads cannot be split among {count} ranks; use fewer")
    n_blocks = -(-shape.mlp_width // mlp_block)
    if n_blocks < count:
        raise ArtifactError(
            f"the MLP's {shape.mlp_width} columns share scales in blocks of {mlp_block}, which makes {n_blocks} parts, "
            f"fewer than {count} ranks; use fewer, or a quantisation with narrower blocks"
        )
    columns = [
        range(part.start * mlp_block, min(part.stop * mlp_block, shape.mlp_width)) for part in even(n_blocks, count)
    ]
    rows = even(shape.vocab_size, count)
    return [
        Rank(n, count, heads, kv_heads, columns[n], rows[n]) for n, (heads, kv_heads) in enumerate(_heads(shape, count))
    ]


def even(total: int, count: int) -> list[range]:
    """Cut 0 … total-1 into runs whose lengths differ by one at most."""
    edges = [total * n // count for n in range(count + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def _heads(shape: LlamaShape, count: int) -> list[tuple[range, range]]:
    """Query and key-value heads of each rank: whole groups, or a part of one group."""
    group = shape.n_heads // shape.n_kv_heads
    if count <= shape.n_kv_heads:
        return [(range(kv.start * group, kv.stop * group), kv) for kv in even(shape.n_kv_heads, count)]
    found = []
    for kv, ranks in enumerate(even(count, shape.n_kv_heads)):
        if len(ranks) > group:
            raise ArtifactError(
                f"{count} ranks are more than {shape.n_kv_heads} key-value heads of {group} query heads each can be "
                "shared among; use fewer"
            )
        parts = even(group, len(ranks))
        found += [(range(kv * group + p.start, kv * group + p.stop), range(kv, kv + 1)) for p in parts]
    return found


def part(tensors: Mapping[str, Array], rank: Rank, shape: LlamaShape) -> dict[str, Array]:
    """A rank's slices of tensors named as in `models.artifact.names`; norms stay whole.

    Raises `ArtifactError` where a cut would fall inside a block of weights that share a scale.
    """
    found: dict[str, Array] = {}
    for name, value in tensors.items():
        site, _, suffix = name.rpartition(".")
        kind = site.rpartition(".")[2]
        if suffix == "zero" or site == DRAFT:
            raise ArtifactError("int4-folded cannot be split among ranks; build with --quant int4 or fp32")
        if name.startswith("adapter."):
            found[name] = _of_adapter(value, kind, suffix, rank, shape)
        elif kind in {"out", "down"} and name.startswith("layers."):
            n_in, columns = _columns(kind, rank, shape)
            found[name] = _some_columns(tensors, site, suffix, n_in, columns, rank)
        elif kind in {"qkv", "gate_up", "head"}:
            rows = _rows(kind, rank, shape)
            found[name] = np.ascontiguousarray(value[:, rows] if suffix == "shift" else value[rows])
        else:
            found[name] = value
    return found


def _of_adapter(value: Array, kind: str, suffix: str, rank: Rank, shape: LlamaShape) -> Array:
    """A rank's part of one of an adapter's two matrices, `a` (r, K) and `b` (N, r).

    `b` is cut as the projection beside it is where that widens, `a` where it narrows; the other stays whole.
    """
    if kind in {"out", "down"}:
        _, columns = _columns(kind, rank, shape)
        return np.ascontiguousarray(value[:, columns.start : columns.stop]) if suffix == "a" else value
    return np.ascontiguousarray(value[_rows(kind, rank, shape)]) if suffix == "b" else value


def _rows(kind: str, rank: Rank, shape: LlamaShape) -> Index:
    """Which outputs of a projection that widens are the rank's."""
    if kind == "head":
        return np.arange(rank.vocabulary.start, rank.vocabulary.stop)
    if kind == "gate_up":
        return np.concatenate([np.arange(rank.mlp.start, rank.mlp.stop) + at for at in (0, shape.mlp_width)])
    wide, kv = shape.query_width, shape.n_kv_heads * shape.head_dim
    starts = ((0, rank.heads), (wide, rank.kv_heads), (wide + kv, rank.kv_heads))
    return np.concatenate([at + np.arange(h.start * shape.head_dim, h.stop * shape.head_dim) for at, h in starts])


def _columns(kind: str, rank: Rank, shape: LlamaShape) -> tuple[int, range]:
    """How many inputs a projection that narrows has, and which are the rank's."""
    if kind == "down":
        return shape.mlp_width, rank.mlp
    return shape.query_width, range(rank.heads.start * shape.head_dim, rank.heads.stop * shape.head_dim)


def _some_columns(tensors: Mapping[str, Array], site: str, suffix: str, n_in: int, columns: range, rank: Rank) -> Array:
    value = tensors[f"{site}.{suffix}"]
    if suffix == "bias":  # added once, to the whole sum
        return value if rank.number == 0 else np.zeros_like(value)
    if suffix == "w":
        return np.ascontiguousarray(value[:, columns.start : columns.stop])
    block = block_of(tensors, site, n_in)
    if columns.start % block or (columns.stop % block and columns.stop != n_in):
        raise ArtifactError(
            f"'{site}' shares scales in blocks of {block} inputs, and rank {rank.number} of {rank.count} would have "
            f"inputs {columns.start} to {columns.stop - 1}; use another number of ranks, or fp32 or int4"
        )
    blocks = slice(columns.start // block, -(-columns.stop // block))
    return np.ascontiguousarray(value[blocks] if suffix == "shift" else value[:, blocks])


def block_of(tensors: Mapping[str, Array], site: str, n_in: int) -> int:
    """Inputs of a projection that share a scale; 1 where there is none."""
    codes = tensors.get(f"{site}.q")
    return 1 if codes is None else bits_and_block(n_in, codes.shape)[1]
