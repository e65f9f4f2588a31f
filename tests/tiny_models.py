"""Tiny random models for the engine's tests, and an independent forward pass over a GGUF file in plain numpy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from models.artifact.manifest import ExitHeads
from models.artifact.shape import LlamaShape
from models.build.gguf_source import GgufSource
from models.build.source import SkillHead
from models.runtime.exits import stored
from models.skills import Skill, SkillSet

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe")
MERGES = ("Ġ t", "h e", "Ġt he")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = LlamaShape(
    n_layers=3,
    width=64,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    mlp_width=96,
    vocab_size=len(VOCABULARY),
    context=96,
    rope_theta=10000.0,
    norm_eps=2.0**-17,
)
NARROW_HEADS = replace(SHAPE, n_heads=8, n_kv_heads=4, head_dim=8)
"""Heads that onnxruntime's attention does not rotate itself."""
SKILLS = SkillSet(
    (
        Skill("lamp", ("off", "on", "out_of_scope")),
        Skill("radio", ("out_of_scope", "play", "stop"), {"play": ("artist", "song")}),
    )
)


def quiet(_done: int, _total: int, _text: str) -> None:
    """Take no notice of progress."""


def matrix_shapes(shape: LlamaShape = SHAPE) -> dict[str, tuple[int, int]]:
    kv = shape.n_kv_heads * shape.head_dim
    return {
        "attn_q": (shape.query_width, shape.width),
        "attn_k": (kv, shape.width),
        "attn_v": (kv, shape.width),
        "attn_output": (shape.width, shape.query_width),
        "ffn_gate": (shape.mlp_width, shape.width),
        "ffn_up": (shape.mlp_width, shape.width),
        "ffn_down": (shape.width, shape.mlp_width),
    }


