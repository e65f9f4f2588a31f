"""Turn a source into named tensors and graphs, all in memory: what an artifact is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.artifact.names import FRAMES, PLAIN, SITES, Span, spans
from models.artifact.shape import LlamaShape
from models.build.adapter import Adapter
from models.build.gptq import Rounding, calibration_ids
from models.build.graph import FAST_ACTIVATIONS, decoder_graph
from models.build.progress import Report
from models.build.quantise import SCHEMES, TABLE, Array, Scheme, fits, operands, stacked
from models.build.source import Floats, TensorSource
from models.errors import SourceError
from models.runtime.engine import Segment

PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}
"""The source's tensors that each fused projection is made of."""
NORMS = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}
UNSUPPORTED = ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight", "blk.0.attn_q_norm.weight")
"""Tensors of relatives of Llama that this graph would silently compute wrongly."""


@dataclass(frozen=True)
class PackedModel:
    """Named tensors as in `models.artifact.names`, and how to run them; `split`: the adapter is beside the weights."""

    shape: LlamaShape
    exits: tuple[int, ...]
    lm_head: bool
    split: bool
    tensors: Mapping[str, Array]
    accuracy_level: int = FAST_ACTIVATIONS

    @property
    def variants(self) -> tuple[str, ...]:
        """The graph variants: without a vocabulary head nobody needs the plain one beside the adapted."""
        return (PLAIN, FRAMES) if self.split and self.lm_head else (FRAMES,) if self.split else (PLAIN,)

    def segments(self, variant: str) -> Iterator[Segment]:
        """Graph and weights of each segment."""
        dims = {name: value.shape for name, value in self.tensors.items()}
        for span in spans(self.shape.n_layers, self.exits, self.lm_head and variant == PLAIN):
            graph = decoder_graph(self.shape, span, dims, adapter=variant == FRAMES, accuracy_level=self.accuracy_level)
            yield Segment(span, graph, self._weights(span, variant))

    def _weights(self, span: Span, variant: str) -> dict[str, Array]:
        groups = {f"layers.{n}." for n in span.layers}
        if variant == FRAMES:
            groups |= {f"adapter.{n}." for n in span.layers}
        chosen = {
            name: v for name, v in self.tensors.items() if name[: name.find(".", name.find(".") + 1) + 1] in groups
        }
        if span.stop == self.shape.n_layers:
            chosen[span.norm] = self.tensors[span.norm]
        return chosen | (self.group("head") if span.head else {})

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
    accuracy_level: int = FAST_ACTIVATIONS,
) -> PackedModel:
    """Quantise layer by layer; raises `SourceError` if a tensor is absent, misshapen or of another architecture."""
    strange = [name for name in UNSUPPORTED if source.has(name)]
    if strange:
        raise SourceError(f"the model has the tensor '{strange[0]}', which plain Llama lacks; it is not supported")
    shape = source.shape
    tensors: dict[str, Array] = {}
    schemes = SCHEMES[quant]
    rounding = _rounding(source, schemes)
    for layer in range(shape.n_layers):
        tensors |= _layer(source, layer, schemes, adapter, rounding, merge=merge)
        report(layer + 1, shape.n_layers + 1, f"{quant}: layer {layer + 1} of {shape.n_layers}")
    for passed, norm in zip(exits, exit_norms if exit_norms is not None else (), strict=True):
        tensors[f"layers.{passed - 1}.exit_norm"] = norm
    tensors["final_norm"] = _vector(source, "output_norm.weight", shape.width)
    tensors |= _tables(source, schemes[TABLE])
    report(shape.n_layers + 1, shape.n_layers + 1, f"{quant}: head")
    split = adapter is not None and adapter.has_updates and not merge
    return PackedModel(shape, tuple(exits), source.has_lm_head, split, tensors, accuracy_level)


def _rounding(source: TensorSource, schemes: Mapping[str, Scheme]) -> Rounding | None:
    if not any(schemes[site].calibrated for site in SITES):
        return None
    table = source.tensor("token_embd.weight")
    return Rounding(source.shape, [table[ids] for ids in calibration_ids(source)], schemes)


def _layer(
    source: TensorSource,
    layer: int,
    schemes: Mapping[str, Scheme],
    adapter: Adapter | None,
    rounding: Rounding | None,
    *,
    merge: bool,
) -> dict[str, Array]:
    updates = adapter.updates(layer) if adapter else {}
    merged = {site: update.b @ update.a for site, update in updates.items()} if merge else {}
    names = {site: [f"blk.{layer}.{part}.weight" for part in PARTS[site]] for site in SITES}
    norms = {n: _vector(source, f"blk.{layer}.{origin}.weight", source.shape.width) for n, origin in NORMS.items()}
    if rounding:
        weights = {site: stacked(source, names[site], merged.get(site)) for site in SITES}
        for site, (n_in, n_out) in site_widths(source.shape).items():
            _check(weights[site].shape == (n_out, n_in), names[site])
        found = rounding.layer(weights, norms)
    else:
        found = {site: operands(source, names[site], schemes[site], merged.get(site)) for site in SITES}
    tensors: dict[str, Array] = {f"layers.{layer}.{name}": norm for name, norm in norms.items()}
    for site, (n_in, n_out) in site_widths(source.shape).items():
        _check(fits(found[site], n_out, n_in, schemes[site]), names[site])
        tensors |= {f"layers.{layer}.{site}.{key}": value for key, value in found[site].items()}
    for site, update in updates.items() if not merge else ():
        tensors |= {f"adapter.{layer}.{site}.a": update.a, f"adapter.{layer}.{site}.b": update.b}
    return tensors


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


def _tables(source: TensorSource, scheme: Scheme) -> dict[str, Array]:
    """Head and embeddings; tied ones are stored once."""
    untied = source.has("output.weight")
    tables = {"head": "output.weight" if untied else "token_embd.weight"} if source.has_lm_head else {}
    if untied or not source.has_lm_head:
        tables["embeddings"] = "token_embd.weight"
    packed: dict[str, Array] = {}
    for group, name in tables.items():
        found = operands(source, [name], scheme)
        _check(fits(found, source.shape.vocab_size, source.shape.width, scheme), [name])
        packed |= {f"{group}.{key}": value for key, value in found.items()}
    return packed


def _vector(source: TensorSource, name: str, width: int) -> Floats:
    values = np.asarray(source.tensor(name), np.float32)
    if values.shape != (width,):
        raise SourceError(f"the tensor {name} does not have the shape that the model's numbers ask for")
    return values
