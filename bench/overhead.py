"""`bench overhead`: what the dispatcher costs, over asking the tier behind it directly.

Twice over: of whole replies, and of what a reply takes beside its tier's model time, which is the same work on both
ways and on a busy machine most of the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

from bench.bundle import Running
from bench.client import Client
from bench.evaluate import Asks
from bench.flood import Answer, Flood, request
from bench.load import poisson
from bench.metrics import percentile
from bench.queries import Query

TIER = "device"
DISPATCHER = "dispatcher"
WARM_UP = 20
MEDIAN_MS, P99_MS = 1.5, 3.0  # what the issue allows the dispatcher


@dataclass(frozen=True)
class Timed:
    """One reply: as the client saw it, and what of that was not the model's."""

    latency_ms: float
    beside_ms: float

    @classmethod
    def of(cls, latency_ms: float, timing_ms: Mapping[str, float]) -> Timed:
        """Take the model's time off."""
        return cls(latency_ms, latency_ms - timing_ms.get("prefill", 0.0) - timing_ms.get("decode", 0.0))


@dataclass(frozen=True)
class Added:
    """What the dispatcher adds, in milliseconds."""

    p50_ms: float | None
    p99_ms: float | None
    beside_p50_ms: float | None
    beside_p99_ms: float | None


def pairs(
    direct: Asks, through: Asks, queries: Sequence[Query], count: int, advance: Callable[[], None] = lambda: None
) -> list[tuple[Timed, Timed]]:
    """Ask the same question both ways, one right after the other, in turns who is first; (direct, through)."""
    found = []
    for number in range(-WARM_UP, count):
        query = queries[number % len(queries)]
        order = [direct, through] if number % 2 else [through, direct]
        replies = {id(way): way.ask(query.skill, query.text, TIER) for way in order}
        both = [replies[id(way)] for way in (direct, through)]
        if number >= 0:
            found.append(
                (Timed.of(both[0].latency_ms, both[0].timing_ms), Timed.of(both[1].latency_ms, both[1].timing_ms))
            )
            advance()
    return found


def of_pairs(found: Sequence[tuple[Timed, Timed]]) -> Added:
    """Quantiles of the differences."""
    whole = [through.latency_ms - direct.latency_ms for direct, through in found]
    beside = [through.beside_ms - direct.beside_ms for direct, through in found]
    return Added(percentile(whole, 0.5), percentile(whole, 0.99), percentile(beside, 0.5), percentile(beside, 0.99))


def of_quantiles(direct: Sequence[Timed], through: Sequence[Timed]) -> Added:
    """Differences of the quantiles, for two runs whose requests do not pair up."""

    def added(name: str, q: float) -> float | None:
        values = [percentile([getattr(t, name) for t in run], q) for run in (through, direct)]
        return None if None in values else (values[0] or 0.0) - (values[1] or 0.0)

    return Added(*(added(name, q) for name in ("latency_ms", "beside_ms") for q in (0.5, 0.99)))


def at_rate(
    urls: Mapping[str, str], queries: Sequence[Query], rate: float, seconds: float, turns: int
) -> dict[str, list[Answer]]:
    """Open loop at one rate against the tier and the dispatcher, in turns; Poisson arrivals, the same for both."""
    requests = [request(query, TIER) for query in queries]
    floods = {name: Flood(urls[name], requests) for name in (TIER, DISPATCHER)}
    found: dict[str, list[Answer]] = {name: [] for name in floods}
    for turn in range(turns):
        arrivals = poisson(rate, seconds, seed=turn + 1)
        for name in (TIER, DISPATCHER) if turn % 2 else (DISPATCHER, TIER):
            found[name] += floods[name].open(arrivals)
    return found


def measure(
    running: Running,
    queries: Sequence[Query],
    count: int,
    rate: float,
    seconds: float,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """JSON-ready figures of both parts; raises `ServiceError`."""
    with Client(running.urls[TIER]) as direct, Client(running.urls[DISPATCHER]) as through:
        paired = of_pairs(pairs(direct, through, queries, count, advance))
    turns = 4
    loaded = at_rate(running.urls, queries, rate, seconds / turns, turns)
    timed = {name: [_timed(a) for a in answers if a.status == HTTPStatus.OK] for name, answers in loaded.items()}
    under_load = of_quantiles(timed[TIER], timed[DISPATCHER])
    return {
        "pairs": {"n": count, **asdict(paired)},
        "at_rate": {
            "requests_per_s": rate,
            "n": {name: len(answers) for name, answers in loaded.items()},
            "answered": {name: len(run) for name, run in timed.items()},
            **asdict(under_load),
        },
        "verdict": {
            "median": _at_most(paired.p50_ms, MEDIAN_MS),
            "p99_at_rate": _at_most(under_load.p99_ms, P99_MS),
        },
    }


def _timed(answer: Answer) -> Timed:
    return Timed.of(answer.latency_ms, answer.extra.get("timing_ms") or {})


def _at_most(found: float | None, bound_ms: float) -> dict[str, Any]:
    """Whether a bound is kept; None where the noise is larger than it: nothing is faster through a dispatcher."""
    noisy = found is None or found < -bound_ms
    return {"ms": found, "at_most_ms": bound_ms, "passed": None if noisy else (found or 0.0) <= bound_ms}
