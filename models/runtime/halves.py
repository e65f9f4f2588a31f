"""Cut a decoder's graph into halves of layers that give a rank's partial sums: attention, MLP; and into what ends them.

The whole graph adds each half's result to the residual stream and normalises the sum in one operator. A half begins
with the norm and ends before the addition, since only the sum of all ranks' results may be added. What sizes a node
states are rewritten to the rank's. Needs onnx, which tiers with shards have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from onnx import ModelProto, helper

from models.artifact.names import BLOCK, Span
from models.artifact.shape import LlamaShape
from models.errors import ArtifactError
from models.runtime.cut import needed
from models.runtime.ranks import Array

_ADD_AND_NORM, _NORM = "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"
ATTENTION, MLP, HEAD = "attn", "mlp", "head"
PARTIAL = "partial"
"""The output of a half: its part of the sum; the head's is its rows of the logits, the norm's is whole."""
Half = tuple[bytes, dict[str, Array]]
"""A graph, and the weights that it reads."""


class Halves:
    """The graphs of one span for one rank; `shape` are the rank's numbers."""

    def __init__(self, graph: bytes, span: Span, shape: LlamaShape) -> None:
        self._model = ModelProto()
        self._model.ParseFromString(graph)
        self._span, self._shape = span, shape
        self._nodes = list(self._model.graph.node)
        self._by_output = {name: node for node in self._nodes for name in node.output if name}
        if any("_post_normed" in name for name in self._by_output):
            raise ArtifactError(
                "the model normalises what attention and MLP give before it is added, which ranks do not; "
                "give whole layers to shards"
            )

    def half(self, layer: int, part: str, weights: Mapping[str, Array]) -> Half:
        """`x` (B, T, C) → the rank's part of what a layer's attention or MLP adds to it."""
        before = self._before(layer) if part == ATTENTION else self._sum(layer, ATTENTION)
        result = self._sum(layer, part).input[0]
        return self._close(before, result, f"layers.{layer}.{part}_norm", weights, [layer] if part == ATTENTION else [])

    def head(self, weights: Mapping[str, Array]) -> Half:
        """`x` (B, T, C), the stream that ends the layers → logits (B, R, rows of this rank)."""
        return self._close(self._sum(self._span.stop - 1, MLP), "logits", self._span.norm, weights, [])

    def norm(self, weights: Mapping[str, Array]) -> Half:
        """`x` (B, T, C), the stream that ends the layers → the model's normalised states (B, T, C)."""
        return self._close(self._sum(self._span.stop - 1, MLP), "hidden", self._span.norm, weights, [])

    def _before(self, layer: int) -> Any:
        """The node whose first output is the normalised stream that the layer's attention reads."""
        return self._made("x_normed") if layer == self._span.first else self._sum(layer - 1, MLP)

    def _sum(self, layer: int, part: str) -> Any:
        return self._made(f"layers.{layer}.{part}.sum")

    def _made(self, name: str) -> Any:
        node = self._by_output.get(name)
        if node is None or node.op_type not in {_ADD_AND_NORM, _NORM}:
            raise ArtifactError(f"the graph has no '{name}' to cut at; build the artifact again, as '--via own'")
        return node

    def _close(
        self, before: Any, result: str, norm: str, weights: Mapping[str, Array], cached: Collection[int]
    ) -> Half:
        """A model that normalises `x` as the node `before` does, and goes on to `result`."""
        normed = before.output[0]
        eps = next(a for a in before.attribute if a.name == "epsilon")
        first = helper.make_node(_NORM, ["x", norm], [normed], axis=-1, epsilon=eps.f)
        memories = {f"present_{kind}.{layer}" for layer in cached for kind in ("key", "value")}
        inner = needed([node for node in self._nodes if normed not in node.output], {result, *memories})
        nodes = [first, *map(_copy, inner)]
        constants = {c.name: _copy(c) for c in self._model.graph.initializer}
        for node in nodes:
            self._resize(node, weights, constants)
        last = helper.make_node("Identity", [result], [PARTIAL])
        return self._model_of([*nodes, last], constants, weights, memories)

    def _resize(self, node: Any, weights: Mapping[str, Array], constants: dict[str, Any]) -> None:
        """Write the rank's sizes into a node, and into the constants that it reads."""
        s = self._shape
        if node.op_type == "GroupQueryAttention":
            _set(node, num_heads=s.n_heads, kv_num_heads=s.n_kv_heads)
        elif node.op_type == "RotaryEmbedding":
            _set(node, num_heads=s.n_heads if node.output[0].endswith(".q_rotated") else s.n_kv_heads)
        elif node.op_type == "MatMulNBits":
            codes = weights[node.input[1]]
            site = node.input[1].split(".")[-2]
            n_in = {"out": s.query_width, "down": s.mlp_width}.get(site)
            _set(node, N=len(codes), **({"K": n_in} if n_in else {}))
        elif node.op_type == "Reshape" and node.output[0].endswith(".blocks"):
            at_narrow = {".attended.blocks": s.query_width, ".gated.blocks": s.mlp_width}
            n_in = next((width for end, width in at_narrow.items() if node.output[0].endswith(end)), None)
            if n_in:
                node.input[1] = f"blocks_of_rank_{n_in}"
                constants[node.input[1]] = _vector(node.input[1], [0, 0, n_in // BLOCK, BLOCK])
        kv_width = s.n_kv_heads * s.head_dim
        sizes = {
            "qkv_widths": [s.query_width, kv_width, kv_width],
            "q_heads": [0, 0, s.n_heads, s.head_dim],
            "k_heads": [0, 0, s.n_kv_heads, s.head_dim],
            "q_width": [0, 0, s.query_width],
            "k_width": [0, 0, kv_width],
        }
        for name in sizes.keys() & set(node.input):
            constants[name] = _vector(name, sizes[name])

    def _model_of(
        self,
        nodes: Sequence[Any],
        constants: Mapping[str, Any],
        weights: Mapping[str, Array],
        memories: Collection[str],
    ) -> Half:
        graph, used = self._model.graph, {name for node in nodes for name in node.input if name}
        initializers = [constants[name] for name in used if name in constants]
        for value in initializers:
            if value.name in weights:
                del value.dims[:]
                value.dims.extend(weights[value.name].shape)
        inputs = [_copy(value) for value in graph.input if value.name in used or value.name == "x"]
        results = [_copy(value) for value in graph.output if value.name in memories]
        for value in (*inputs, *results):
            if value.name.startswith(("past_", "present_")):
                value.type.tensor_type.shape.dim[1].dim_value = self._shape.n_kv_heads
        wide = helper.make_tensor_value_info(PARTIAL, 1, ["B", "R", "W"])
        made = helper.make_graph(nodes, "half", inputs, [wide, *results], initializers)
        model = helper.make_model(made, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        return bytes(model.SerializeToString()), {name: value for name, value in weights.items() if name in used}


def _copy(value: Any) -> Any:
    return type(value).FromString(value.SerializeToString())


def _set(node: Any, **values: int) -> None:
    for attribute in node.attribute:
        if attribute.name in values:
            attribute.i = values[attribute.name]


def _vector(name: str, values: Iterable[int]) -> Any:
    listed = list(values)
    return helper.make_tensor(name, 7, [len(listed)], listed)
