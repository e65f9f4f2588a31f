"""What a bench wants of a bundle that runs for it alone; the command line knows how to start one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Variant:
    """A function to start: which one of stack.yml, and what of its environment is changed."""

    of: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """A bundle that is ready: each function's own address (no gateway between) and process group, by name."""

    urls: Mapping[str, str]
    groups: Mapping[str, int]


@dataclass(frozen=True)
class Scaling:
    """A function to run as many times as the scaler says, what it holds, and where that is recorded."""

    function: str
    slo_s: float
    percentile: float
    minimum: int
    maximum: int
    record: Path


Start = Callable[[Mapping[str, Variant]], AbstractContextManager[Running]]
"""Runs the named variants, and no other function, for the length of a `with` block."""
Autoscaled = Callable[[Mapping[str, Variant], Scaling], AbstractContextManager[str]]
"""Runs the named variants behind a gateway, one of them under the autoscaler; gives the gateway's address."""
