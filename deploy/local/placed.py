"""A tier's shards as processes here, where a plan has them: what the rebalancer applies its plans with.

A node is a name that processes run under, and how slow they are: a file says by how many times, which may be changed
while they run. A plan is put into force by a second chain beside the first: from the last shard to the head, each
ready before anybody is sent to it; then the gateway is told of the new head, the old one finishes what it has, and the
old chain ends. So no request meets a shard that goes. What both chains have alike is started once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from deploy.errors import StackError
from deploy.local.process import Process
from scaler.placement.errors import ApplyError
from scaler.placement.values import Plan, Stage
from scaler.placement.watch import Placed

SETTLE_S = 0.3
"""By then a request that chose its replica by the old list has been sent."""
POLL_S = 0.05


@dataclass(frozen=True)
class Part:
    """What one process is to be: some layers on a node, and the addresses of those that run the next ones.

    The tier as a whole has no `layers`.
    """

    node: str
    layers: str
    after: tuple[str, ...]
    is_head: bool

    def environment(self, port: int, slowdown: Path) -> dict[str, str]:
        """What it is told; `port` is where it listens for the part before it."""
        found = {"NODE_ID": self.node, "SLOWDOWN_FILE": str(slowdown)}
        if not self.layers:
            return found
        found |= {"SHARD_ID": self.layers, "SHARD_LAYERS": self.layers, "SHARD_SPIN": "0"}
        if self.after:
            found["SHARD_NEXT"] = ",".join(self.after)
        return found if self.is_head else {**found, "SHARD_LISTEN": str(port)}


@dataclass(frozen=True)
class Running:
    """A process, where it talks HTTP, and where it listens for the part before it."""

    part: Part
    process: Process
    address: str
    link: str


Spawn = Callable[[str, Mapping[str, str]], tuple[Process, str]]
"""Starts a process under a name with this environment besides; gives it and its address."""


@dataclass(frozen=True)
class Limits:
    """How long parts may take to get ready, and to end what they have once they are told to stop."""

    ready_s: float = 120.0
    stop_s: float = 20.0


class Chain:
    """The shards of one tier. Its methods are for one thread, which the processes are tied to.

    `listing` is the list of heads that the gateway reads; slowdowns lie beside it, a file a node.
    """

    def __init__(self, name: str, spawn: Spawn, free_port: Callable[[], int], listing: Path, limits: Limits) -> None:
        self._name, self._spawn, self._free_port = name, spawn, free_port
        self._listing, self._limits = listing, limits
        self._running: list[Running] = []
        self._started = 0

    # ---- what the rebalancer asks ----

    def apply(self, plan: Plan) -> None:
        """Run the plan, and return when requests go to it and what it replaces is gone; raises `ApplyError`.

        Where a part does not get ready, all that is new ends, and the old ones go on.
        """
        wanted: list[Running] = []
        try:
            heads = self._begin(plan, wanted)
            self._await_ready([part for part in wanted if part not in self._running])
        except BaseException:
            self._end([part for part in wanted if part not in self._running])
            raise
        self._tell(heads)
        time.sleep(SETTLE_S)
        old = [part for part in self._running if part not in wanted]
        self._running = wanted
        self._end([part for part in old if part.part.is_head])
        self._end([part for part in old if not part.part.is_head])

    def drifted(self, plan: Plan) -> bool:
        """Whether other layers run than the plan has; that a process died is not that, but silence."""
        return {(r.part.node, r.part.layers) for r in self._running} != _layers(plan)

    def shards(self) -> Sequence[Placed]:
        """All that should be there, dead ones too."""
        return [Placed(running.part.node, running.address) for running in self._running]

    # ---- what a bench does to nodes ----

    def slowdown_file(self, node: str) -> Path:
        """The file that says by how many times a node is slower than this machine."""
        return self._listing.with_name(f"slowdown-{node}")

    def kill(self, node: str) -> int:
        """End all of a node's processes without a word (SIGKILL); how many there were."""
        struck = [running.process for running in self._running if running.part.node == node]
        for process in struck:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return len(struck)

    def stop(self) -> None:
        """End everything, heads first."""
        self._end([running for running in self._running if running.part.is_head])
        self._end([running for running in self._running if not running.part.is_head])
        self._running = []

    # ---- parts ----

    def _begin(self, plan: Plan, wanted: list[Running]) -> list[Running]:
        """Start what does not run yet, from the last stage to the first, and add all to `wanted`; gives the heads."""
        after: tuple[str, ...] = ()
        found: list[Running] = []
        for stage in reversed(plan.stages):
            layers = stage.layers if len(plan.stages) > 1 else ""
            parts = [Part(node, layers, after, stage.first == 0) for node in stage.nodes]
            found = []
            for part in parts:
                found.append(self._running_as(part) or self._start(part))
                wanted.append(found[-1])
            after = tuple(running.link for running in found)
        return found

    def _running_as(self, part: Part) -> Running | None:
        """A process that is this part already, and lives."""
        alike = (r for r in self._running if r.part == part and r.process.exit_code is None)
        return next(alike, None)

    def _start(self, part: Part) -> Running:
        self._started += 1
        port = 0 if part.is_head else self._free_port()
        environment = part.environment(port, self.slowdown_file(part.node))
        name = f"{self._name}-{part.node}-{self._started}"
        process, address = self._spawn(name, environment)
        return Running(part, process, address, f"127.0.0.1:{port}")

    def _await_ready(self, parts: Sequence[Running]) -> None:
        gives_up_s = time.monotonic() + self._limits.ready_s
        with httpx.Client(trust_env=False, timeout=2.0) as client:
            for running in parts:
                while not _is_ready(client, running):
                    if running.process.exit_code is not None:
                        raise ApplyError(f"{running.process.name} ended before it was ready; see its log")
                    if time.monotonic() > gives_up_s:
                        raise ApplyError(f"{running.process.name} was not ready after {self._limits.ready_s:g} s")
                    time.sleep(POLL_S)

    def _tell(self, heads: Sequence[Running]) -> None:
        """Replace the gateway's list, at once and as a whole."""
        entries = {self._name: {"replicas": [{"address": head.address, "state": "ready"} for head in heads]}}
        draft = self._listing.with_suffix(".new")
        draft.write_text(json.dumps(entries), "utf-8")
        draft.replace(self._listing)

    def _end(self, parts: Sequence[Running]) -> None:
        for running in parts:
            running.process.ask_to_stop()
        for running in parts:
            running.process.wait(self._limits.stop_s)


def factors(texts: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Read `till=3`: a node's name, and by how many times it is slower; raises `StackError`."""
    found = {}
    for text in texts:
        name, _, factor = text.partition("=")
        if name not in names or not re.fullmatch(r"\d+(\.\d+)?", factor) or float(factor) < 1:
            raise StackError(f"'{text}' is not a node and a factor from 1 on, such as {names[0]}=3")
        found[name] = float(factor)
    return found


def _layers(plan: Plan) -> set[tuple[str, str]]:
    def layers(stage: Stage) -> str:
        return stage.layers if len(plan.stages) > 1 else ""

    return {(node, layers(stage)) for stage in plan.stages for node in stage.nodes}


def _is_ready(client: httpx.Client, running: Running) -> bool:
    with suppress(httpx.TransportError):
        return client.get(f"{running.address}/_/ready").status_code == httpx.codes.OK
    return False
