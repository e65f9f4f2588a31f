"""A function cut over several processes: which layers each of them runs, and how they find each other. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from deploy.errors import StackError
from deploy.stack import Stack

_WISH = re.compile(r"(?P<name>[a-z][a-z0-9-]*)=(?:(?P<count>\d{1,3})|(?P<cuts>\d+-\d+(?:,\d+-\d+)+))")


CUTTABLE = "functions.edge."
"""What the command of a function that can be cut holds."""


def parse_wish(text: str) -> tuple[str, str]:
    """Read `edge=2` or `edge=0-7,8-29`: a function's name, and how to cut it; raises `StackError`."""
    found = _WISH.fullmatch(text)
    if not found:
        raise StackError(f"'{text}' does not say how to cut what; write edge=2, or edge=0-7,8-29")
    return found["name"], found["count"] or found["cuts"]


def ranges(cut: str, n_layers: int) -> list[range]:
    """The layers of each shard, of a number of shards or of the cut itself; raises `StackError`."""
    if cut.isdecimal():
        return evenly(n_layers, int(cut))
    ends = [tuple(map(int, part.split("-"))) for part in cut.split(",")]
    found = [range(first, last + 1) for first, last in ends]
    if [layer for part in found for layer in part] != list(range(n_layers)) or not all(found):
        raise StackError(f"'{cut}' must name each of the layers 0 to {n_layers - 1} once, in order")
    return found


def evenly(n_layers: int, count: int) -> list[range]:
    """Cut layers into `count` runs whose lengths differ by one at most; raises `StackError`."""
    if not 0 < count <= n_layers:
        raise StackError(f"{n_layers} layers cannot be cut into {count} shards")
    edges = [n_layers * n // count for n in range(count + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def sharded(stack: Stack, name: str, parts: Sequence[range], ports: Sequence[int]) -> Stack:
    """The stack with one function cut; the head keeps its name, `ports` are where the others listen for links."""
    if CUTTABLE not in stack.functions[name].fprocess:
        raise StackError(f"'{name}' cannot be cut; the edge tier can")
    if len(parts) == 1:
        return stack
    variants: dict[str, tuple[str, Mapping[str, str]]] = {other: (other, {}) for other in stack.functions}
    for number, layers in enumerate(parts):
        span = f"{layers.start}-{layers.stop - 1}"
        changes = {"SHARD_ID": span, "SHARD_LAYERS": span}
        if number:
            changes["SHARD_LISTEN"] = str(ports[number - 1])
        if number + 1 < len(parts):
            changes["SHARD_NEXT"] = f"127.0.0.1:{ports[number]}"
        variants[f"{name}-{span}" if number else name] = (name, changes)
    return stack.varied(variants)
