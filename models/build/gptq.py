"""Round weights so that a layer's outputs on real text suffer least: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

The columns of a matrix are rounded one after the other, and what each loses is made good by those still to come, by
the inverse of the inputs' second moments. Layers go in the model's order and see the inputs that the rounded layers
before them give. Codes are symmetric, so that no block has an offset. N outputs, K inputs, G blocks, C width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from models.artifact.shape import LlamaShape
from models.build.quantise import Array, Floats, Scheme, block_for, dequantise, pack_codes
from models.build.source import TensorSource
from models.runtime.chat import ChatTemplate
from models.runtime.layers import rotary_tables

SHARES = tuple(float(share) for share in np.linspace(1.0, 0.6, 17))
"""Scales tried for a block, as shares of the one that just holds its largest weight."""
DAMPING = 0.01
"""Added to the moments' diagonal, as a share of its mean: inputs that the text hardly shows stay tame."""
PANEL = 128
"""Columns whose corrections are gathered before they are carried on to the rest of the matrix."""
TEXT_FILE = Path(__file__).with_name("calibration.jsonl")
LONGEST = 256
"""Tokens of a text that are read at most."""


def gptq(weights: Floats, moments: Floats, bits: int, block: int) -> dict[str, Array]:
    """Quantise (N, K) symmetrically for inputs with second moments (K, K); returns `q` and `scale`.

    The error that counts is e M eᵀ for the error e of each row; no row's is larger than that of rounding its weights
    one by one, with scales chosen alike.
    """
    block = block_for(weights.shape[1], block)
    damped = _damped(moments)
    plain = _one_by_one(weights, np.diag(damped), bits, block)
    fed_back = _fed_back(weights, damped, bits, block)
    errors = [weighted_errors(dequantise(parts, weights.shape[1]) - weights, damped) for parts in (plain, fed_back)]
    better = errors[1] < errors[0]
    chosen = {key: np.where(better.reshape(-1, *[1] * (v.ndim - 1)), fed_back[key], v) for key, v in plain.items()}
    return {key: np.ascontiguousarray(value) for key, value in chosen.items()}


def weighted_errors(errors: Floats, moments: Floats) -> Floats:
    """The error e M eᵀ of each row e of `errors` (N, K), (N,)."""
    return np.asarray(((errors @ moments) * errors).sum(-1), np.float32)


def _damped(moments: Floats) -> Floats:
    mean = float(np.diag(moments).mean()) or 1.0
    return np.asarray(moments + DAMPING * mean * np.eye(len(moments)), np.float32)


def _one_by_one(weights: Floats, importance: Floats, bits: int, block: int) -> dict[str, Array]:
    columns = np.ascontiguousarray(weights.T)
    runs = [slice(k, k + block) for k in range(0, len(columns), block)]
    scales = np.stack([_scales(columns[run], importance[run], bits) for run in runs])
    codes = np.concatenate([_codes(columns[run], scale, bits) for run, scale in zip(runs, scales, strict=True)])
    return _packed(codes, scales, bits, block)


