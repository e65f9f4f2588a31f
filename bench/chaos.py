"""`bench chaos`: one tier at a time is broken, in one way at a time.

Is every request answered, in time, and does the reply say what happened?
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import count, product
from typing import Any

from bench.bundle import Start, Variant
from bench.client import Client, Reply
from bench.errors import BenchError, ServiceError
from bench.faults import NO_FAULTS, FaultProxy, Faults
from bench.metrics import percentile
from bench.queries import Query
from bench.slow_tiers import TIERS, Site, Stage, staged

GRACE_MS = 10.0
"""How much later than its deadline an answer may come: what the issue allows."""
IN_TIME, AMPLIFICATION = 0.999, 1.2  # the other bounds of the issue
_DISPATCHER = "dispatcher"
_CLIENT_TIMEOUT_S = 30.0
_RECOVERY_S = 30.0
REJECTIONS = frozenset({429, 503})
_FALLBACKS = frozenset({"canned", "rules", "cache"})


# ---- faults ----


@contextmanager
def _stopped(proxy: FaultProxy, _group: int, _deadline_ms: float) -> Iterator[None]:
    proxy.stop()
    try:
        yield
    finally:
        proxy.resume()


@contextmanager
def _stalled(_proxy: FaultProxy, group: int, _deadline_ms: float) -> Iterator[None]:
    if group <= 0:  # 0 would be our own
        raise BenchError("the tier has no process group of its own that could be stopped")
    os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(group, signal.SIGCONT)


def _misbehaving(faults_for: Callable[[float], Faults]) -> Callable[[FaultProxy, int, float], Any]:
    @contextmanager
    def misbehave(proxy: FaultProxy, _group: int, deadline_ms: float) -> Iterator[None]:
        proxy.set(up=NO_FAULTS, down=faults_for(deadline_ms))
        try:
            yield
        finally:
            proxy.set(NO_FAULTS)

    return misbehave


KINDS: Mapping[str, Callable[[FaultProxy, int, float], Any]] = {
    "stopped": _stopped,
    "stalled": _stalled,
    "slow": _misbehaving(lambda deadline_ms: Faults(latency_ms=2 * deadline_ms)),
    "resetting": _misbehaving(lambda _: Faults(reset_after_bytes=0)),
    "garbage": _misbehaving(lambda _: Faults(corrupt_share=0.3)),
}
"""Stopped: connections are refused; stalled: SIGSTOP; slow: answers come after the deadline; resetting: at the first
byte of an answer; garbage: three bytes in ten have another value."""


# ---- what came of it ----


@dataclass(frozen=True)
class Shot:
    """One request: its reply, or the status of its refusal (0: no answer at all)."""

    latency_ms: float
    reply: Reply | None = None
    status: int = 200

    @property
    def admitted(self) -> bool:
        """False for one that was refused before any work was done for it."""
        return self.status not in REJECTIONS


def untruth(target: str, reply: Reply) -> str:
    """What a reply claims that cannot be so while `target` is broken ('' for neither tier); '' if all is true."""
    unsure = reply.threshold is not None and (reply.confidence or 0.0) < reply.threshold
    blames = reply.reason == "deadline" or (bool(target) and reply.reason.startswith(f"{target}_"))
    if target and reply.source == target:
        return f"names the {target}, which was broken, as its source"
    if reply.source in _FALLBACKS and not reply.degraded:
        return f"is a fallback ({reply.source}) that is not flagged"
    if reply.degraded and not blames:
        return f"is flagged for '{reply.reason}', which is not what happened"
    if not reply.degraded and reply.source == "device" and unsure:
        return "is an unsure answer of the device that is not flagged"
    return ""


@dataclass(frozen=True)
class Case:
    """What a fault did. Shares lie in 0…1; times in milliseconds; `lies` counts what `untruth` found.

    `amplification`: requests that reached the broken tier's proxy, per request sent; connections that are refused
    cannot be counted. `local_only_bytes`: what left for the edge while requests were sent that must not leave.
    """

    name: str
    sent: int
    admitted: int
    answered: float
    in_time: float
    p50_ms: float | None
    p99_ms: float | None
    worst_late_ms: float | None
    truthful: float
    lies: Mapping[str, int]
    sources: Mapping[str, int]
    reasons: Mapping[str, int]
    statuses: Mapping[str, int]
    amplification: float
    local_only_bytes: int
    recovered_s: float | None

    @property
    def failings(self) -> list[str]:
        """Which of the issue's bounds it does not keep to."""
        holds = {
            "answered": self.answered == 1,
            "in_time": self.in_time >= IN_TIME,
            "truthful": self.truthful == 1,
            "amplification": self.amplification <= AMPLIFICATION,
            "local_only": self.local_only_bytes == 0,
            "recovered": self.recovered_s is not None,
        }
        return [name for name, kept in holds.items() if not kept]


@dataclass(frozen=True)
class Around:
    """What else is known of a case: how often the broken tier was reached, what left, when all was well again."""

    reached: int = 0
    local_only_bytes: int = 0
    recovered_s: float | None = 0.0


