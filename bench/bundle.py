"""What a bench wants of a bundle that runs for it alone; the command line knows how to start one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # `--help` loads no numpy
    from scaler.placement.rebalance import Decision, Policy
    from scaler.placement.values import Plan, Problem


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


StartSite = Callable[[str, Mapping[str, str]], AbstractContextManager[str]]
"""Runs one site of stack.yml, `device` or `edge` (empty: all), with variables for it; gives its gateway's address."""
Service = StartSite
"""Finds the bundle at an address (empty: the local one), or runs one, which gets the variables; gives its address."""


class Restarts(Protocol):
    """A bundle whose functions reach each other through its gateway, and can be replaced one by one."""

    @property
    def url(self) -> str:
        """The gateway's address."""

    @property
    def names(self) -> Sequence[str]:
        """Its functions."""

    def restart(self, name: str) -> int:
        """Start a replica, wait until it is ready, SIGTERM the old one; the status that one ended with."""


StartWhole = Callable[[], AbstractContextManager[Restarts]]
"""Runs all of stack.yml."""


@dataclass(frozen=True)
class Placing:
    """A tier to cut over nodes by a plan: what the plan is for, when it is made anew, how slow nodes are.

    `environment` is what each shard is told besides; `told` hears of each decision.
    """

    problem: Problem
    policy: Policy
    slowdown: Mapping[str, float]
    environment: Mapping[str, str]
    told: Callable[[Decision], None]


class Placed(Protocol):
    """A tier at work where a plan has it, under the rebalancer."""

    @property
    def url(self) -> str:
        """The tier's address, whoever answers there."""

    @property
    def plan(self) -> Plan:
        """The one in force."""

    def throttle(self, node: str, factor: float) -> None:
        """Make a node so many times slower than this machine."""

    def kill(self, node: str) -> int:
        """End a node's processes without a word; how many there were."""


StartPlaced = Callable[[Placing], AbstractContextManager[Placed]]
"""Runs a tier under the rebalancer, and nothing else."""
