"""The numbers of a decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

SILU, GELU_TANH = "silu", "gelu_tanh"
ACTIVATIONS = (SILU, GELU_TANH)


@dataclass(frozen=True)
class LlamaShape:
    """The numbers of a Llama-style decoder; those with a default say how its relatives differ from plain Llama.

    Of an attention layer in `local_layers` a token sees the last `window` tokens only, itself included, and its rotary
    base is `local_rope_theta` where there is one. In the other layers the frequency of pair i is divided by
    `rope_divisors[i]` (that is what context extensions such as Llama 3's come to), and cosines and sines are multiplied
    by `rope_magnitude`. `attention_scale` multiplies q·k, by default head_dim^-½; `embedding_scale` multiplies the
    embeddings. With `n_experts` the MLP is a sparse mixture: each token goes to the `n_experts_used` best, whose
    weights sum to 1 if they are `experts_normed`.
    """

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
    window: int = 0
    local_layers: tuple[int, ...] = ()
    local_rope_theta: float = 0.0
    rope_divisors: tuple[float, ...] = ()
    rope_magnitude: float = 1.0
    attention_scale: float = 0.0
    embedding_scale: float = 1.0
    activation: str = SILU
    n_experts: int = 0
    n_experts_used: int = 0
    experts_normed: bool = False

    @property
    def query_width(self) -> int:
        """Columns of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Columns of the fused query, key and value projection."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    @property
    def query_scale(self) -> float:
        """What q·k is multiplied by."""
        return self.attention_scale or self.head_dim**-0.5

    def as_dict(self) -> dict[str, Any]:
        """All fields for JSON; those in which the model is a plain Llama are left out."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaShape:
        """Undo `as_dict`; raises `TypeError` for a key that is unknown or absent."""
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**given)

    def fault(self) -> str:
        """Name the first field whose value cannot be, '' if all can."""
        whole = ("n_layers", "width", "n_heads", "n_kv_heads", "head_dim", "mlp_width", "vocab_size", "context")
        positive = (*whole, "rope_theta", "norm_eps", "rope_magnitude", "embedding_scale")
        found = {name: 0 < getattr(self, name) < math.inf for name in positive}
        for name in ("window", "local_rope_theta", "attention_scale", "n_experts"):
            found[name] = 0 <= getattr(self, name) < math.inf
        found["local_layers"] = set(self.local_layers) <= set(range(self.n_layers if self.window else 0))
        found["rope_divisors"] = len(self.rope_divisors) in {0, self.head_dim // 2} and all(
            0 < divisor < math.inf for divisor in self.rope_divisors
        )
        found["activation"] = self.activation in ACTIVATIONS
        found["n_experts_used"] = (1 if self.n_experts else 0) <= self.n_experts_used <= self.n_experts
        return next((name for name, good in found.items() if not good), "")
