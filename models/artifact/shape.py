"""The numbers of a decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LlamaShape:
    """The numbers of a Llama-style decoder."""

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    context: int
    rope_theta: float
    norm_eps: float

    @property
    def query_width(self) -> int:
        """Columns of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Columns of the fused query, key and value projection."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