def case(name: str, target: str, shots: Sequence[Shot], deadline_ms: float, around: Around) -> Case:
    """Sum up what came of one fault."""
    admitted = [s for s in shots if s.admitted]
    replies = [s.reply for s in admitted if s.reply is not None]
    lies = Counter(said for reply in replies if (said := untruth(target, reply)))
    latencies = [s.latency_ms for s in admitted]
    n = len(admitted)
    return Case(
        name=name,
        sent=len(shots),
        admitted=n,
        answered=len(replies) / n if n else 0.0,
        in_time=sum(s.reply is not None and s.latency_ms <= deadline_ms + GRACE_MS for s in admitted) / n if n else 0.0,
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        worst_late_ms=max(latencies) - deadline_ms if latencies else None,
        truthful=1 - lies.total() / len(replies) if replies else 0.0,
        lies=dict(lies),
        sources=dict(Counter(reply.source for reply in replies)),
        reasons=dict(Counter(reply.reason for reply in replies)),
        statuses=dict(Counter(str(s.status) for s in shots if s.reply is None)),
        amplification=around.reached / len(shots) if shots else 0.0,
        local_only_bytes=around.local_only_bytes,
        recovered_s=around.recovered_s,
    )


# ---- the runs ----


@dataclass(frozen=True)
class Plan:
    """How much to send: `requests` a fault from `callers` at a time, a part of them `local_only` before."""

    requests: int = 200
    callers: int = 2
    deadline_ms: float = 250.0
    local_only: int = 20


def cases(
    start: Start,
    site: Site,
    queries: Sequence[Query],
    plan: Plan,
    kinds: Sequence[str] = tuple(KINDS),
    report: Callable[[float, float, str], None] = lambda _done, _total, _text: None,
) -> list[Case]:
    """Break each tier in each way, one after the other, each time waiting until all is well again.

    Raises `BenchError` if the bundle does not answer while nothing is broken.
    """
    with ExitStack() as opened:
        stage = opened.enter_context(staged(start, site, {_DISPATCHER: Variant(_DISPATCHER)}))
        client = opened.enter_context(Client(stage.running.urls[_DISPATCHER], timeout_s=_CLIENT_TIMEOUT_S))
        for tier in TIERS:
            if recovered(client, queries, tier) is None:
                raise BenchError(f"the {tier} tier does not answer, and nothing was broken yet")
        found = [case("none", "", _send(client, queries, plan), plan.deadline_ms, Around())]
        breaks = list(product(TIERS, kinds))
        for number, (target, kind) in enumerate(breaks):
            report(number, len(breaks), f"{target} {kind}")
            found.append(_break(stage, client, target, kind, queries, plan))
    return found


def _break(stage: Stage, client: Client, target: str, kind: str, queries: Sequence[Query], plan: Plan) -> Case:
    proxy, edge = stage.proxies[target], stage.proxies["edge"]
    with KINDS[kind](proxy, stage.running.groups.get(target, 0), plan.deadline_ms):
        left = edge.traffic
        _send(client, queries, Plan(plan.local_only, plan.callers, plan.deadline_ms), local_only=True)
        local_only_bytes = edge.traffic.since(left).sent_bytes
        reached = proxy.traffic
        shots = _send(client, queries, plan)
        came = proxy.traffic.since(reached).requests
    around = Around(came, local_only_bytes, recovered(client, queries, target))
    return case(f"{target} {kind}", target, shots, plan.deadline_ms, around)


def _send(client: Client, queries: Sequence[Query], plan: Plan, *, local_only: bool = False) -> list[Shot]:
    """Closed loop, one connection a caller."""
    numbers, lock, shots = count(), threading.Lock(), list[Shot]()

    def caller() -> None:
        while True:
            with lock:
                number = next(numbers)
            if number >= plan.requests:
                return
            shots.append(shoot(client, queries[number % len(queries)], plan.deadline_ms, local_only=local_only))

    with ThreadPoolExecutor(plan.callers) as pool:
        for future in [pool.submit(caller) for _ in range(plan.callers)]:
            future.result()
    return shots


def shoot(client: Client, query: Query, deadline_ms: float, *, model: str = "auto", local_only: bool = False) -> Shot:
    """Ask once; a refusal is a shot too."""
    began = time.perf_counter()
    try:
        reply = client.ask(query.skill, query.text, model, deadline_ms=deadline_ms, local_only=local_only)
    except ServiceError as error:
        return Shot(1e3 * (time.perf_counter() - began), None, error.status or 0)
    return Shot(reply.latency_ms, reply)


def recovered(client: Client, queries: Sequence[Query], tier: str) -> float | None:
    """Seconds until the tier itself answers again, three times running; None if it does not."""
    began, well = time.monotonic(), 0
    while (took_s := time.monotonic() - began) < _RECOVERY_S:
        try:
            reply = client.ask(queries[0].skill, queries[0].text, tier, deadline_ms=1e3 * _RECOVERY_S)
        except ServiceError:
            reply = None
        well = well + 1 if reply is not None and reply.source == tier else 0
        if well == 3:  # noqa: PLR2004
            return took_s
        time.sleep(0 if well else 0.1)
    return None


def as_dict(found: Sequence[Case]) -> dict[str, Any]:
    """JSON-ready figures with their verdict."""
    failings = {c.name: c.failings for c in found if c.failings}
    cases_ = [{**asdict(c), "failings": c.failings} for c in found]
    return {"cases": cases_, "verdict": {"failings": failings, "passed": not failings}}
