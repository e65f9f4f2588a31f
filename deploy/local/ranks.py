"""A function split among ranks, each a process: which rank each of them is, and how rank 0 finds the others. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from deploy.errors import StackError
from deploy.local.shards import CUTTABLE
from deploy.stack import Stack

_WISH = re.compile(r"(?P<name>[a-z][a-z0-9-]*)=(?P<count>[2-9]|[1-5]\d|6[0-4])")


def parse_ranks(text: str) -> tuple[str, int]:
    """Read `edge=2`: a function's name, and how many ranks; raises `StackError`."""
    found = _WISH.fullmatch(text)
    if not found:
        raise StackError(f"'{text}' does not say how many ranks of what; write edge=2 (2 to 64)")
    return found["name"], int(found["count"])


def ranked(stack: Stack, name: str, ports: Sequence[int]) -> Stack:
    """The stack with one function in ranks; rank 0 keeps its name, `ports` are where the others listen for it."""
    if CUTTABLE not in stack.only((name,)).functions[name].fprocess:
        raise StackError(f"'{name}' cannot be split; the edge tier can")
    count = len(ports) + 1
    peers = ",".join(f"127.0.0.1:{port}" for port in ports)
    variants: dict[str, tuple[str, Mapping[str, str]]] = {other: (other, {}) for other in stack.functions}
    variants[name] = name, {"SHARD_ID": f"rank-0-of-{count}", "TENSOR_RANK": f"0/{count}", "TENSOR_PEERS": peers}
    for number, port in enumerate(ports, 1):
        own = {
            "SHARD_ID": f"rank-{number}-of-{count}",
            "TENSOR_RANK": f"{number}/{count}",
            "SHARD_LISTEN": str(port),
        }
        variants[f"{name}-rank-{number}"] = name, own
    return stack.varied(variants)
