"""`bench leaks`: what shards still hold after many requests, a part of whose callers left in the middle of an answer.

Sessions and file descriptors must be as many as before. Threads and resident memory are stated: pools fill as needed.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from bench.bundle import Start
from bench.client import Client
from bench.errors import ServiceError
from bench.processes import of_groups
from bench.sharded import HEAD, Troupe, balanced_cut, ports_for, shards

QUESTION = "Name three things that I can cook with rice."
_SETTLE_S, _POLL_S = 20.0, 0.5


@dataclass(frozen=True)
class Plan:
    """Every `leave_each`th caller leaves after the first piece; the first `warm_up` requests do not count."""

    tier: Path
    shards: int = 2
    requests: int = 10_000
    callers: int = 4
    leave_each: int = 3
    tokens: int = 3
    warm_up: int = 200
    threads: int = 1


@dataclass(frozen=True)
class Held:
    """What all processes of the shards hold together; sessions, those of shards behind the head."""

    files: int
    threads: int
    sessions: int
    resident_bytes: int

    @property
    def bounded(self) -> tuple[int, int]:
        """What must not grow."""
        return self.files, self.sessions


@dataclass(frozen=True)
class Figures:
    """`refused`: requests that failed, which the bench does not expect."""

    answered: int
    left: int
    refused: int
    before: Held
    after: Held

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, with the verdict."""
        leaked = any(a > b for a, b in zip(self.after.bounded, self.before.bounded, strict=True))
        return {**asdict(self), "verdict": {"no_leak": not leaked, "no_failure": self.refused == 0}}


def measure(start: Start, plan: Plan, report: Callable[[int, int, str], None]) -> Figures:
    """Ask; raises `BenchError` if the shards do not start."""
    cut = balanced_cut(plan.tier, plan.shards)
    cast = shards(cut, 1, plan.tier, ports_for(cut, 1), {"THREADS": str(plan.threads)})
    with Troupe(start, cast) as troupe:
        url = troupe.url(next(shard for shard in cast if shard.part == HEAD))
        _ask_all(url, plan, range(plan.warm_up), lambda _done: None)
        before = _held(troupe)
        ends = _ask_all(url, plan, range(plan.requests), lambda done: report(done, plan.requests, "asking"))
        after = _settled(troupe, before)
    return Figures(ends["answered"], ends["left"], ends["refused"], before, after)


def _ask_all(url: str, plan: Plan, numbers: Sequence[int], report: Callable[[int], None]) -> Mapping[str, int]:
    """Let the callers share the requests; how each ended, counted."""
    ends: Counter[str] = Counter()
    lock = Lock()

    def ask(mine: Sequence[int]) -> None:
        with Client(url) as client:
            for number in mine:
                end = _ask(client, plan, leaves=number % plan.leave_each == 0)
                with lock:
                    ends[end] += 1
                    report(ends.total())

    with ThreadPoolExecutor(plan.callers) as pool:
        list(pool.map(ask, (numbers[caller :: plan.callers] for caller in range(plan.callers))))
    return ends


def _ask(client: Client, plan: Plan, *, leaves: bool) -> str:
    """One request; a caller who leaves closes the connection in the middle of the answer."""
    said = client.stream("chat", [{"role": "user", "content": QUESTION}], max_tokens=plan.tokens)
    try:
        with closing(said):
            for _ in islice(said, 1) if leaves else said:
                pass
    except ServiceError:
        return "refused"
    return "left" if leaves else "answered"


def _settled(troupe: Troupe, before: Held) -> Held:
    """What is held once it is no more than before; after a while, what there is."""
    ends = time.monotonic() + _SETTLE_S
    while True:
        now = _held(troupe)
        if time.monotonic() > ends or all(a <= b for a, b in zip(now.bounded, before.bounded, strict=True)):
            return now
        time.sleep(_POLL_S)


def _held(troupe: Troupe) -> Held:
    found = list(of_groups(troupe.groups))
    return Held(
        sum(_entries(process / "fd") for process in found),
        sum(_entries(process / "task") for process in found),
        troupe.sessions(),
        sum(_resident_bytes(process) for process in found),
    )


def _entries(folder: Path) -> int:
    with suppress(OSError):
        return sum(1 for _ in folder.iterdir())
    return 0


def _resident_bytes(process: Path) -> int:
    with suppress(OSError):
        return int((process / "statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
