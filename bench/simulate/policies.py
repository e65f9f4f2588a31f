"""Who decides how many replicas: fixed, what people run, ours, and an oracle.

A policy answers a look with the replicas it wants, not rounded: what the HPA makes of its metric. All of them pass
through the same `Hpa`.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.simulate.look import STABLE_S, Look
from bench.simulate.pool import Job, Pool
from scaler.capacity import Capacity
from scaler.values import Target

PANIC_FACTOR = 2.0


class Policy(Protocol):
    """What stands where KEDA's trigger stands."""

    def wanted(self, look: Look) -> float:
        """Replicas, not rounded."""
        ...


@dataclass
class Fixed:
    """Always the same number."""

    replicas: int

    def wanted(self, look: Look) -> float:  # noqa: ARG002  # it looks at nothing
        """That number."""
        return self.replicas


@dataclass
class Cpu:
    """The HPA on CPU: ready replicas × utilisation / target."""

    target: float

    def wanted(self, look: Look) -> float:
        """As the HPA's formula says."""
        return max(1, look.reading.ready) * look.utilisation / self.target


@dataclass
class P95:
    """KEDA on a latency percentile from Prometheus, type Value: ready replicas × latency / threshold; idle is none."""

    threshold_s: float

    def wanted(self, look: Look) -> float:
        """As the HPA's formula says."""
        return max(1, look.reading.ready) * (look.reading.latency_s or 0.0) / self.threshold_s


@dataclass
class Concurrency:
    """Knative: mean requests in flight over 60 s / target; over 6 s, and never down, for 60 s after it was doubled."""

    target: float
    panic_until_s: float = -math.inf
    most: float = 0.0

    def wanted(self, look: Look) -> float:
        """Stable, or panic."""
        stable, panic = look.concurrency / self.target, look.panic / self.target
        now_s = look.reading.at_s
        if panic >= PANIC_FACTOR * max(1, look.reading.ready):
            self.panic_until_s = now_s + STABLE_S
        if now_s >= self.panic_until_s:
            self.most = 0.0
            return stable
        self.most = max(self.most, panic, stable)
        return self.most


@dataclass
class Queue:
    """KEDA on a queue's length, type AverageValue: requests / threshold; all in flight, or only those that wait."""

    threshold: float
    waiting_only: bool = False

    def wanted(self, look: Look) -> float:
        """As the HPA's formula says."""
        length = look.reading.queued if self.waiting_only else look.reading.in_flight
        return length / self.threshold


@dataclass
class Ours:
    """`scaler.capacity`, through the scaler's answer to the HPA's tolerance."""

    capacity: Capacity
    tolerance: float

    def wanted(self, look: Look) -> float:
        """Enough to cross the tolerance where more are needed."""
        decided = self.capacity.decide(look.reading).replicas
        current = look.reading.ready + look.reading.starting
        return max(decided, current * (1 + self.tolerance) + 1e-6) if decided > current else decided


@dataclass
class Oracle:
    """Knows all requests to come, but its replicas start as slowly as anyone's.

    It takes the smallest number with which at most a share is late of what comes until the next order takes effect.
    """

    pool: Pool
    jobs: Sequence[Job]
    target: Target
    share: float
    poll_s: float
    ahead_s: float = 0.0
    _times: list[float] = field(init=False)

    def __post_init__(self) -> None:
        """Index the future."""
        self._times = [job.at_s for job in self.jobs]

    def wanted(self, look: Look) -> float:
        """By trying."""
        now_s = look.reading.at_s
        lead_s = self.target.cold_start_s
        begin = bisect_left(self._times, now_s)
        end = bisect_left(self._times, now_s + lead_s + self.poll_s + self.ahead_s)
        low, high = self.target.minimum, self.target.maximum
        while low < high:
            middle = (low + high) // 2
            if self._late(middle, now_s, lead_s, begin, end) <= self.share:
                high = middle
            else:
                low = middle + 1
        return low

    def _late(self, replicas: int, now_s: float, lead_s: float, begin: int, end: int) -> float:
        slots = self.pool.slots
        now = [replica for replica in self.pool.replicas if replica.ready][: max(replicas, 0)]
        free = [job.begun_s + job.service_s for replica in now for job in replica.jobs]
        free += [now_s] * (len(now) * slots - len(free))
        free += [now_s + lead_s] * ((replicas - len(now)) * slots)
        if not free:
            return 1.0
        heapq.heapify(free)
        late = counted = 0
        for job in [*self.pool.queue, *self.jobs[begin:end]]:
            start_s = max(job.at_s, free[0])
            done_s = start_s + job.service_s
            heapq.heapreplace(free, done_s)
            if job.at_s >= now_s + lead_s - self.poll_s:
                counted += 1
                late += done_s - job.at_s > self.target.slo_s
        return late / counted if counted else 0.0
