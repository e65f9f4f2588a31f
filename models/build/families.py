"""The families that have a fused graph: how each `model_type`'s config and tensor names are read.

A family's tensors are named as GGUF names them (`blk.3.attn_q.weight`); `Family.stored` says where such a tensor lies
in a Hugging Face checkpoint. What a model has beyond plain Llama shows in two places: numbers in `LlamaShape`, and
further tensors (biases, norms), which the graph computes with wherever they are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from models.artifact.shape import GELU_TANH, SILU, LlamaShape
from models.errors import SourceError

Config = Mapping[str, Any]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL = {"ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}
_QWEN_EXPERT = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
_FUSED = {
    "self_attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
}
ODD = ("attention_bias", "mlp_bias", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
"""Switches that would change what is computed, and that no graph here has."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a checkpoint: a name, of whose rows `first` … `first + count - 1` (all, if count is 0)."""

    name: str
    first: int = 0
    count: int = 0


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    `layer` names a layer's tensors, `fused` those that hold several parts one below the other; `tied` is what a config
    without `tie_word_embeddings` means; of norms that multiply by 1 + w, `norm_offset` is the 1. `experts` are where
    those of a mixture lie, and what each of their matrices (`blk.3.ffn_up.7.weight`) is called there.
    """

    shape: Callable[[Config], LlamaShape]
    layer: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tied: bool = False
    norm_offset: float = 0.0
    experts: tuple[str, Mapping[str, str]] = ("", {})

    def stored(self, name: str, shape: LlamaShape) -> Stored:
        """Say where the tensor of a GGUF name lies."""
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("blk."):
            return Stored(f"{_TOP.get(stem, stem)}.{kind}")
        _, layer, part, *expert = stem.split(".")
        at = f"model.layers.{layer}"
        if expert:
            folder, parts_of = self.experts
            return Stored(f"{at}.{folder}.{expert[0]}.{parts_of.get(part, part)}.{kind}")
        for whole, parts in self.fused.items():
            if part in parts:
                rows = [_rows(p, shape) for p in parts]
                place = parts.index(part)
                return Stored(f"{at}.{whole}.{kind}", sum(rows[:place]), rows[place])
        return Stored(f"{at}.{self.layer.get(part, part)}.{kind}")


def family_of(config: Config) -> Family:
    """Return the family of a Hugging Face config; raises `SourceError` for one without a fused graph."""
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise SourceError(
            f"the model is of the family '{kind}', for which there is no fused graph (there is for "
            f"{', '.join(FAMILIES)}); try --via optimum"
        )
    odd = [key for key in ODD if config.get(key)]
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        odd.append("partial_rotary_factor")
    if odd:
        raise SourceError(f"the model's config sets '{odd[0]}', which the fused graph does not have; try --via optimum")
    return family


def _rows(part: str, shape: LlamaShape) -> int:
    kv = shape.n_kv_heads * shape.head_dim
    return {"attn_q": shape.query_width, "attn_k": kv, "attn_v": kv}.get(part, shape.mlp_width)


def _plain(config: Config) -> LlamaShape:
    """The numbers that all families write alike; raises `KeyError`, `TypeError` or `ValueError`."""
    heads = int(config["num_attention_heads"])
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    shape = LlamaShape(
        n_layers=int(config["num_hidden_layers"]),
        width=int(config["hidden_size"]),
        n_heads=heads,
        n_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        mlp_width=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        context=int(config["max_position_embeddings"]),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        norm_eps=float(config["rms_norm_eps"]),
        activation=_activation(config),
    )
    return _scaled(shape, rope, config)


def _activation(config: Config) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act", "silu")
    known = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH}
    if name not in known:
        raise SourceError(f"the model's activation '{name}' is not one of {', '.join(known)}; try --via optimum")
    return known[name]


def _scaled(shape: LlamaShape, rope: Config, config: Config) -> LlamaShape:
    """Extend the context as `rope_scaling` says; formulas as in transformers' `modeling_rope_utils`."""
    kind = rope.get("rope_type") or rope.get("type") or ("default" if not set(rope) - {"rope_theta"} else "unnamed")
    pairs = shape.head_dim // 2
    if kind == "default":
        return shape
    if kind == "linear":
        return replace(shape, rope_divisors=(float(rope["factor"]),) * pairs)
    if kind == "llama3":
        return replace(shape, rope_divisors=_llama3(shape, rope))
    if kind == "longrope":
        return _longrope(shape, rope, config)
    raise SourceError(f"the model's rope_scaling is of the kind '{kind}', which is not supported; try --via optimum")


