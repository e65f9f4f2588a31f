"""Take an exported ONNX decoder apart: a graph without weights, and the weights by layer, quantised if asked for.

Every product with a constant matrix becomes the one that our own graphs use (`FusedMatMul` or `MatMulNBits` on rows of
outputs), a table of embeddings that is also the head is stored once, and the memory's names become ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from models.artifact.names import BLOCK, BYTE, NIBBLE, file_of
from models.build.graph import CONTRIB, FAST_ACTIVATIONS
from models.build.quantise import Array, symmetric
from models.errors import SourceError

_LAYER = re.compile(r"(?:^|[./])(?:layers|h)[./](\d+)[./]")
_MEMORY = re.compile(r"(past|present)(?:_key_values)?\.(\d+)\.(key|value)")
MATRIX_AXES = 2
_SMALLEST = 16
"""Weights of fewer numbers stay in the graph: they are constants of a formula."""


@dataclass(frozen=True)
class Dissected:
    """The graph's parts and its tensors, named as in `models.artifact.names`."""

    model: ModelProto
    tensors: Mapping[str, Array]

    def graph(self, *, last_only: bool) -> bytes:
        """The serialised graph, with logits of the last position only, as engines want it, or of all."""
        model = ModelProto()
        model.CopyFrom(self.model)
        if last_only:
            _slice_before_head(model)
        return bytes(model.SerializeToString())


BITS: Mapping[str, int | None] = {"int4": NIBBLE, "int8": BYTE, "fp32": None}
"""Quantisations of exported graphs; head and embeddings have 8 bits at least."""


def dissect(model: ModelProto, quant: str, vocab_size: int) -> Dissected:
    """Take the model apart; raises `SourceError` if it has no vocabulary head to be found."""
    return _Dissection(model, quant, vocab_size).done()


