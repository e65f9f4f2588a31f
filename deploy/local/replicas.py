"""The replicas of one function as processes: started, watched until they are ready, drained before they stop."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from pathlib import Path

import httpx

from deploy.local.process import Process

READY_POLL_S = 0.1
DRAIN_AT_LEAST_S = 0.3
"""After the list was written; a request that chose its replica before is counted at it by then."""
RETRY_S = 5.0
"""A replica that ends before it was ready is not replaced before so long."""


class State(StrEnum):
    """In the order that a replica goes through them."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass
class Replica:
    """One process and where it answers; `since_s` is when it came into its state."""

    process: Process
    address: str
    since_s: float
    state: State = State.STARTING
    answers: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)


Spawn = Callable[[str], tuple[Process, str]]
"""Starts a process under a name; gives it and its address."""
Say = Callable[[str], None]


class ReplicaSet:
    """Keeps as many replicas as are wanted. Its methods are for one thread, which the processes are tied to."""

    def __init__(self, name: str, spawn: Spawn, stop_timeout_s: float, say: Say) -> None:
        self.name = name
        self.wanted = 0
        self._spawn = spawn
        self._stop_timeout_s = stop_timeout_s
        self._say = say
        self._numbers = count(1)
        self._replicas: list[Replica] = []
        self._not_before_s = 0.0

    @property
    def current(self) -> int:
        """Those that serve or will; what a Deployment calls its replicas."""
        return sum(r.state in {State.STARTING, State.READY} for r in self._replicas)

    @property
    def ready(self) -> int:
        """Those that serve."""
        return sum(r.state == State.READY for r in self._replicas)

    @property
    def empty(self) -> bool:
        """Whether no process is left."""
        return not self._replicas

    def listed(self) -> list[dict[str, str]]:
        """Address and state of each, for the list."""
        return [{"address": r.address, "state": r.state.value} for r in self._replicas if r.state != State.STOPPING]

    def step(self, now_s: float, inflight: Mapping[str, int]) -> None:
        """Notice what happened, and start or stop what is too few or too many.

        `inflight` is what the gateway has at each address.
        """
        for replica in list(self._replicas):
            self._advance(replica, now_s, inflight)
        while self.current < self.wanted and now_s >= self._not_before_s:
            self._start(now_s)
        for replica in self._surplus():
            self._enter(replica, State.DRAINING, now_s)

    def kill(self) -> None:
        """Stop all of them now, each as it finishes what it runs."""
        for replica in self._replicas:
            replica.gone.set()
            replica.process.ask_to_stop()
        for replica in self._replicas:
            replica.process.wait(self._stop_timeout_s)
        self._replicas.clear()

    def _advance(self, replica: Replica, now_s: float, inflight: Mapping[str, int]) -> None:
        age_s = now_s - replica.since_s
        if replica.process.exit_code is not None:
            self._ended(replica, now_s)
        elif replica.state == State.STARTING and replica.answers.is_set():
            self._enter(replica, State.READY, now_s)
        elif replica.state == State.DRAINING and age_s >= DRAIN_AT_LEAST_S and not inflight.get(replica.address):
            replica.process.ask_to_stop()
            self._enter(replica, State.STOPPING, now_s)
        elif replica.state == State.STOPPING and age_s >= self._stop_timeout_s:
            replica.process.wait(0.0)

    def _ended(self, replica: Replica, now_s: float) -> None:
        replica.gone.set()
        replica.process.wait(0.0)
        self._replicas.remove(replica)
        if replica.state != State.STOPPING:
            self._say(f"{replica.process.name} ended with status {replica.process.exit_code}; another takes its place")
        if replica.state == State.STARTING:
            self._not_before_s = now_s + RETRY_S

    def _start(self, now_s: float) -> None:
        process, address = self._spawn(f"{self.name}-{next(self._numbers)}")
        replica = Replica(process, address, now_s)
        self._replicas.append(replica)
        threading.Thread(target=_await_ready, args=(replica,), name=process.name, daemon=True).start()

    def _surplus(self) -> Sequence[Replica]:
        """Those that start go first, then the youngest, as a ReplicaSet does it."""
        live = [r for r in self._replicas if r.state in {State.STARTING, State.READY}]
        live.sort(key=lambda r: (r.state == State.READY, -r.since_s))
        return live[: max(0, len(live) - self.wanted)]

    def _enter(self, replica: Replica, state: State, now_s: float) -> None:
        replica.state, replica.since_s = state, now_s


def write_list(path: Path, sets: Sequence[ReplicaSet]) -> None:
    """Replace the list that gateway and scaler read, at once and as a whole."""
    text = json.dumps({one.name: {"replicas": one.listed()} for one in sets})
    draft = path.with_suffix(".new")
    draft.write_text(text, "utf-8")
    draft.replace(path)


def _await_ready(replica: Replica) -> None:
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while not replica.gone.is_set():
            try:
                if client.get(f"{replica.address}/_/ready").status_code == httpx.codes.OK:
                    replica.answers.set()
                    return
            except httpx.TransportError:
                pass
            replica.gone.wait(READY_POLL_S)
