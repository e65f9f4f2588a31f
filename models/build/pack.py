"""Turn a source into named tensors and graphs, one layer at a time: what an artifact is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from models.artifact.names import DRAFT, FRAMES, PLAIN, SITES, Span, spans
from models.artifact.shape import LlamaShape
from models.build.adapter import Adapter
from models.build.gptq import Rounding, calibration_ids
from models.build.graph import FAST_ACTIVATIONS, Dims, decoder_graph
from models.build.progress import Report
from models.build.quantise import (
    HEAD,
    SCHEMES,
    TABLE,
    Array,
    Scheme,
    by_columns,
    expert_operands,
    fits,
    operands,
    stacked,
)
from models.build.source import Floats, TensorSource
from models.errors import SourceError
from models.runtime.sessions import Segment

PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}
"""The source's tensors that each fused projection is made of."""
NORMS = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}
"""The norms that every layer has, and the source's names for them."""
MORE_NORMS = {
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
}
"""The norms that some families have."""
UNSUPPORTED = ("blk.0.attn_sinks.weight", "blk.0.ffn_gate_inp_shexp.weight", "per_layer_token_embd.weight")
"""Tensors of relatives of Llama that this graph would silently compute wrongly."""


@dataclass(frozen=True)
class Packing:
    """How a source becomes tensors named as in `models.artifact.names`; the adapter is merged or stays beside.

    Where rounding is calibrated, layers must be taken in order, each once, and `top` after them: each sees what those
    before it give.
    """

    source: TensorSource
    quant: str
    adapter: Adapter | None = None
    merge: bool = False
    exits: tuple[int, ...] = ()
    exit_norms: Floats | None = None
    prefill: bool = False
    """Whether each projection is stored a second time, in int8, for passes over many tokens."""

    @property
    def shape(self) -> LlamaShape:
        """The source's numbers."""
        return self.source.shape

    @property
    def split(self) -> bool:
        """Whether the adapter stays beside the weights."""
        return self.adapter is not None and self.adapter.has_updates and not self.merge

    @property
    def variants(self) -> tuple[str, ...]:
        """The graph variants: without a vocabulary head nobody needs the plain one beside the adapted."""
        return variants(self.split, self.source.has_lm_head)

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """How each fused projection and the tables are stored."""
        return SCHEMES[self.quant]

    @cached_property
    def rounding(self) -> Rounding | None:
        """What rounds the projections on texts of ours, where the quantisation asks for it."""
        if not self._calibrated:
            return None
        table = self.source.tensor("token_embd.weight")
        return Rounding(self.shape, [table[ids] for ids in calibration_ids(self.source)], self.schemes)

    @property
    def _calibrated(self) -> bool:
        """Whether any part of the model is rounded for what it meets on texts."""
        return any(self.schemes[site].calibrated for site in SITES) or (
            self._own_head and self.schemes[HEAD].calibrated
        )

    def check(self) -> None:
        """Raise `SourceError` if the source has tensors that the graph does not know."""
        if self._calibrated and not self._plain_llama:
            raise SourceError(f"--quant {self.quant} follows plain Llama models only; use int4")
        if self.shape.n_experts and self.prefill:
            raise SourceError("--prefill does not fit a mixture of experts; leave it out")
        if self.shape.n_experts and self.adapter:
            raise SourceError("an adapter does not fit a mixture of experts")
        if self.shape.n_experts and self.quant != "fp32" and (self.shape.width % 32 or self.shape.mlp_width % 32):
            raise SourceError("experts whose widths are no multiples of 32 cannot be quantised; use --quant fp32")
        unknown = UNSUPPORTED if self.shape.n_experts else (*UNSUPPORTED, "blk.0.ffn_gate_inp.weight")
        strange = [name for name in unknown if self.source.has(name)]
        if strange:
            raise SourceError(f"the model has the tensor '{strange[0]}', which is not supported")

    def layer(self, n: int) -> dict[str, Array]:
        """Tensors of layer `n`; raises `SourceError` if one is absent or misshapen."""
        tensors: dict[str, Array] = {}
        updates = self.adapter.updates(n) if self.adapter else {}
        merged = {site: update.b @ update.a for site, update in updates.items()} if self.merge else {}
        tensors |= self._norms(n)
        rounded = self._rounded(n, merged, tensors)
        for site in SITES if not self.shape.n_experts else SITES[:2]:
            tensors |= self._site(n, site, merged.get(site), rounded.get(site))
        for site, update in updates.items() if not self.merge else ():
            tensors |= {f"adapter.{n}.{site}.a": update.a, f"adapter.{n}.{site}.b": update.b}
        if self.prefill:
            tensors |= self._copies(n, merged)
        if self.shape.n_experts:
            tensors |= self._mixture(n)
        if self.exit_norms is not None and n + 1 in self.exits:
            tensors[f"layers.{n}.exit_norm"] = self.exit_norms[self.exits.index(n + 1)]
        return tensors

    def top(self) -> dict[str, Array]:
        """The final norm and, if there is one, the head."""
        found: dict[str, Array] = {"final_norm": self._vector("output_norm.weight", self.shape.width)}
        if self.source.has_lm_head:
            name = "output.weight" if self._untied else "token_embd.weight"
            found |= self._calibrated_head(name, found["final_norm"]) if self._own_head else self._table("head", name)
        return found

    def embeddings(self) -> dict[str, Array]:
        """The embedding table; nothing where it is the head's, which is stored once."""
        apart = self._untied or self._own_head or not self.source.has_lm_head
        return self._table("embeddings", "token_embd.weight") if apart else {}

    @property
    def _untied(self) -> bool:
        return self.source.has("output.weight")

    @property
    def _own_head(self) -> bool:
        """Whether the head is stored in another way than the table of embeddings.

        A head whose best logits are computed again needs them to be the table's own rows, in whole blocks.
        """
        if HEAD not in self.schemes or not self.source.has_lm_head:
            return False
        whole_blocks = self.shape.width % self.schemes[TABLE].block == 0
        return not self.schemes[HEAD].is_draft or (whole_blocks and not self._untied)

    @property
    def _plain_llama(self) -> bool:
        s = self.shape
        alike = LlamaShape(
            s.n_layers, s.width, s.n_heads, s.n_kv_heads, s.head_dim, s.mlp_width, s.vocab_size, s.context,
            s.rope_theta, s.norm_eps, rope_divisors=s.rope_divisors, rope_magnitude=s.rope_magnitude,
        )  # fmt: skip
        strange = [f"blk.0.{name}.weight" for name in MORE_NORMS.values()]
        strange += [f"blk.0.{part}.bias" for parts in PARTS.values() for part in parts]
        return s == alike and not any(map(self.source.has, strange))

    def _rounded(self, n: int, merged: Mapping[str, Floats], norms: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        """Operands of the layer's projections where rounding is calibrated, else nothing."""
        if self.rounding is None:
            return {}
        weights = {site: stacked(self.source, self._names(n, site), merged.get(site)) for site in SITES}
        for site, (n_in, n_out) in site_widths(self.shape).items():
            _check(weights[site].shape == (n_out, n_in), self._names(n, site))
        packed = {
            site: operands(self.source, self._names(n, site), self.schemes[site], merged.get(site))
            for site in SITES
            if not self.schemes[site].calibrated
        }
        return self.rounding.layer(weights, {name: norms[f"layers.{n}.{name}"] for name in NORMS}, packed)

    def _copies(self, n: int, merged: Mapping[str, Floats]) -> dict[str, Array]:
        """The layer's projections again, for passes over many tokens."""
        found = {site: by_columns(stacked(self.source, self._names(n, site), merged.get(site))) for site in SITES}
        return {f"prefill.{n}.{site}.{key}": value for site, parts in found.items() for key, value in parts.items()}

    def _names(self, n: int, site: str) -> list[str]:
        return [f"blk.{n}.{part}.weight" for part in PARTS[site]]

    def _site(self, n: int, site: str, extra: Floats | None, rounded: dict[str, Array] | None) -> dict[str, Array]:
        names, weights = [f"blk.{n}.{part}" for part in PARTS[site]], self._names(n, site)
        n_in, n_out = site_widths(self.shape)[site]
        found = rounded or operands(self.source, weights, self.schemes[site], extra)
        _check(fits(found, n_out, n_in, self.schemes[site]), weights)
        if any(self.source.has(f"{name}.bias") for name in names):
            found["bias"] = np.concatenate([self.source.tensor(f"{name}.bias") for name in names])
            if found["bias"].shape != (n_out,):
                raise SourceError(f"the biases of {', '.join(names)} do not have the shape that the matrices ask for")
        return {f"layers.{n}.{site}.{key}": value for key, value in found.items()}

    def _mixture(self, n: int) -> dict[str, Array]:
        """Router in fp32, and the experts one below the other: gate and up (E, 2M, C) interleaved, down (E, C, M)."""
        s = self.shape
        found: dict[str, Array] = {"router.w": self.source.tensor(f"blk.{n}.ffn_gate_inp.weight")}
        gate_up: list[dict[str, Array]] = []
        down: list[dict[str, Array]] = []
        for expert in range(s.n_experts):
            gate, up, last = (
                self.source.tensor(f"blk.{n}.ffn_{part}.{expert}.weight") for part in ("gate", "up", "down")
            )
            both = np.stack([gate, up], axis=1).reshape(-1, gate.shape[-1])
            if both.shape != (2 * s.mlp_width, s.width) or last.shape != (s.width, s.mlp_width):
                raise SourceError(f"expert {expert} of layer {n} does not have the shape that the numbers ask for")
            gate_up.append(expert_operands(both, self.schemes["gate_up"]))
            down.append(expert_operands(last, self.schemes["gate_up"]))
        for name, parts in (("experts_gate_up", gate_up), ("experts_down", down)):
            found |= {f"{name}.{key}": np.stack([part[key] for part in parts]) for key in parts[0]}
        return {f"layers.{n}.{key}": value for key, value in found.items()}

    def _norms(self, n: int) -> dict[str, Array]:
        there = {name: origin for name, origin in MORE_NORMS.items() if self.source.has(f"blk.{n}.{origin}.weight")}
        return {
            f"layers.{n}.{name}": self._vector(
                f"blk.{n}.{origin}.weight", self.shape.head_dim if name in {"q_norm", "k_norm"} else self.shape.width
            )
            for name, origin in (NORMS | there).items()
        }

    def _calibrated_head(self, name: str, norm: Floats) -> dict[str, Array]:
        """The head, rounded for the states that the rounded layers end in; only after all layers."""
        weights = self.source.tensor(name)
        _check(weights.shape == (self.shape.vocab_size, self.shape.width), [name])
        assert self.rounding is not None  # noqa: S101
        scheme = self.schemes[HEAD]
        found = self.rounding.head(weights, norm, scheme)
        return {f"{DRAFT if scheme.is_draft else 'head'}.{key}": value for key, value in found.items()}

    def _table(self, group: str, name: str) -> dict[str, Array]:
        """Head or embeddings, at least in 8 bits: four cost a small model too much."""
        found = operands(self.source, [name], self.schemes[TABLE])
        _check(fits(found, self.shape.vocab_size, self.shape.width, self.schemes[TABLE]), [name])
        return {f"{group}.{key}": value for key, value in found.items()}

    def _vector(self, name: str, width: int) -> Floats:
        values = np.asarray(self.source.tensor(name), np.float32)
        if values.shape != (width,):
            raise SourceError(f"the tensor {name} does not have the shape that the model's numbers ask for")
        return values


def _check(fitting: bool, names: Sequence[str]) -> None:
    if not fitting:
        raise SourceError(f"the tensors {', '.join(names)} do not have the shape that the model's numbers ask for")


def site_widths(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each fused projection."""
    return {
        "qkv": (shape.width, shape.qkv_width),
        "out": (shape.query_width, shape.width),
        "gate_up": (shape.width, 2 * shape.mlp_width),
        "down": (shape.mlp_width, shape.width),
    }


def variants(split: bool, lm_head: bool) -> tuple[str, ...]:
    """The graph variants of a model whose adapter is beside the weights or not."""
    return (PLAIN, FRAMES) if split and lm_head else (FRAMES,) if split else (PLAIN,)


def graphs(
    shape: LlamaShape,
    exits: Sequence[int],
    lm_head: bool,
    dims: Mapping[str, Dims],
    variant: str,
    accuracy_level: int = FAST_ACTIVATIONS,
    *,
    prefill: bool = False,
) -> Iterator[tuple[Span, bytes]]:
    """The graph of each segment of a variant; `dims` are the dimensions of all tensors."""
    for span in spans(shape.n_layers, exits, lm_head and variant == PLAIN):
        adapter = variant == FRAMES
        yield span, decoder_graph(shape, span, dims, adapter=adapter, prefill=prefill, accuracy_level=accuracy_level)


@dataclass(frozen=True)
class PackedModel:
    """A whole model in memory, for tests and small experiments; `split`: the adapter is beside the weights."""

    shape: LlamaShape
    exits: tuple[int, ...]
    lm_head: bool
    split: bool
    tensors: Mapping[str, Array]
    accuracy_level: int = FAST_ACTIVATIONS

    @property
    def variants(self) -> tuple[str, ...]:
        """The graph variants."""
        return variants(self.split, self.lm_head)

    def segments(self, variant: str, *, prefill: bool = False) -> Iterator[Segment]:
        """Graph and weights of each segment."""
        dims = {name: value.shape for name, value in self.tensors.items()}
        level = self.accuracy_level
        for span, graph in graphs(self.shape, self.exits, self.lm_head, dims, variant, level, prefill=prefill):
            make = Segment.for_many_tokens if prefill else Segment
            yield make(span, graph, self._weights(span, variant, prefill=prefill))

    def _weights(self, span: Span, variant: str, *, prefill: bool) -> dict[str, Array]:
        groups = {f"{group}.{n}." for n in span.layers for group in ("layers", *(("prefill",) if prefill else ()))}
        if variant == FRAMES:
            groups |= {f"adapter.{n}." for n in span.layers}
        chosen = {
            name: v for name, v in self.tensors.items() if name[: name.find(".", name.find(".") + 1) + 1] in groups
        }
        if span.stop == self.shape.n_layers:
            chosen[span.norm] = self.tensors[span.norm]
        return chosen | (self.group("head") if span.head and not prefill else {})

    def group(self, name: str) -> dict[str, Array]:
        """Tensors of one group, such as 'head', with their full names."""
        return {key: value for key, value in self.tensors.items() if key.startswith(f"{name}.")}

    def embeddings(self) -> dict[str, Array]:
        """Operands of the embedding table, the head's where the two are tied."""
        found = self.group("embeddings") or self.group("head")
        return {name.partition(".")[2]: value for name, value in found.items()}


def pack(
    source: TensorSource,
    quant: str,
    adapter: Adapter | None,
    report: Report,
    *,
    merge: bool = False,
    exits: Sequence[int] = (),
    exit_norms: Floats | None = None,
    prefill: bool = False,
    accuracy_level: int = FAST_ACTIVATIONS,
) -> PackedModel:
    """Pack a whole model at once; raises `SourceError` if a tensor is absent, misshapen or of another architecture."""
    packing = Packing(source, quant, adapter, merge, tuple(exits), exit_norms, prefill)
    packing.check()
    n_layers = source.shape.n_layers
    tensors: dict[str, Array] = {}
    for n in range(n_layers):
        tensors |= packing.layer(n)
        report(n + 1, n_layers + 1, f"{quant}: layer {n + 1} of {n_layers}")
    tensors |= packing.top() | packing.embeddings()
    report(n_layers + 1, n_layers + 1, f"{quant}: head")
    return PackedModel(source.shape, packing.exits, source.has_lm_head, packing.split, tensors, accuracy_level)
