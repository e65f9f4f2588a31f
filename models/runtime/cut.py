"""Cut a segment's graph between two of its layers, when a shard opens it; the two parts compute what the whole does.

Between layers the graph adds a layer's result to the residual stream and normalises the sum for the next layer, in one
operator. A part that ends there hands on the plain sum, `carried`, for which it needs nothing of the next layer; the
part that goes on from it normalises it, by the same operator, to which nothing is added: another one that normalises
sums in another order, and the last bits would differ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from onnx import ModelProto, helper

from models.artifact.names import Span
from models.errors import ArtifactError

_ADD_AND_NORM = "SkipSimplifiedLayerNormalization"


def cut(graph: bytes, span: Span, layers: range) -> bytes:
    """Return the part of a span's graph that runs some of its layers; raises `ArtifactError` for a foreign graph."""
    model = ModelProto()
    model.ParseFromString(graph)
    nodes = list(model.graph.node)
    wanted = {f"present_{kind}.{layer}" for layer in layers for kind in ("key", "value")}
    if layers.start > span.first:
        nodes = _begun(nodes, layers.start)
    if layers.stop < span.stop:
        nodes = _ended(nodes, layers.stop)
        wanted.add("carried")
    else:
        wanted |= {output.name for output in model.graph.output if not output.name.startswith("present_")}
    _keep(model, needed(nodes, wanted), wanted)
    if layers.stop < span.stop:
        model.graph.output.append(_like(model.graph.input, "x", "carried"))
    return bytes(model.SerializeToString())


def _joint(nodes: Iterable[Any], layer: int) -> Any:
    """The node between layer - 1 and layer."""
    total = f"layers.{layer - 1}.mlp.sum"
    found = next((node for node in nodes if node.op_type == _ADD_AND_NORM and node.output[3:] == [total]), None)
    if found is None:
        raise ArtifactError(f"the graph cannot be cut before layer {layer}; build the artifact again, as '--via own'")
    return found


def _begun(nodes: list[Any], layer: int) -> list[Any]:
    """Let the graph begin with what the layers before it hand on."""
    joint = _joint(nodes, layer)
    total = joint.output[3]
    nothing = helper.make_node("Sub", ["x", "x"], ["nothing"])
    norm = type(joint).FromString(joint.SerializeToString())
    norm.input[:2] = ["x", "nothing"]
    del norm.output[1:]
    rest = [node for node in nodes if node is not joint]
    for node in rest:
        node.input[:] = ["x" if name == total else name for name in node.input]
    return [nothing, norm, *rest]


def _ended(nodes: list[Any], layer: int) -> list[Any]:
    """Let the graph end with the sum that a layer is handed."""
    joint = _joint(nodes, layer)
    total = helper.make_node("Add", [joint.input[0], joint.input[1]], ["carried"])
    return [total if node is joint else node for node in nodes if "carried" not in node.output or node is joint]


def needed(nodes: list[Any], wanted: Collection[str]) -> list[Any]:
    """Of the nodes, in their order, those that some value wanted depends on."""
    missing, kept = set(wanted), []
    for node in reversed(nodes):
        if missing.intersection(filter(None, node.output)):
            missing.update(filter(None, node.input))
            kept.append(node)
    return kept[::-1]


def _keep(model: ModelProto, nodes: list[Any], outputs: Collection[str]) -> None:
    """Let the model have these nodes, and of all else what they use."""
    used = {name for node in nodes for name in node.input}
    graph = model.graph
    parts = {
        "node": nodes,
        "initializer": [value for value in graph.initializer if value.name in used],
        "input": [value for value in graph.input if value.name in used],
        "output": [value for value in graph.output if value.name in outputs],
    }
    for name, values in parts.items():
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        field = getattr(graph, name)
        del field[:]
        field.extend(copies)


def _like(values: Iterable[Any], name: str, new: str) -> Any:
    """A value's declaration under another name."""
    found = next(value for value in values if value.name == name)
    copy = type(found).FromString(found.SerializeToString())
    copy.name = new
    return copy