class _Dissection:
    """One pass over the nodes; `self.tensors` collects what is no longer in the graph."""

    def __init__(self, model: ModelProto, quant: str, vocab_size: int) -> None:
        self.model, self.bits, self.vocab_size = ModelProto(), BITS[quant], vocab_size
        self.model.CopyFrom(model)
        graph = self.model.graph
        self.constants = {i.name: i for i in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.same = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity"}
        self.turned = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose" and _swaps(n)}
        self.tensors: dict[str, Array] = {}
        self.sites: dict[str, str] = {}
        self.nodes: list[NodeProto] = []
        self.tables: dict[str, Array] = {}

    def done(self) -> Dissected:
        graph = self.model.graph
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = self._root(name)
            self.nodes += self._replaced(node)
        self._drop_unused()
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        self._take_out()
        self._rename()
        known = {entry.domain for entry in self.model.opset_import}
        if CONTRIB not in known:
            self.model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        return Dissected(self.model, self.tensors)

    def _replaced(self, node: NodeProto) -> list[NodeProto]:
        if node.op_type in {"MatMul", "Gemm"} and (weight := self._matrix(node)) is not None:
            return self._product(node, weight)
        if node.op_type == "Gather" and self._is_table(node):
            return self._lookup(node)
        return [node]

    def _matrix(self, node: NodeProto) -> Array | None:
        """The constant matrix (outputs, inputs) that a node multiplies by, or None."""
        name, turned = node.input[1], False
        if name in self.turned:
            name, turned = self.turned[name], True
        values = self._values(name)
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if values is None or not _is_matrix(values):
            return None
        if options.get("transA", 0) or options.get("alpha", 1) != 1 or options.get("beta", 1) != 1:
            return None
        return values if turned != bool(options.get("transB", 0)) else values.T

    def _root(self, name: str) -> str:
        """The constant that a chain of `Identity` nodes stands for; equal weights are exported once."""
        root = name
        while root in self.same:
            root = self.same[root]
        return root if root in self.constants else name

    def _values(self, name: str) -> Array | None:
        found = self.constants.get(name)
        return None if found is None else numpy_helper.to_array(found)

    def _is_table(self, node: NodeProto) -> bool:
        values = self._values(node.input[0])
        positions = any(word in node.input[0] for word in ("wpe", "position"))
        return values is not None and _is_matrix(values) and len(values) >= self.vocab_size and not positions

    def _product(self, node: NodeProto, weight: Array) -> list[NodeProto]:
        site = self._site(node, weight)
        bias = "".join(node.input[2:])
        y = f"{site}.y.{node.output[0]}" if bias else node.output[0]
        operands = self._operands(site, weight)
        if "w" in operands:
            made = [helper.make_node("FusedMatMul", [node.input[0], operands["w"]], [y], domain=CONTRIB, transB=1)]
        else:
            made = [
                helper.make_node(
                    "MatMulNBits", [node.input[0], operands["q"], operands["scale"]], [y], domain=CONTRIB,
                    K=weight.shape[1], N=weight.shape[0], bits=self._width(site),
                    block_size=BLOCK, accuracy_level=FAST_ACTIVATIONS,
                )
            ]  # fmt: skip
        return made + ([helper.make_node("Add", [y, bias], [node.output[0]])] if bias else [])

    def _site(self, node: NodeProto, weight: Array) -> str:
        """A name for the matrix: the layer and path of the node, 'embeddings' for a head that is the table."""
        if len(weight) == self.vocab_size and any(
            table.shape == weight.shape and np.array_equal(table, weight) for table in self.tables.values()
        ):
            return "embeddings"
        path = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        found = _LAYER.search(f"/{node.name}")
        site = f"layers.{found[1]}.{path}" if found else f"head.{path or 'matrix'}"
        if self.sites.setdefault(site, node.input[1]) != node.input[1]:  # a module with several matrices of its own
            site += f".{node.name.rpartition('/')[2]}"
        return site

    def _operands(self, site: str, weight: Array) -> dict[str, str]:
        """Store the matrix, if it is not yet, and return its tensors' names by suffix."""
        bits = self._width(site)
        if not any(f"{site}.{suffix}" in self.tensors for suffix in ("w", "q")):
            parts = (
                {"w": np.ascontiguousarray(weight)} if bits is None else symmetric(np.ascontiguousarray(weight), bits)
            )
            self.tensors |= {f"{site}.{suffix}": value for suffix, value in parts.items()}
        return {s: f"{site}.{s}" for s in ("w", "q", "scale") if f"{site}.{s}" in self.tensors}

    def _width(self, site: str) -> int | None:
        """Bits of a weight; head and embeddings have at least eight: four cost a small model too much."""
        return self.bits if self.bits is None or site.startswith("layers.") else BYTE

    def _lookup(self, node: NodeProto) -> list[NodeProto]:
        """Look rows of the table up, dequantising them."""
        table = self._values(node.input[0])
        assert table is not None  # noqa: S101 - `_is_table` has just seen it
        self.tables[node.input[0]] = table
        if table.shape[1] % BLOCK:
            self.tensors["embeddings.w"] = table
            return [helper.make_node("Gather", ["embeddings.w", node.input[1]], [node.output[0]])]
        operands, ids, y = self._operands("embeddings", table), node.input[1], node.output[0]
        if "w" in operands:
            return [helper.make_node("Gather", [operands["w"], ids], [y])]
        return [
            helper.make_node("Gather", [operands["q"], ids], ["table.codes"]),
            helper.make_node("Gather", [operands["scale"], ids], ["table.scale"]),
            helper.make_node("Cast", ["table.codes"], ["table.numbers"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["table.numbers", self._constant("table.zero", np.float32(128))], ["table.signed"]),
            helper.make_node(
                "Unsqueeze", ["table.scale", self._constant("table.last", np.array([-1]))], ["table.scales"]
            ),
            helper.make_node("Mul", ["table.signed", "table.scales"], ["table.blocks"]),
            helper.make_node("Reshape", ["table.blocks", self._constant("table.dims", np.array([0, 0, -1]))], [y]),
        ]

    def _constant(self, name: str, value: Any) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _drop_unused(self) -> None:
        """Leave out nodes and constants that nobody reads any more."""
        graph = self.model.graph
        wanted = {output.name for output in graph.output}
        kept: list[NodeProto] = []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                kept.append(node)
                wanted |= {name for name in node.input if name} | set(_inner_reads(node))
        self.nodes = kept[::-1]
        initializers = [i for i in graph.initializer if i.name in wanted]
        del graph.initializer[:]
        graph.initializer.extend(initializers)

    def _take_out(self) -> None:
        """Move what is left of the weights (norms, biases, positions) out of the graph and declare all tensors."""
        graph = self.model.graph
        readers: dict[str, str] = {}
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, node.name)
        new_names = {}
        stay = []
        for proto in graph.initializer:
            values = numpy_helper.to_array(proto)
            if values.dtype != np.float32 or values.size < _SMALLEST:
                stay.append(proto)
                continue
            new_names[proto.name] = name = _vector_name(proto.name, readers.get(proto.name, ""))
            self.tensors[name] = values
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = new_names.get(name, name)
        del graph.initializer[:]
        graph.initializer.extend([*stay, *(_external(name, value) for name, value in self.tensors.items())])

    def _rename(self) -> None:
        """Name the memory's inputs and outputs as our own graphs do."""
        graph = self.model.graph
        names = {value.name: _memory_name(value.name) for value in [*graph.input, *graph.output]}
        for value in [*graph.input, *graph.output]:
            value.name = names[value.name]
        for node in graph.node:
            for names_of in (node.input, node.output):
                for index, name in enumerate(names_of):
                    names_of[index] = names.get(name, name)


def _is_matrix(values: Array) -> bool:
    return values.ndim == MATRIX_AXES and values.dtype == np.float32


def _swaps(node: NodeProto) -> bool:
    return any(list(a.ints) == [1, 0] for a in node.attribute if a.name == "perm")


def _inner_reads(node: NodeProto) -> Sequence[str]:
    """What the branches of an `If` or `Loop` read."""
    graphs = [a.g for a in node.attribute if a.HasField("g")]
    return [name for graph in graphs for inner in graph.node for name in [*inner.input, *_inner_reads(inner)]]


def _vector_name(name: str, reader: str) -> str:
    found = _LAYER.search(f"/{name}") or _LAYER.search(f"/{reader}")
    group = f"layers.{found[1]}" if found else "embeddings" if "emb" in name or "wpe" in name else "head"
    return f"{group}.{name.replace('::', '.').replace('/', '.').strip('.')}"


def _external(name: str, value: Array) -> TensorProto:
    kind = TensorProto.UINT8 if value.dtype == np.uint8 else TensorProto.FLOAT
    proto = TensorProto(name=name, data_type=kind, dims=value.shape)
    proto.data_location = TensorProto.EXTERNAL
    proto.external_data.add(key="location", value=file_of(name))
    return proto


def _memory_name(name: str) -> str:
    found = _MEMORY.fullmatch(name)
    return f"{found[1]}_{found[3]}.{found[2]}" if found else name


def _slice_before_head(model: ModelProto) -> None:
    """Let the head read the last position only."""
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    node = makers.get("logits")
    while node is not None and node.op_type not in {"FusedMatMul", "MatMulNBits", "MatMul", "Gemm"}:
        node = makers.get(node.input[0])
    if node is None:
        raise SourceError("the exported graph's logits come from no product; its head cannot be found")
    ends = {"last.from": -1, "last.to": 2**31 - 1, "last.axis": 1}
    graph.initializer.extend(numpy_helper.from_array(np.array([v]), name) for name, v in ends.items())
    last = helper.make_node("Slice", [node.input[0], *ends], ["last_hidden"], name="last")
    at = next(index for index, other in enumerate(graph.node) if other is node or other.output[0] == node.output[0])
    graph.node[at].input[0] = "last_hidden"
    graph.node.insert(at, last)
    for output in graph.output:
        if output.name == "logits":
            output.type.tensor_type.shape.dim[1].Clear()
