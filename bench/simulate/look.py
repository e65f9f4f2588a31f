"""What a poll sees of a pool: the reading that capacity takes, and what other autoscalers go by."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from bench.simulate.pool import Job, Pool
from scaler.values import Reading

_LEAST_FOR_SPREAD = 3


@dataclass(frozen=True)
class Look:
    """One poll. `utilisation` is the share of ready slots that were busy since the last one.

    `concurrency` and `panic` are requests in flight in the mean over 60 s and over 6 s, as Knative takes them.
    """

    reading: Reading
    utilisation: float
    concurrency: float
    panic: float


STABLE_S, PANIC_S = 60.0, 6.0


class Gatherer:
    """Polls a pool; signals are over `window_s`."""

    def __init__(self, pool: Pool, window_s: float, percentile: float) -> None:
        self.pool = pool
        self.window_s = window_s
        self.percentile = percentile
        self._busy_s = 0.0
        self._at_s = 0.0
        self._submitted = 0

    def look(self, power_ceiling: int | None = None) -> Look:
        """Poll now."""
        pool, now_s = self.pool, self.pool.env.now
        pool.count()
        since_s = now_s - self.window_s
        while pool.arrived and pool.arrived[0] < since_s:
            pool.arrived.popleft()
        while pool.finished and pool.finished[0].done_s < since_s:
            pool.finished.popleft()
        ready = pool.ready
        reading = _reading(pool, now_s, min(self.window_s, max(now_s, 1.0)), self.percentile, ready, power_ceiling)
        reading = replace(reading, arrived=pool.submitted - self._submitted)
        self._submitted = pool.submitted
        passed_s = max(now_s - self._at_s, 1e-9)
        utilisation = (pool.busy_s - self._busy_s) / (passed_s * max(1, ready) * pool.slots)
        self._busy_s, self._at_s = pool.busy_s, now_s
        look = Look(reading, utilisation, _mean_flight(pool, STABLE_S), _mean_flight(pool, PANIC_S))
        while len(pool.flight) > 2 and pool.flight[1][0] < now_s - STABLE_S:  # noqa: PLR2004  # one before, one after
            pool.flight.popleft()
        return look


def _reading(
    pool: Pool, now_s: float, window_s: float, percentile: float, ready: int, power_ceiling: int | None
) -> Reading:
    done: Sequence[Job] = pool.finished
    service_s, service_scv = _spread([job.done_s - job.begun_s for job in done])
    arrived = list(pool.arrived)
    _, arrivals_scv = _spread([later - earlier for earlier, later in pairwise(arrived)])
    latencies = sorted(job.done_s - job.at_s for job in done)
    return Reading(
        at_s=now_s,
        arrivals_per_s=len(arrived) / window_s,
        arrivals_scv=arrivals_scv,
        in_flight=pool.in_flight,
        queued=len(pool.queue),
        queue_wait_s=sum(job.begun_s - job.at_s for job in done) / len(done) if done else None,
        service_s=service_s,
        service_scv=service_scv,
        latency_s=latencies[min(len(latencies) - 1, int(percentile * len(latencies)))] if latencies else None,
        tokens_per_request=sum(job.tokens for job in done) / len(done) if done else None,
        ready=ready,
        starting=len(pool.replicas) - ready,
        power_ceiling=power_ceiling,
    )


def _spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and squared coefficient of variation; the latter needs three values."""
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) < _LEAST_FOR_SPREAD or mean <= 0:
        return mean, None
    return mean, sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def _mean_flight(pool: Pool, window_s: float) -> float:
    """Requests in flight in the mean over the last seconds, from their integral."""
    now_s, total = pool.flight[-1]
    since_s = max(0.0, now_s - window_s)
    if now_s <= since_s:
        return float(pool.in_flight)
    times = pool.flight
    at = bisect_left(times, (since_s, -1.0))
    before, after = times[max(0, at - 1)], times[min(at, len(times) - 1)]
    gap_s = after[0] - before[0]
    begun = after[1] if gap_s <= 0 else before[1] + (after[1] - before[1]) * (since_s - before[0]) / gap_s
    return (total - begun) / (now_s - since_s)
