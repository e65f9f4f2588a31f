"""Turn a source into named tensors and graphs, all in memory: what an artifact is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.artifact.names import FRAMES, PLAIN, SITES, Span, spans
from models.artifact.shape import LlamaShape
from models.build.adapter import Adapter
from models.build.graph import FAST_ACTIVATIONS, decoder_graph
from models.build.progress import Report
from models.build.quantise import Array, operands, outputs_and_blocks
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
    for layer in range(shape.n_layers):
        tensors |= _layer(source, layer, quant, adapter, merge=merge)
        report(layer + 1, shape.n_layers + 1, f"{quant}: layer {layer + 1} of {shape.n_layers}")
    for passed, norm in zip(exits, exit_norms if exit_norms is not None else (), strict=True):
        tensors[f"layers.{passed - 1}.exit_norm"] = norm
    tensors["final_norm"] = _vector(source, "output_norm.weight", shape.width)
    tensors |= _tables(source, quant)
    report(shape.n_layers + 1, shape.n_layers + 1, f"{quant}: head")
    split = adapter is not None and adapter.has_updates and not merge
    return PackedModel(shape, tuple(exits), source.has_lm_head, split, tensors, accuracy_level)


def _layer(source: TensorSource, layer: int, quant: str, adapter: Adapter | None, *, merge: bool) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    updates = adapter.updates(layer) if adapter else {}
    widths = site_widths(source.shape)
    for site in SITES:
        update = updates.get(site)
        extra = update.b @ update.a if update and merge else None
        names = [f"blk.{layer}.{part}.weight" for part in PARTS[site]]
        found = operands(source, names, quant, extra)
        n_in, n_out = widths[site]
        if outputs_and_blocks(found) != (n_out, -(-n_in // 32)):
            raise SourceError(f"the tensors {', '.join(names)} do not have the shape that the model's numbers ask for")
        tensors |= {f"layers.{layer}.{site}.{key}": value for key, value in found.items()}
        if update and not merge:
            tensors |= {f"adapter.{layer}.{site}.a": update.a, f"adapter.{layer}.{site}.b": update.b}
    for name, origin in NORMS.items():
        tensors[f"layers.{layer}.{name}"] = _vector(source, f"blk.{layer}.{origin}.weight", source.shape.width)
    return tensors


def site_widths(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each fused projection."""
    return {
        "qkv": (shape.width, shape.qkv_width),
        "out": (shape.query_width, shape.width),
        "gate_up": (shape.width, 2 * shape.mlp_width),
        "down": (shape.mlp_width, shape.width),
    }


def _tables(source: TensorSource, quant: str) -> dict[str, Array]:
    """Head and embeddings, at least in 8 bits: four cost a small model too much. Tied ones are stored once."""
    quant = "int8" if quant == "int4" else quant
    untied = source.has("output.weight")
    tables = {"head": "output.weight" if untied else "token_embd.weight"} if source.has_lm_head else {}
    if untied or not source.has_lm_head:
        tables["embeddings"] = "token_embd.weight"
    packed: dict[str, Array] = {}
    for group, name in tables.items():
        found = operands(source, [name], quant)
        if outputs_and_blocks(found) != (source.shape.vocab_size, -(-source.shape.width // 32)):
            raise SourceError(f"the tensor {name} does not have the shape that the model's numbers ask for")
        packed |= {f"{group}.{key}": value for key, value in found.items()}
    return packed


def _vector(source: TensorSource, name: str, width: int) -> Floats:
    values = np.asarray(source.tensor(name), np.float32)
    if values.shape != (width,):
        raise SourceError(f"the tensor {name} does not have the shape that the model's numbers ask for")
    return values