def _fed_back(weights: Floats, moments: Floats, bits: int, block: int) -> dict[str, Array]:
    """Round column by column; `rest` holds the columns, one a row, with the corrections of those before them."""
    factor, importance = _inverse_factor(moments), np.diag(moments)
    rest = np.array(weights.T, np.float32, order="C")
    n_in, n_out = rest.shape
    scales = np.zeros((-(-n_in // block), n_out), np.float32)
    codes = np.zeros((n_in, n_out), np.float32)
    for start in range(0, n_in, PANEL):
        stop = min(start + PANEL, n_in)
        errors = np.zeros((stop - start, n_out), np.float32)
        for k in range(start, stop):
            if k % block == 0:
                scales[k // block] = _scales(rest[k : k + block], importance[k : k + block], bits)
            codes[k] = _codes(rest[k], scales[k // block], bits)
            errors[k - start] = (rest[k] - codes[k] * scales[k // block]) / factor[k, k]
            rest[k + 1 : stop] -= factor[k, k + 1 : stop, None] * errors[k - start]
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return _packed(codes, scales, bits, block)


def _inverse_factor(moments: Floats) -> Floats:
    """The upper U with M⁻¹ = Uᵀ U: row k says how the columns behind k make good what k loses."""
    flipped = np.linalg.cholesky(moments[::-1, ::-1].astype(np.float64))[::-1, ::-1]  # M = V Vᵀ, V upper
    return np.asarray(np.linalg.inv(flipped), np.float32)


def _scales(columns: Floats, importance: Floats, bits: int) -> Floats:
    """The best of a few scales (N,) for a block's columns (B, N), errors weighed by the inputs' `importance` (B,)."""
    peak = np.take_along_axis(columns, np.abs(columns).argmax(0)[None], 0)[0] / -(2 ** (bits - 1))
    best, least = peak, np.full(len(peak), np.inf, np.float32)
    for share in SHARES:
        scale = (peak * share).astype(np.float32)
        error = importance @ np.square(_codes(columns, scale, bits) * scale - columns)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return np.asarray(best, np.float32)


def _codes(columns: Floats, scale: Floats, bits: int) -> Floats:
    half = 2 ** (bits - 1)
    return np.asarray(np.clip(np.rint(columns / np.where(scale == 0, 1, scale)), -half, half - 1), np.float32)


def _packed(codes: Floats, scales: Floats, bits: int, block: int) -> dict[str, Array]:
    unsigned = (codes.T + 2 ** (bits - 1)).astype(np.uint8)
    return {"q": pack_codes(unsigned, bits, block), "scale": np.ascontiguousarray(scales.T)}


def calibration_ids(source: TensorSource) -> list[list[int]]:
    """Token ids of our calibration texts, cut; conversations go through the model's template, if it has one."""
    tokenizer = source.tokenizer()
    template = ChatTemplate(source.chat_template) if source.chat_template else None
    entries = [json.loads(line) for line in TEXT_FILE.read_text("utf-8").splitlines()]

    def text(entry: Mapping[str, list[dict[str, str]] | str]) -> str:
        messages = entry.get("messages")
        if not isinstance(messages, list):
            return str(entry["text"])
        return template.render(messages) if template else "\n".join(m["content"] for m in messages)

    encoded = [tokenizer.encode(text(entry), add_special_tokens=False).ids for entry in entries]
    return [ids[at : at + LONGEST] for ids in encoded for at in range(0, len(ids), LONGEST)]


class Rounding:
    """Follows texts through a model while its layers are rounded, so that each layer sees what it will meet."""

    def __init__(self, shape: LlamaShape, embedded: Sequence[Floats], schemes: Mapping[str, Scheme]) -> None:
        """`embedded` are the texts' embeddings, (T, C) each; `schemes` say which sites are quantised here, and how."""
        self._shape, self._streams, self._schemes = shape, list(embedded), schemes
        tables = rotary_tables(shape, max(map(len, embedded)))
        self._rotary = (tables["cos"], tables["sin"])

    def layer(
        self, weights: Mapping[str, Floats], norms: Mapping[str, Floats], packed: Mapping[str, dict[str, Array]]
    ) -> dict[str, dict[str, Array]]:
        """Quantise the fused projections (N, K) of the next layer; returns the operands of each site.

        Those that are `packed` already are only followed.
        """
        done = dict(packed)
        qkv = self._site("qkv", weights, self._normed(norms["attn_norm"]), done)
        self._add(self._site("out", weights, [self._attend(y) for y in qkv], done))
        gate_up = self._site("gate_up", weights, self._normed(norms["mlp_norm"]), done)
        self._add(self._site("down", weights, [_gated(y) for y in gate_up], done))
        return done

    def head(self, weights: Floats, norm: Floats, scheme: Scheme) -> dict[str, Array]:
        """Quantise the vocabulary head (V, C) for what the layers give, all of which went by."""
        return gptq(weights, _moments(self._normed(norm)), scheme.bits, scheme.block)

    def _site(
        self, site: str, weights: Mapping[str, Floats], inputs: Sequence[Floats], done: dict[str, dict[str, Array]]
    ) -> list[Floats]:
        """Quantise one projection for its inputs, put it among those done, and return what it makes of them."""
        if site not in done:
            scheme = self._schemes[site]
            done[site] = gptq(weights[site], _moments(inputs), scheme.bits, scheme.block)
        matrix = dequantise(done[site], weights[site].shape[1]).T
        return [x @ matrix for x in inputs]

    def _add(self, outputs: Sequence[Floats]) -> None:
        self._streams = [x + y for x, y in zip(self._streams, outputs, strict=True)]

    def _normed(self, weight: Floats) -> list[Floats]:
        eps = self._shape.norm_eps
        scales = (1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) for x in self._streams)
        return [np.asarray(x * scale * weight, np.float32) for x, scale in zip(self._streams, scales, strict=True)]

    def _attend(self, qkv: Floats) -> Floats:
        """Causal attention of one text, (T, qkv) → (T, query width)."""
        s, n_tokens = self._shape, len(qkv)
        heads = qkv.reshape(n_tokens, -1, s.head_dim).swapaxes(0, 1)  # (heads, T, D)
        q, k, v = np.split(heads, [s.n_heads, s.n_heads + s.n_kv_heads])
        q, k = self._rotate(q) * np.float32(s.head_dim**-0.5), self._rotate(k)
        k, v = (np.repeat(m, s.n_heads // s.n_kv_heads, axis=0) for m in (k, v))
        scores = q @ k.swapaxes(1, 2) + np.triu(np.full((n_tokens, n_tokens), -np.inf, np.float32), 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        attended = shares / shares.sum(-1, keepdims=True) @ v
        return np.asarray(attended.swapaxes(0, 1).reshape(n_tokens, -1), np.float32)

    def _rotate(self, x: Floats) -> Floats:
        cos, sin = (table[: x.shape[1]] for table in self._rotary)
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _gated(both: Floats) -> Floats:
    gate, up = np.split(both, 2, axis=-1)
    return np.asarray(gate / (1 + np.exp(-gate)) * up, np.float32)


def _moments(inputs: Sequence[Floats]) -> Floats:
    """Second moments Σ x xᵀ (K, K) of the rows of all inputs."""
    return np.asarray(sum(x.T @ x for x in inputs), np.float32)
