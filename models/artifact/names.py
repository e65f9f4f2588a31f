"""What lies where in an artifact's folder, and what a graph calls its inputs and outputs.

A tensor's name says its file: `layers.3.qkv.q` lies in `layer-003.safetensors`, `adapter.3.qkv.a` in
`adapter-003.safetensors`, `prefill.3.qkv.i8` in `prefill-003.safetensors`, `head.scale` in `head.safetensors`,
`embeddings.q` in `embeddings.safetensors` (absent where the table is tied: then the head's is read).

Suffixes of a projection: `.w` fp32 (N, K); or `.q` uint8 blocks (N, ⌈K/B⌉, B * bits/8) with `.scale` fp32 (N, ⌈K/B⌉)
and, where a block has an offset, `.shift` fp32 (K/B, N). Bits are 4 or 8; B weights share a scale. With `.zero` uint8
(N, ⌈G/2⌉), zero points in pairs, the codes go on behind K: the last of their G blocks are for the K/B sums of the
inputs' blocks. A second copy for long passes is `.i8` int8 (K, N) with `.scale` fp32 (N,). A head named
`head.draft` only says which logits are the best: those are computed again from the table of embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

BLOCK = 32
"""Weights that share one scale in a file's own grid."""

NIBBLE, BYTE = 4, 8
"""Bits of a code."""
INT8_MAX = 127

SITES = ("qkv", "out", "gate_up", "down")
"""The fused projections of a layer."""

MANIFEST, SIGNATURE, TOKENIZER = "manifest.json", "manifest.sig", "tokenizer.json"
LABELS, HEAD, EMBEDDINGS = "labels.safetensors", "head.safetensors", "embeddings.safetensors"
EXITS = "exits.safetensors"
"""Heads that read frames between layers: who embeds asks them."""
_LAYER_FILE = re.compile(r"(?:layer|adapter|prefill)-(\d{3,})\.safetensors")
PLAIN, FRAMES = "plain", "frames"
"""Graph variants: the model as it is, and the model with its adapter beside the weights."""

DRAFT = "head.draft"
"""A head whose best logits are computed again."""
LOGITS_FROM = "logits_from"
"""The graph's input that says from which position on it gives logits; graphs of before drafts have none."""


def layer_file(layer: int) -> str:
    """File of one layer's weights."""
    return f"layer-{layer:03d}.safetensors"


def adapter_file(layer: int) -> str:
    """File of one layer's adapter."""
    return f"adapter-{layer:03d}.safetensors"


def prefill_file(layer: int) -> str:
    """File of one layer's second copy, for passes over many tokens."""
    return f"prefill-{layer:03d}.safetensors"


def graph_file(variant: str, segment: int, *, prefill: bool = False) -> str:
    """File of one segment's graph; `prefill`: the one for passes over many tokens."""
    return f"graph-{variant}-{'prefill-' if prefill else ''}{segment}.onnx"


def file_of(tensor: str) -> str:
    """Return the file that holds a tensor."""
    group, _, rest = tensor.partition(".")
    if group == "layers":
        return layer_file(int(rest.split(".")[0]))
    if group == "adapter":
        return adapter_file(int(rest.split(".")[0]))
    if group == "prefill":
        return prefill_file(int(rest.split(".")[0]))
    return EMBEDDINGS if group == "embeddings" else HEAD


def of_small_passes(tensor: str) -> bool:
    """Whether the tensor is an operand of a layer's projection, which passes over many tokens do without."""
    return tensor.startswith("layers.") and tensor.rpartition(".")[2] in {"w", "q", "scale", "shift", "zero"}


def in_range(file: str, layers: range, n_layers: int, tied: bool) -> bool:
    """Whether who runs some of the layers needs a file: the first embeds, the last has the head; `tied` shares them."""
    first, last = 0 in layers, n_layers - 1 in layers
    of_a_layer = _LAYER_FILE.fullmatch(file)
    if of_a_layer:
        return int(of_a_layer[1]) in layers
    ends = {EMBEDDINGS: first, EXITS: first, HEAD: last or (first and tied), LABELS: first or last}
    return ends.get(file, True)


def bits_and_block(n_in: int, dims: Sequence[int]) -> tuple[int, int]:
    """Bits of a code and codes of a block in a `.q` of `dims` (N, G, bytes) that stands for `n_in` inputs.

    A block is never twice as wide as the inputs, so that the number of blocks tells a byte from two nibbles.
    """
    _, n_blocks, n_bytes = dims
    bytes_each = n_bytes >= BLOCK and -(-n_in // n_bytes) == n_blocks
    return (BYTE, n_bytes) if bytes_each else (NIBBLE, 2 * n_bytes)


@dataclass(frozen=True)
class Span:
    """A run of layers `first` … `stop - 1` in one graph; `norm` names the weight of its `hidden` output."""

    first: int
    stop: int
    norm: str
    head: bool

    @property
    def layers(self) -> range:
        """The layers of this span."""
        return range(self.first, self.stop)

    def within(self, layers: range) -> Span | None:
        """What of it lies among some layers, None if nothing does."""
        first, stop = max(self.first, layers.start), min(self.stop, layers.stop)
        return replace(self, first=first, stop=stop, head=self.head and stop == self.stop) if first < stop else None

    def cut_after(self, passed: Sequence[int]) -> list[Span]:
        """The runs that it falls into if it is cut wherever so many layers are passed."""
        edges = [self.first, *sorted({n for n in passed if self.first < n < self.stop}), self.stop]
        return [part for a, b in pairwise(edges) if (part := self.within(range(a, b)))]


def spans(n_layers: int, exits: Sequence[int], lm_head: bool) -> list[Span]:
    """Cut a decoder at its exits (each the number of layers passed); only the last span has the vocabulary head."""
    cut = [Span(a, b, f"layers.{b - 1}.exit_norm", head=False) for a, b in pairwise((0, *exits))]
    return [*cut, Span(max(exits, default=0), n_layers, "final_norm", lm_head)]
