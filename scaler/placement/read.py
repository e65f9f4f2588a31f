"""Read nodes files: YAML by hand or by `profile-node`, strictly, so that a misspelt key is refused and not passed over.

`docs/placement.md` explains the keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, Protocol

import yaml

from scaler.placement.errors import NodesFileError
from scaler.placement.values import Goal, Layer, Link, Model, Node, Problem, Rule, Workload

MIB = 2**20
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST_NODES = 1000
_REQUIRED = object()


class PartSizes(Protocol):
    """What is known of a tier's parts, in bytes, as `models.artifact.sizes` has it."""

    @property
    def layers(self) -> Sequence[int]:
        """Of each layer."""

    @property
    def first(self) -> int:
        """Of what the first layer brings along."""

    @property
    def last(self) -> int:
        """Of what the last layer brings along."""

    @property
    def shared(self) -> int:
        """Of what the two share."""

    @property
    def kv_bytes(self) -> int:
        """Of a token's keys and values in one layer."""

    @property
    def hidden_bytes(self) -> int:
        """Of a token's state between two layers."""


def problem(paths: Sequence[Path], sizes: PartSizes, model_id: str = "") -> Problem:
    """Read nodes files for a model; raises `NodesFileError`."""
    texts = {}
    for path in paths:
        try:
            texts[str(path)] = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise NodesFileError(f"{path} cannot be read; name a nodes file") from error
    return parse(texts, model(sizes), model_id)


def model(sizes: PartSizes) -> Model:
    """A tier as placement knows it, each layer as much work as any other."""
    layers = [Layer(size) for size in sizes.layers]
    return Model(layers, sizes.first, sizes.last, sizes.shared, sizes.kv_bytes, sizes.hidden_bytes)


def goal(name: str) -> Goal:
    """A goal by its name; raises `NodesFileError`."""
    if name not in {known.value for known in Goal}:
        raise NodesFileError(f"goal '{name}' is unknown; use {' or '.join(known.value for known in Goal)}")
    return Goal(name)


def parse(texts: Mapping[str, str], model: Model, model_id: str = "") -> Problem:
    """A problem from the texts of nodes files by their names, whose lists are joined; raises `NodesFileError`.

    A node that was measured with another model than `model_id` is refused.
    """
    files = [_Keys(name, "", _yaml(name, text)) for name, text in texts.items()]
    entries = [(file.name, entry) for file in files for entry in file.take("nodes", list, [])]
    nodes = [node for name, entry in entries for node in _nodes(_Keys(name, "nodes", entry), model_id)]
    if not 0 < len(nodes) <= _MOST_NODES:
        raise NodesFileError(f"{', '.join(texts)} must list 1 to {_MOST_NODES} 'nodes'; there are {len(nodes)}")
    links: dict[tuple[str, str], Link] = {}
    workload, replicas = Workload(), 1
    pins, exclusions = list[Rule](), list[Rule]()
    for file in files:
        if file.holds("links"):
            links |= _links(_Keys(file.name, "links", file.take("links", dict)), [node.name for node in nodes])
        if file.holds("workload"):
            workload = _workload(_Keys(file.name, "workload", file.take("workload", dict)))
        replicas = file.whole("replicas", replicas)
        pins += _rules(file, "pins", model.n_layers)
        exclusions += _rules(file, "exclude", model.n_layers)
        file.finish()
    if not links and len(nodes) > 1:
        raise NodesFileError(f"{', '.join(texts)} must give 'links', at least a 'default'")
    return Problem(nodes, links, model, workload, pins, exclusions, replicas)


def _yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise NodesFileError(f"{name} is not YAML: {' '.join(str(error).split())}") from error


