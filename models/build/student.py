"""The device tier's torch model: a small Llama, trained whole, with early exits read through one shared label head."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.artifact.shape import LlamaShape
from models.build.torch_llama import Layer, position_tables, site_shapes

STUDENT_SHAPE = LlamaShape(
    n_layers=6,
    width=256,
    n_heads=4,
    n_kv_heads=4,
    head_dim=64,
    mlp_width=448,
    vocab_size=0,
    context=512,
    rope_theta=10000.0,
    norm_eps=1e-5,
)
"""Without a vocabulary: `vocab_size` is set from the tokenizer cut for it."""


class Student(nn.Module):
    """Decoder read after each layer in `exits` and after the last; `exit_norms` (n_exits, C), `labels` (n_rows, C)."""

    def __init__(
        self, shape: LlamaShape, exits: tuple[int, ...], n_inputs: int, n_rows: int, embedding: NDArray[np.float32]
    ) -> None:
        super().__init__()
        self.shape, self.exits = replace(shape, vocab_size=len(embedding)), exits
        width = shape.width
        self.embedding = nn.Parameter(torch.from_numpy(embedding))
        self.inputs = nn.Parameter(0.5 * torch.randn(n_inputs, width))
        self.labels = nn.Parameter(torch.randn(n_rows, width) / math.sqrt(width))
        self.final_norm = nn.Parameter(torch.ones(width))
        self.exit_norms = nn.Parameter(torch.ones(len(exits), width))
        self.layers = nn.ModuleList(
            Layer(self.shape, _fresh(self.shape), 0, frozen=False) for _ in range(shape.n_layers)
        )

    def forward(self, ids: Tensor, dropout: float = 0.0) -> list[Tensor]:
        """(B, T) → normalised hidden states (B, T, C) in fp32 after each exit and the last layer."""
        table = torch.cat([self.embedding, self.inputs])
        x = F.embedding(ids, table).to(torch.bfloat16 if self.training else torch.float32)
        if dropout:  # one mask for all positions of a row: cheap, and it cannot be undone by copying from a neighbour
            keep = torch.bernoulli(torch.full((len(x), 1, x.shape[2]), 1 - dropout)) / (1 - dropout)
            x = x * keep.to(x.dtype)
        rotary, mask = position_tables(ids.shape[1], self.shape, x.dtype)
        outputs = []
        for index, layer in enumerate(self.layers, 1):
            x = layer(x, rotary, mask)
            if index in self.exits:
                outputs.append(self._norm(x, self.exit_norms[self.exits.index(index)]))
        return [*outputs, self._norm(x, self.final_norm)]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (self.shape.width,), weight, self.shape.norm_eps)


def _fresh(shape: LlamaShape) -> dict[str, Tensor]:
    """Scaled normal initialisation; outputs start small so that a deep stack starts near the identity."""
    made = {"attn_norm": torch.ones(shape.width), "mlp_norm": torch.ones(shape.width)}
    for name, (n_in, outs) in site_shapes(shape).items():
        scale = 0.3 if name in {"out", "down"} else 1.0
        made[name] = scale * torch.randn(sum(outs), n_in) / math.sqrt(n_in)
    return made


def projected_embedding(table: NDArray[np.float32], ids: list[int], width: int) -> NDArray[np.float32]:
    """Take over a teacher's embeddings of `ids`, projected on their `width` principal axes, at unit variance."""
    rows = table[ids].astype(np.float64)
    rows -= rows.mean(0)
    _, _, axes = np.linalg.svd(rows, full_matrices=False)
    small = rows @ axes[:width].T
    return np.ascontiguousarray(small / small.std(), dtype=np.float32)
