"""The source model run as a reference: by transformers where torch is there, else by a forward pass in plain numpy.

T tokens, C width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.artifact.shape import SILU, LlamaShape
from models.build.source import Floats, TensorSource
from models.errors import SourceError

GREEDY_TOKENS = 16


@dataclass(frozen=True)
class Expected:
    """What the source says: token ids, the logits (T, V) at each, and how many of the first ids were the prompt."""

    ids: Sequence[int]
    logits: Floats
    n_prompt: int


def can_load() -> bool:
    """Whether transformers and torch are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def load(folder: Path) -> Any:
    """Open a Hugging Face folder in fp32 with transformers; raises `SourceError`. Never runs code from the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        options = {
            "dtype": torch.float32,
            "local_files_only": True,
            "trust_remote_code": False,
            "use_safetensors": True,
        }
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        said = str(error).strip().partition("\n")[0]
        raise SourceError(f"transformers cannot read {folder}: {said}") from error


def expect(model: Any, prompts: Sequence[Sequence[int]]) -> list[Expected]:
    """Let a model of transformers go on greedily from each prompt, then read prompt and answer."""
    import torch

    found = []
    with torch.no_grad():
        for prompt in prompts:
            ids, memory, new = list(prompt), None, torch.tensor([list(prompt)])
            for _ in range(GREEDY_TOKENS):
                step = model(new, past_key_values=memory, use_cache=True)
                memory, new = step.past_key_values, step.logits[:, -1:].argmax(-1)
                ids.append(int(new[0, 0]))
            logits: Floats = model(torch.tensor([ids])).logits[0].float().numpy()
            found.append(Expected(ids, logits, len(prompt)))
    return found


class PlainForward:
    """A textbook forward pass over a source's own tensors, layer by layer, in fp32; `attend` shows the formulas."""

    def __init__(self, source: TensorSource, texts: Sequence[Sequence[int]]) -> None:
        self._source, self._shape = source, source.shape
        table = source.tensor("token_embd.weight")
        scale = np.float32(source.shape.embedding_scale)
        self._states = [table[np.asarray(ids, np.int64)] * scale for ids in texts]

    def layer(self, n: int) -> None:
        """Pass layer `n`."""
        weights = _Layer(self._source, n)
        self._states = [_layer(weights, x, n in self._shape.local_layers) for x in self._states]

    def logits(self, table: Floats) -> list[Floats]:
        """Logits (T, V) of each text, after the last layer, by the head's matrix (V, C)."""
        norm = self._source.tensor("output_norm.weight")
        return [_norm(x, norm, self._shape.norm_eps) @ table.T for x in self._states]


class _Layer:
    """One layer's tensors, each read once."""

    def __init__(self, source: TensorSource, n: int) -> None:
        self.shape = source.shape
        self._source, self._n = source, n
        self._read: dict[str, Floats | None] = {}

    def get(self, part: str, kind: str = "weight") -> Floats | None:
        name = f"blk.{self._n}.{part}.{kind}"
        if name not in self._read:
            self._read[name] = self._source.tensor(name) if self._source.has(name) else None
        return self._read[name]

    def product(self, part: str, x: Floats) -> Floats:
        weight, bias = self.get(part), self.get(part, "bias")
        if weight is None:
            raise SourceError(f"the model lacks the tensor 'blk.{self._n}.{part}.weight'")
        y = x @ weight.T
        return y if bias is None else y + bias

    def norm(self, part: str, x: Floats) -> Floats:
        weight = self.get(part)
        return x if weight is None else _norm(x, weight, self.shape.norm_eps)


def _layer(w: _Layer, x: Floats, local: bool) -> Floats:
    h = w.norm("attn_norm", x)
    x = x + w.norm("post_attention_norm", w.product("attn_output", _attend(w, h, local)))
    h = w.norm("ffn_norm", x)
    mlp = _mixture(w, h) if w.shape.n_experts else _mlp(w, h, "")
    return x + w.norm("post_ffw_norm", mlp)


def _mlp(w: _Layer, h: Floats, expert: str) -> Floats:
    act = ACTIVATIONS[w.shape.activation]
    gated = act(w.product(f"ffn_gate{expert}", h)) * w.product(f"ffn_up{expert}", h)
    return w.product(f"ffn_down{expert}", gated)


def _mixture(w: _Layer, h: Floats) -> Floats:
    """Each token's best experts, weighed by the softmax over all of them (Shazeer et al. 2017, arXiv 1701.06538)."""
    scores = w.product("ffn_gate_inp", h)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    lowest = np.sort(chances, -1)[:, -w.shape.n_experts_used, None]
    shares = np.where(chances >= lowest, chances, 0)
    if w.shape.experts_normed:
        shares /= shares.sum(-1, keepdims=True)
    parts = [shares[:, e, None] * _mlp(w, h, f".{e}") for e in range(w.shape.n_experts)]
    return np.asarray(sum(parts), np.float32)


def _attend(w: _Layer, h: Floats, local: bool) -> Floats:
    s, n_tokens = w.shape, len(h)
    q, k, v = (w.product(f"attn_{part}", h).reshape(n_tokens, -1, s.head_dim) for part in "qkv")
    q, k = (_rotate(w.norm(f"attn_{part}_norm", m), s, local) for part, m in (("q", q), ("k", k)))
    k, v = (np.repeat(m, s.n_heads // s.n_kv_heads, axis=1) for m in (k, v))
    scores = np.einsum("ahd,bhd->hab", q, k) * np.float32(s.query_scale)
    ago = np.arange(n_tokens)[:, None] - np.arange(n_tokens)
    scores[:, (ago < 0) | (local & (ago >= s.window))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.asarray(np.einsum("hab,bhd->ahd", weights, v).reshape(n_tokens, -1))


def _rotate(x: Floats, s: LlamaShape, local: bool) -> Floats:
    own_base = local and s.local_rope_theta > 0
    pairs = np.arange(0, s.head_dim, 2) / s.head_dim
    frequencies = (s.local_rope_theta if own_base else s.rope_theta) ** -pairs
    frequencies /= 1.0 if own_base else np.asarray(s.rope_divisors or 1.0)
    angles = np.arange(len(x))[:, None, None] * frequencies
    size = 1.0 if own_base else s.rope_magnitude
    cos, sin = (size * np.cos(angles)).astype(np.float32), (size * np.sin(angles)).astype(np.float32)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _norm(x: Floats, weight: Floats, eps: float) -> Floats:
    return np.asarray(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight, np.float32)


def _silu(x: Floats) -> Floats:
    return np.asarray(x / (1 + np.exp(-np.clip(x, -80, None))), np.float32)


def _gelu_tanh(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), np.float32)


ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {SILU: _silu, "gelu_tanh": _gelu_tanh}
