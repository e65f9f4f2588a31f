"""`bench rolling`: every function is replaced in turn while requests arrive.

Does one of them fail?
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from bench.bundle import StartWhole
from bench.chaos import Shot, recovered, shoot
from bench.client import Client
from bench.errors import BenchError
from bench.metrics import percentile
from bench.queries import Query
from bench.steady import Timed, steadily

_TIMEOUT_S = 70.0
_DISPATCHER = ""
_FEDERATION = "/function/federation"
_WAYS = (*[(_DISPATCHER, "auto")] * 5, (_DISPATCHER, "edge"), *[(_FEDERATION, "auto")] * 2)
"""Who is asked for which model, in turn, so that each function has work."""


@dataclass(frozen=True)
class Plan:
    """Requests a second, how long they arrive before and after each restart, and the deadline that they carry."""

    rate: float = 20.0
    pause_s: float = 2.0
    deadline_ms: float = 5000.0


@dataclass(frozen=True)
class Restart:
    """One function's turn, in seconds since the first request; `status`: what the old replica ended with."""

    name: str
    began_s: float
    took_s: float
    status: int


@dataclass(frozen=True)
class Outcome:
    """Failed: no answer, or a status that is none; flagged: answered by less than the bundle has."""

    restarts: Sequence[Restart]
    sent: int
    failed: int
    statuses: Mapping[str, int]
    flagged: int
    reasons: Mapping[str, int]
    sources: Mapping[str, int]
    p50_ms: float | None
    p99_ms: float | None

    @property
    def failings(self) -> list[str]:
        """What of the issue's demands does not hold."""
        holds = {
            "no request fails": self.sent > 0 and not self.failed,
            "every old replica ends with 0": bool(self.restarts) and not any(r.status for r in self.restarts),
        }
        return [what for what, holding in holds.items() if not holding]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready figures with their verdict."""
        failings = self.failings
        return {**asdict(self), "verdict": {"failings": failings, "passed": not failings}}


def run(
    start: StartWhole,
    queries: Sequence[Query],
    plan: Plan,
    report: Callable[[float, float, str], None] = lambda _done, _total, _text: None,
) -> Outcome:
    """Replace every function once; raises `BenchError` if the bundle does not answer to begin with."""
    with start() as bundle, ExitStack() as opened:
        clients = {path: opened.enter_context(Client(bundle.url + path, timeout_s=_TIMEOUT_S)) for path in dict(_WAYS)}
        for tier in ("device", "edge"):
            if recovered(clients[_DISPATCHER], queries, tier) is None:
                raise BenchError(f"the {tier} tier does not answer, and nothing was restarted yet")

        def ask(number: int) -> Shot:
            path, model = _WAYS[number % len(_WAYS)]
            return shoot(clients[path], queries[number % len(queries)], plan.deadline_ms, model=model)

        began, restarts = time.monotonic(), list[Restart]()
        with steadily(ask, plan.rate) as steady:
            for number, name in enumerate(bundle.names):
                report(number, len(bundle.names), name)
                time.sleep(plan.pause_s)
                since = time.monotonic()
                status = bundle.restart(name)
                restarts.append(Restart(name, since - began, time.monotonic() - since, status))
            time.sleep(plan.pause_s)
    return summed(steady.timed, restarts)


def summed(timed: Sequence[Timed], restarts: Sequence[Restart]) -> Outcome:
    """Sum all requests up."""
    shots = [t.shot for t in timed]
    replies = [shot.reply for shot in shots if shot.reply is not None]
    latencies = [shot.latency_ms for shot in shots]
    return Outcome(
        restarts=restarts,
        sent=len(shots),
        failed=len(shots) - len(replies),
        statuses=dict(Counter(str(shot.status) for shot in shots if shot.reply is None)),
        flagged=sum(reply.degraded for reply in replies),
        reasons=dict(Counter(reply.reason for reply in replies if reply.degraded)),
        sources=dict(Counter(reply.source for reply in replies)),
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
    )
