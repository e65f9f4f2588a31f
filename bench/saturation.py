"""`bench chaos`, second half: far more requests than the tiers can serve.

Does what is served stay served, and is the rest refused at once?
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import Any

from bench.bundle import Start, Variant
from bench.chaos import GRACE_MS, REJECTIONS
from bench.errors import BenchError
from bench.flood import Answer, Flood, request
from bench.load import poisson
from bench.metrics import percentile
from bench.queries import Query
from bench.slow_tiers import TIERS, Site, tier_variants

GOODPUT, REJECTED_MS = 0.9, 10.0  # what the issue asks for
_DISPATCHER = "dispatcher"


@dataclass(frozen=True)
class Step:
    """One rate, as a multiple of the saturation: useful answers in time a second, and how fast the rest was refused."""

    load: float
    requests_per_s: float
    sent: int
    answered: int
    goodput_per_s: float
    rejected: int
    rejected_p50_ms: float | None
    rejected_p99_ms: float | None
    rejected_worst_ms: float | None
    unanswered: int
    sources: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)


LOADS = (0.5, 1.0, 1.5, 2.0, 5.0)
_CALLERS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Flooding:
    """How slow the tiers are, and the length of each rate in seconds."""

    site: Site
    seconds: float


def around(start: Start, floods: Flooding, queries: Sequence[Query], deadline_ms: float) -> tuple[float, list[Step]]:
    """(saturation, steps): what is served in time at most to callers that wait their turn; then open loop around it.

    No proxy lies between here: it would share this process with the load generator.
    """
    with start({_DISPATCHER: Variant(_DISPATCHER), **tier_variants(floods.site)}) as running:
        flood = Flood(running.urls[_DISPATCHER], [request(query, "auto", deadline_ms) for query in queries])
        flood.closed(2, 20)
        most = max(goodput(flood.closed(callers, 20 * callers), deadline_ms) for callers in _CALLERS)
        if most <= 0:
            raise BenchError("no request was answered in time; allow a longer deadline")
        steps = []
        for number, load in enumerate(LOADS):
            answers = flood.open(poisson(load * most, floods.seconds, seed=number + 1))
            steps.append(step(load, load * most, answers, deadline_ms))
            time.sleep(min(1.0, floods.seconds))  # let what still runs end
    return most, steps


def goodput(answers: Sequence[Answer], deadline_ms: float) -> float:
    """Answers of a tier within the deadline (and the grace), a second."""
    good = [a for a in answers if _good(a, deadline_ms)]
    span_s = max((a.done_s for a in answers), default=0.0) - min((a.due_s for a in answers), default=0.0)
    return len(good) / span_s if span_s > 0 else 0.0


def step(load: float, rate: float, answers: Sequence[Answer], deadline_ms: float) -> Step:
    """Sum up one rate."""
    refused = [1e3 * (a.done_s - a.sent_s) for a in answers if a.status in REJECTIONS]
    answered = [a for a in answers if a.status == HTTPStatus.OK]
    return Step(
        load=load,
        requests_per_s=rate,
        sent=len(answers),
        answered=len(answered),
        goodput_per_s=goodput(answers, deadline_ms),
        rejected=len(refused),
        rejected_p50_ms=percentile(refused, 0.5),
        rejected_p99_ms=percentile(refused, 0.99),
        rejected_worst_ms=max(refused, default=None),
        unanswered=len(answers) - len(answered) - len(refused),
        sources=dict(Counter(str(a.extra.get("source")) for a in answered)),
        reasons=dict(Counter(str(a.extra.get("reason")) for a in answered)),
    )


def _good(answer: Answer, deadline_ms: float) -> bool:
    in_time = answer.latency_ms <= deadline_ms + GRACE_MS
    return answer.status == HTTPStatus.OK and in_time and answer.extra.get("source") in TIERS


def as_dict(most: float, steps: Sequence[Step]) -> dict[str, Any]:
    """JSON-ready figures with their verdicts, both about the highest load."""
    peak, last = max(s.goodput_per_s for s in steps), steps[-1]
    share = last.goodput_per_s / peak if peak else 0.0
    worst_ms = last.rejected_worst_ms
    return {
        "saturation_per_s": most,
        "steps": [asdict(s) for s in steps],
        "verdict": {
            "goodput": {"share_of_peak": share, "at_least": GOODPUT, "passed": share >= GOODPUT},
            "rejections": {
                "p99_ms": last.rejected_p99_ms,
                "worst_ms": worst_ms,
                "below_ms": REJECTED_MS,
                "passed": worst_ms is not None and worst_ms < REJECTED_MS,
            },
        },
    }