class _Keys:
    """A mapping whose keys are taken one by one; `finish` refuses what is left."""

    def __init__(self, name: str, at: str, values: Any) -> None:
        self.name, self._at = name, at
        if not isinstance(values, dict):
            raise NodesFileError(f"{self._place()} is not a mapping")
        self._left = dict(values)

    def _place(self, key: str = "") -> str:
        inside = ".".join(filter(None, (self._at, key)))
        return f"'{inside}' in {self.name}" if inside else self.name

    def holds(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        if key not in self._left:
            if default is _REQUIRED:
                raise NodesFileError(f"{self._place()} lacks the key '{key}'")
            return default
        value = self._left.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in {bool, object}):
            raise NodesFileError(f"{self._place(key)} must be {_KINDS[kind]}")
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        if key not in self._left and default is not None:
            return default
        value = self._left.pop(key, None)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < 0 or (value == 0 and not zero):
            raise NodesFileError(f"{self._place(key)} must be a number {'from' if zero else 'above'} 0")
        return float(value)

    def whole(self, key: str, default: int) -> int:
        value = self.take(key, int, default)
        if value < 1:
            raise NodesFileError(f"{self._place(key)} must be a whole number from 1 on")
        return int(value)

    def finish(self) -> None:
        if self._left:
            raise NodesFileError(f"{self._place()} has the unknown key '{min(map(str, self._left))}'")


_KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "a mapping", object: "given"}


def _nodes(keys: _Keys, model_id: str) -> Iterable[Node]:
    """The nodes of one entry; with a `count` several alike, NAME-1 and so on."""
    name, measured = keys.take("name", str), keys.take("measured", dict, {})
    count = keys.whole("count", 0) if keys.holds("count") else 0
    node = Node(
        name,
        int(keys.number("memory_mib") * MIB),
        keys.number("decode_ms"),
        keys.number("prefill_ms"),
        keys.number("head_ms", 0.0, zero=True),
        keys.number("watts") if keys.holds("watts") else None,
    )
    keys.finish()
    other = measured.get("model", model_id)
    if model_id and other != model_id:
        raise NodesFileError(
            f"'{name}' in {keys.name} was measured with {other}, and the plan is for {model_id}; "
            "run 'edgecascade profile-node' there with that artifact"
        )
    names = [f"{name}-{i}" for i in range(1, count + 1)] or [name]
    return [Node(each, node.memory_bytes, node.decode_ms, node.prefill_ms, node.head_ms, node.watts) for each in names]


def _links(keys: _Keys, names: Sequence[str]) -> dict[tuple[str, str], Link]:
    found: dict[tuple[str, str], Link] = {}
    if keys.holds("default"):
        link = _link(_Keys(keys.name, "links.default", keys.take("default", dict)))
        found |= dict.fromkeys(permutations(names, 2), link)
    for entry in keys.take("between", list, []):
        one = _Keys(keys.name, "links.between", entry)
        ends = one.take("nodes", list)
        if len(ends) != 2 or not all(isinstance(end, str) for end in ends):  # noqa: PLR2004
            raise NodesFileError(f"'links.between.nodes' in {keys.name} must name two nodes")
        if one.take("cut", bool, default=False):
            one.finish()
            for pair in permutations(ends, 2):
                found.pop(pair, None)
        else:
            found |= dict.fromkeys(permutations(ends, 2), _link(one))
    keys.finish()
    return found


def _link(keys: _Keys) -> Link:
    link = Link(keys.number("latency_ms", zero=True), keys.number("mbit_per_s"))
    keys.finish()
    return link


def _workload(keys: _Keys) -> Workload:
    base = Workload()
    found = {name: keys.whole(name, getattr(base, name)) for name in vars(base)}
    keys.finish()
    return Workload(**found)


def _rules(file: _Keys, key: str, n_layers: int) -> list[Rule]:
    rules = []
    for entry in file.take(key, list, []):
        whole = {"node": entry, "layers": f"0-{n_layers - 1}"}
        keys = _Keys(file.name, key, whole if isinstance(entry, str) else entry)
        node, layers = keys.take("node", str), keys.take("layers", object)
        keys.finish()
        match = _RANGE.fullmatch(str(layers))
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise NodesFileError(f"'{key}.layers' in {file.name} must be a layer or a range such as 0-7")
        rules.append(Rule(node, range(int(match[1]), int(match[2] or match[1]) + 1)))
    return rules