def _llama3(shape: LlamaShape, rope: Config) -> tuple[float, ...]:
    """Long waves are stretched by the factor, short ones stay, those between are blended (Llama 3.1)."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    frequencies = shape.rope_theta ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return tuple(float(d) for d in 1 / (share + (1 - share) / factor))


def _longrope(shape: LlamaShape, rope: Config, config: Config) -> LlamaShape:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753) within the original context; beyond it other factors would hold."""
    original = int(config.get("original_max_position_embeddings") or rope["original_max_position_embeddings"])
    growth = float(config["max_position_embeddings"]) / original
    usual = math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0
    return replace(
        shape,
        context=min(shape.context, original),
        rope_divisors=tuple(float(d) for d in rope["short_factor"]),
        rope_magnitude=float(rope.get("attention_factor") or usual),
    )


def _windowed(shape: LlamaShape, config: Config, local: Callable[[int], bool]) -> LlamaShape:
    """Mark the layers with a sliding window: those of `layer_types`, or those that `local` names."""
    window = int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types")
    layers = tuple(n for n in range(shape.n_layers) if (kinds[n] == "sliding_attention" if kinds else local(n)))
    return replace(shape, window=window, local_layers=layers) if layers and 0 < window < shape.context else shape


def _everywhere(config: Config) -> LlamaShape:
    return _windowed(_plain(config), config, lambda _: True)


def _upper(config: Config) -> LlamaShape:
    """Qwen: the window is used only if asked for, and from a certain layer on."""
    if not config.get("use_sliding_window"):
        return _plain(config)
    first = int(config.get("max_window_layers") or 0)
    return _windowed(_plain(config), config, lambda n: n >= first)


def _gemma3(config: Config) -> LlamaShape:
    period = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    shape = replace(
        _plain(config),
        attention_scale=float(config["query_pre_attn_scalar"]) ** -0.5,
        embedding_scale=math.sqrt(config["hidden_size"]),
    )
    local = _windowed(shape, config, lambda n: (n + 1) % period != 0)
    return replace(local, local_rope_theta=float(config["rope_local_base_freq"])) if local.local_layers else local


def _mixtral(config: Config) -> LlamaShape:
    return _experts(_everywhere(config), config, "num_local_experts", normed=True)


def _qwen3_moe(config: Config) -> LlamaShape:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise SourceError("the model mixes layers with experts and without, which is not supported")
    shape = replace(_upper(config), mlp_width=int(config["moe_intermediate_size"]))
    return _experts(shape, config, "num_experts", normed=bool(config.get("norm_topk_prob")))


def _experts(shape: LlamaShape, config: Config, count: str, *, normed: bool) -> LlamaShape:
    used = int(config["num_experts_per_tok"])
    return replace(shape, n_experts=int(config[count]), n_experts_used=used, experts_normed=normed)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(_plain),
    "mistral": Family(_everywhere),
    "qwen2": Family(_upper),
    "qwen3": Family(_upper, layer={**_LAYER, **_HEAD_NORMS}),
    "phi3": Family(_everywhere, fused=_FUSED),
    "mixtral": Family(
        _mixtral,
        layer={**_LAYER, "ffn_gate_inp": "block_sparse_moe.gate"},
        experts=("block_sparse_moe.experts", _MIXTRAL),
    ),
    "qwen3_moe": Family(
        _qwen3_moe, layer={**_LAYER, **_HEAD_NORMS, "ffn_gate_inp": "mlp.gate"}, experts=("mlp.experts", _QWEN_EXPERT)
    ),
    "gemma3_text": Family(_gemma3, layer={**_LAYER, **_HEAD_NORMS, **_SANDWICH}, tied=True, norm_offset=1.0),
}
"""By `model_type` of a Hugging Face config."""

GGUF_ARCHITECTURES: Mapping[str, bool] = {"llama": True, "qwen2": False, "qwen3": False}
"""GGUF's names of the architectures that are read, and whether its files interleave the rotary halves of q and k."""
