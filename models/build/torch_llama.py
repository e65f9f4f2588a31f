"""A Llama decoder in torch, for training only: frozen and adapted by LoRA (the edge tier) or free (the device tier).

Shapes in comments: B rows, T tokens, C width, H heads, G key-value heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact.shape import LlamaShape

SITES = ("qkv", "out", "gate_up", "down")


def site_shapes(shape: LlamaShape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Input width and the widths of the fused outputs of each projection site."""
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    return {
        "qkv": (shape.width, (q, kv, kv)),
        "out": (q, (shape.width,)),
        "gate_up": (shape.width, (shape.mlp_width, shape.mlp_width)),
        "down": (shape.mlp_width, (shape.width,)),
    }


class Lora(nn.Module):
    """Low-rank update of one fused site (Hu et al. 2021, arXiv 2106.09685): each part has its own A and B."""

    def __init__(self, n_in: int, outs: tuple[int, ...], rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank * len(outs), n_in) / math.sqrt(n_in))
        self.b = nn.ParameterList([nn.Parameter(torch.zeros(n, rank)) for n in outs])

    def forward(self, x: Tensor) -> Tensor:
        """(…, n_in) → (…, sum of outs)."""
        hidden = F.linear(x, self.a.to(x.dtype))
        b = torch.block_diag(*[part.to(x.dtype) for part in self.b]) if len(self.b) > 1 else self.b[0].to(x.dtype)
        return F.linear(hidden, b)


class Layer(nn.Module):
    """One decoder layer; `lora` is empty where the base is trained as it is."""

    def __init__(self, shape: LlamaShape, weights: Mapping[str, Tensor], rank: int, frozen: bool) -> None:
        super().__init__()
        self.shape = shape
        for name, value in weights.items():
            if frozen:
                self.register_buffer(name, value, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(value))
        sites = site_shapes(shape)
        self.lora = nn.ModuleDict({name: Lora(*sites[name], rank) for name in SITES} if rank else {})

    def site(self, name: str, x: Tensor) -> Tensor:
        """Apply one fused projection and its update."""
        y = F.linear(x, getattr(self, name).to(x.dtype))
        return y + self.lora[name](x) if name in self.lora else y

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        s = self.shape
        h = self.site("qkv", F.rms_norm(x, (s.width,), self.attn_norm.to(x.dtype), s.norm_eps))
        x = x + self.site("out", attention(h, s, rotary, mask))
        h = self.site("gate_up", F.rms_norm(x, (s.width,), self.mlp_norm.to(x.dtype), s.norm_eps))
        gate, up = h.chunk(2, dim=-1)
        return x + self.site("down", F.silu(gate) * up)


def attention(qkv: Tensor, s: LlamaShape, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Causal grouped-query attention, (B, T, (H+2G)·D) → (B, T, H·D), by plain products: faster at this size."""
    n_rows, n_tokens = qkv.shape[:2]
    heads, groups, dim = s.n_heads, s.n_kv_heads, s.head_dim
    per_group = heads // groups
    parts = qkv.view(n_rows, n_tokens, heads + 2 * groups, dim)
    qk, v = parts[:, :, : heads + groups], parts[:, :, heads + groups :]
    qk = qk * rotary[0] + torch.roll(qk, dim // 2, -1) * rotary[1]
    q = qk[:, :, :heads].reshape(n_rows, n_tokens, groups, per_group, dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(n_rows * groups, per_group * n_tokens, dim) * dim**-0.5
    k = qk[:, :, heads:].permute(0, 2, 3, 1).reshape(n_rows * groups, dim, n_tokens)
    v = v.permute(0, 2, 1, 3).reshape(n_rows * groups, n_tokens, dim)
    scores = torch.bmm(q, k).view(n_rows * groups, per_group, n_tokens, n_tokens) + mask
    weights = torch.softmax(scores, -1).view(n_rows * groups, per_group * n_tokens, n_tokens)
    y = torch.bmm(weights, v).view(n_rows, groups, per_group, n_tokens, dim)
    return y.permute(0, 3, 1, 2, 4).reshape(n_rows, n_tokens, heads * dim)


class LabelDecoder(nn.Module):
    """A decoder read through a label head: hidden states after every layer named in `exits`, and the last.

    `inputs` (n_inputs, C) embeds the skill tokens and `<answer>`; `labels` (n_rows, C) is the label head.
    """

    def __init__(
        self, shape: LlamaShape, embedding: Tensor, norm: Tensor, layers: list[Layer], n_inputs: int, n_rows: int
    ) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(layers)
        self.register_buffer("frozen_embedding", embedding, persistent=False)
        self.register_buffer("final_norm", norm, persistent=False)
        self.inputs = nn.Parameter(torch.zeros(n_inputs, shape.width))
        self.labels = nn.Parameter(torch.zeros(n_rows, shape.width))
        self.compute_dtype = embedding.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T, C); ids from the vocabulary's size on are the added inputs."""
        vocab = self.shape.vocab_size
        added = F.embedding((ids - vocab).clamp(min=0), self.inputs).to(self.compute_dtype)
        known = F.embedding(ids.clamp(max=vocab - 1), self.frozen_embedding).to(self.compute_dtype)
        return torch.where((ids >= vocab)[..., None], added, known)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) → normalised hidden states (B, T, C) in fp32."""
        x = self.embed(ids)
        rotary, mask = position_tables(ids.shape[1], self.shape, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, mask)
        return F.rms_norm(x, (self.shape.width,), self.final_norm.to(x.dtype), self.shape.norm_eps).float()


def position_tables(n_tokens: int, shape: LlamaShape, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Rotary cosines and signed sines (T, 1, D), and the causal mask (T, T)."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(n_tokens)[:, None] * shape.rope_theta**-half
    cos = torch.cat([angles.cos()] * 2, -1)[:, None].to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1)[:, None].to(dtype)
    mask = torch.full((n_tokens, n_tokens), -1e4).triu(1).to(dtype)
    return (cos, sin), mask
