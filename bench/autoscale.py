"""`bench autoscale`: a step of load on a bundle that scales, from none to one, to many and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import plot as plots
from bench.bundle import Autoscaled, Scaling, Variant
from bench.flood import Answer, Flood, request
from bench.load import poisson
from bench.metrics import percentile
from bench.progress import terminal
from bench.queries import Query
from bench.recording import Look, read_record

FUNCTION = "device"
SKILL = "home"
"""Its answers take many passes: one that another process interrupts, and that is slept off `slowdown` times, is one of
many."""
PERCENTILE = 0.95
WAKE_S, CALM_S = 3.0, 20.0
"""When the first request comes, and how long the low rate lasts before the step."""
SETTLED_S = 30.0
"""After the step's beginning; until then replicas start."""
_QUEUE = "40"  # below the function's 48 threads, so that it still answers when asked for its metrics


@dataclass(frozen=True)
class Plan:
    """Rates in requests a second, lengths in seconds."""

    low: float = 0.5
    high: float = 6.0
    seconds: float = 60.0
    after_s: float = 150.0
    slowdown: float = 20.0
    slo_s: float = 1.5
    maximum: int = 6

    @property
    def step_s(self) -> tuple[float, float]:
        """From when to when the rate is high."""
        return WAKE_S + CALM_S, WAKE_S + CALM_S + self.seconds

    def arrivals(self) -> list[float]:
        """One request alone, then the low, the high and the low rate, each Poisson."""
        begins_s, ends_s = self.step_s
        calm = [WAKE_S + t for t in poisson(self.low, CALM_S, 1) if t > CALM_S / 4]
        step = [begins_s + t for t in poisson(self.high, self.seconds, 2)]
        return [WAKE_S, *calm, *step, *(ends_s + t for t in poisson(self.low, self.after_s, 3))]


@dataclass(frozen=True)
class Figures:
    """What came of it; latencies in milliseconds from when a request was due."""

    requests: int
    failed: int
    wake_ms: float
    settled_requests: int
    settled_p95_ms: float | None
    slo_ms: float
    ready_before: int
    ready_most: int
    ready_after: int
    passed: bool


def measure(
    autoscaled: Autoscaled,
    queries: Sequence[Query],
    plan: Plan,
    record: Path | None,
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    """Run the plan, print its figures, and plot it."""
    console = terminal(stderr=True)
    arrivals = plan.arrivals()
    console.print(f"{len(arrivals)} requests in {arrivals[-1]:.0f} s")
    with TemporaryDirectory() as folder:
        kept = record or Path(folder) / "record.jsonl"
        answers = _run(autoscaled, queries, plan, arrivals, kept)
        looks = read_record(kept)
    found = figures(plan, answers, looks)
    if plot:
        plots.autoscale(answers, looks, plan.slo_s, plot)
    terminal(stderr=False).print(
        json.dumps(asdict(found)) if as_json else describe(found), soft_wrap=True, markup=False
    )


def _run(
    autoscaled: Autoscaled, queries: Sequence[Query], plan: Plan, arrivals: Sequence[float], record: Path
) -> list[Answer]:
    slow: Mapping[str, str] = {
        "SLOWDOWN": f"{plan.slowdown:g}",
        "MAX_INFLIGHT": "1",
        "QUEUE_LIMIT": _QUEUE,
        "EXIT_THRESHOLD": "off",
    }
    scaling = Scaling(FUNCTION, plan.slo_s, PERCENTILE, 0, plan.maximum, record)
    requests = [request(query, FUNCTION, prefix=f"/function/{FUNCTION}") for query in queries]
    with autoscaled({FUNCTION: Variant(FUNCTION, slow)}, scaling) as url:
        return Flood(url, requests).open(arrivals)


def figures(plan: Plan, answers: Sequence[Answer], looks: Sequence[Look]) -> Figures:
    """Sum a run up. The recording begins a little before the first request is due, which makes no difference here."""
    begins_s, ends_s = plan.step_s
    settled = [a.latency_ms for a in answers if begins_s + SETTLED_S <= a.due_s < ends_s]
    p95_ms = percentile(settled, PERCENTILE)
    failed = sum(a.status != HTTPStatus.OK for a in answers)
    before = max((look.ready for look in looks if look.at_s < begins_s), default=0)
    most, after = max(look.ready for look in looks), looks[-1].ready
    slo_ms = 1000 * plan.slo_s
    held = p95_ms is not None and p95_ms <= slo_ms
    return Figures(
        requests=len(answers),
        failed=failed,
        wake_ms=min(answers, key=lambda a: a.due_s).latency_ms,
        settled_requests=len(settled),
        settled_p95_ms=p95_ms,
        slo_ms=slo_ms,
        ready_before=before,
        ready_most=most,
        ready_after=after,
        passed=not failed and held and before == after == 1 and most > 1 and looks[0].ready == 0,
    )


def describe(found: Figures) -> str:
    """For people."""
    p95 = "none" if found.settled_p95_ms is None else f"{found.settled_p95_ms:.0f} ms"
    return (
        f"{found.requests} requests, {found.failed} failed; 0 → 1 in {found.wake_ms:.0f} ms, the request kept;"
        f" {found.ready_before} → {found.ready_most} → {found.ready_after} replicas; p95 after settling {p95} of"
        f" {found.settled_requests} requests, allowed {found.slo_ms:.0f} ms: {'passed' if found.passed else 'FAILED'}"
    )