def random_tensors(seed: int = 0, shape: LlamaShape = SHAPE) -> dict[str, np.ndarray]:
    """Random weights by GGUF's names, large enough that the layers matter."""
    rng = np.random.default_rng(seed)
    tensors = {"token_embd.weight": rng.normal(size=(shape.vocab_size, shape.width))}
    for layer in range(shape.n_layers):
        for name, (n_out, n_in) in matrix_shapes(shape).items():
            tensors[f"blk.{layer}.{name}.weight"] = 1.5 * rng.normal(size=(n_out, n_in)) / np.sqrt(n_in)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = 1 + 0.1 * rng.normal(size=shape.width)
    tensors["output_norm.weight"] = 1 + 0.1 * rng.normal(size=shape.width)
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def write_gguf(
    path: Path,
    matrices: Kind = Kind.Q4_1,
    seed: int = 0,
    architecture: str = "llama",
    shape: LlamaShape = SHAPE,
    tensors: dict[str, np.ndarray] | None = None,
    splitter: str = "smollm",
) -> Path:
    """Write a little chat model: matrices in `matrices`, embeddings in Q8_0, tied head; or `tensors` in fp32."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(shape.n_layers)
    writer.add_embedding_length(shape.width)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_feed_forward_length(shape.mlp_width)
    writer.add_context_length(shape.context)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(list(VOCABULARY))
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in (tensors or random_tensors(seed, shape)).items():
        kind = Kind.F32 if value.ndim == 1 or tensors else Kind.Q8_0 if name == "token_embd.weight" else matrices
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class NumpyLlama:
    """ggml's own conventions (neighbouring pairs are rotated) on the raw file; shares no code with the product."""

    def __init__(self, path: Path, shape: LlamaShape = SHAPE) -> None:
        self.shape = shape
        reader = gguf.GGUFReader(str(path))
        self.weights = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors
        }

    def hidden(self, ids: list[int]) -> np.ndarray:
        """Normalised states (T, C) of a whole sequence."""
        w, s = self.weights, self.shape
        x = w["token_embd.weight"][ids]
        for n in range(s.n_layers):
            at = f"blk.{n}"
            h = self._norm(x, w[f"{at}.attn_norm.weight"])
            q, k, v = (h @ w[f"{at}.attn_{p}.weight"].T for p in "qkv")
            x = x + self._attend(q, k, v) @ w[f"{at}.attn_output.weight"].T
            h = self._norm(x, w[f"{at}.ffn_norm.weight"])
            gate, up = h @ w[f"{at}.ffn_gate.weight"].T, h @ w[f"{at}.ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.ffn_down.weight"].T
        return self._norm(x, w["output_norm.weight"])

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits (T, V) of a whole sequence."""
        return self.hidden(ids) @ self.weights["token_embd.weight"].T

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.shape.norm_eps) * weight

    def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        s, n_tokens = self.shape, len(q)
        q, k = (self._rotate(m.reshape(n_tokens, -1, s.head_dim)) for m in (q, k))
        v = v.reshape(n_tokens, -1, s.head_dim)
        out = np.zeros((n_tokens, s.n_heads, s.head_dim))
        for head in range(s.n_heads):
            group = head * s.n_kv_heads // s.n_heads
            scores = q[:, head] @ k[:, group].T / np.sqrt(s.head_dim)
            scores[np.triu_indices(n_tokens, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        return out.reshape(n_tokens, -1)

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        angles = np.arange(len(x))[:, None] * self.shape.rope_theta ** -(
            np.arange(0, self.shape.head_dim, 2) / self.shape.head_dim
        )
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def random_head(exits: tuple[int, ...] = (), seed: int = 5) -> SkillHead:
    """Labels and inputs at random for `SKILLS`."""
    rng, width = np.random.default_rng(seed), SHAPE.width
    labels, inputs = (rng.normal(size=(n, width)).astype(np.float32) for n in (SKILLS.n_rows, SKILLS.n_inputs))
    norms = (1 + 0.2 * rng.normal(size=(len(exits), width))).astype(np.float32) if exits else None
    return SkillHead(SKILLS, labels, inputs, exits, norms, energy={"watts": 3.5, "source": "made up"})


def write_adapter(folder: Path, source: GgufSource, rank: int = 2, seed: int = 9) -> Path:
    """Write a random adapter on the upper layers, in the layout that training writes."""
    rng, s, head = np.random.default_rng(seed), SHAPE, random_head()
    kv = s.n_kv_heads * s.head_dim
    sites = {
        "qkv": (s.width, (s.query_width, kv, kv)),
        "out": (s.query_width, (s.width,)),
        "gate_up": (s.width, (s.mlp_width, s.mlp_width)),
        "down": (s.mlp_width, (s.width,)),
    }
    tensors = {"labels": head.labels, "inputs": head.inputs}
    for layer in range(1, s.n_layers):
        for site, (n_in, outs) in sites.items():
            at = f"layers.{layer}.{site}"
            tensors[f"{at}.a"] = rng.normal(size=(rank * len(outs), n_in)) / np.sqrt(n_in)
            tensors |= {f"{at}.b{j}": rng.normal(size=(n, rank)) for j, n in enumerate(outs)}
    folder.mkdir()
    save_file({k: np.ascontiguousarray(v, np.float16) for k, v in tensors.items()}, folder / "adapter.safetensors")
    card = {"skills": SKILLS.as_dict(), "source": source.digest(), "energy": {"watts": 9.0, "source": "made up"}}
    (folder / "adapter.json").write_text(json.dumps(card), "utf-8")
    return folder


def random_exits(
    passed: tuple[int, ...] = (1, 2), thresholds: dict[str, float] | None = None, seed: int = 3
) -> tuple[ExitHeads, dict[str, np.ndarray]]:
    """Heads at random for `SKILLS`, as sure of themselves as their margin is wide."""
    rng, shrunk, pools = np.random.default_rng(seed), 16, 2
    sizes = {
        "down": (shrunk, SHAPE.width),
        "mix": (shrunk, (1 + pools) * shrunk),
        "out": (SKILLS.n_rows, shrunk),
        "tag_mix": (shrunk, 4 * shrunk),
        "tag_out": (SKILLS.n_rows, shrunk),
    }
    tensors: dict[str, np.ndarray] = {}
    for depth in passed:
        at = f"exit.{depth}."
        tensors[f"{at}queries"] = rng.normal(size=(len(SKILLS.skills), pools, shrunk)).astype(np.float16)
        for name, size in sizes.items():
            weight = (2 * rng.normal(size=size) / np.sqrt(size[1])).astype(np.float32)
            tensors |= {f"{at}{key}": value for key, value in stored(name, weight).items()}
            tensors[f"{at}{name}.bias"] = rng.normal(size=size[0]).astype(np.float16)
    model = {"bias": 0.0, "weights": [1.0, 1.0], "means": [0.0, 0.5], "scales": [1.0, 0.5]}
    final = {"in_scope": model, "out_of_scope": model}
    calibration = {depth: {skill.name: {"final": final} for skill in SKILLS.skills} for depth in passed}
    own = {skill.name: 0.5 for skill in SKILLS.skills} if thresholds is None else thresholds
    return ExitHeads(passed, calibration, own, {"by": "chance"}), tensors
