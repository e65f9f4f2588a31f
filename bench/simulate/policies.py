"""Who decides how many replicas: fixed, what people run, ours, and an oracle.

A policy answers a look with the replicas it wants, not rounded: what the HPA makes of its metric. All of them pass
through the same `Hpa`.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.simulate.look import STABLE_S, Look
from bench.simulate.tier import Tier
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
        return max(1, look.ready) * look.utilisation / self.target


@dataclass
class P95:
    """KEDA on a latency percentile from Prometheus, type Value: ready replicas × latency / threshold; idle is none."""

    threshold_s: float

    def wanted(self, look: Look) -> float:
        """As the HPA's formula says."""
        return max(1, look.ready) * (look.reading.latency_s or 0.0) / self.threshold_s


@dataclass
class Concurrency:
    """Knative: mean requests in flight over 60 s / target; over 6 s, and never down, for 60 s after it was doubled."""

    target: float
    panic_until_s: float = -math.inf
    most: float = 0.0

    def wanted(self, look: Look) -> float:
        """Stable, or panic."""
        stable, panic = look.concurrency / self.target, look.panic / self.target
        now_s = look.at_s
        if panic >= PANIC_FACTOR * max(1, look.ready):
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
        tier = look.gatherer.tier
        return (tier.queued if self.waiting_only else tier.in_flight) / self.threshold


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

    tier: Tier
    target: Target
    share: float
    poll_s: float

    def wanted(self, look: Look) -> float:
        """By trying."""
        now_s, at_s = look.at_s, self.tier.requests.at_s
        end = bisect_left(at_s, now_s + self.target.cold_start_s + self.poll_s)
        ends = self.tier.ends()
        low, high = self.target.minimum, self.target.maximum
        while low < high:
            middle = (low + high) // 2
            if self._late(middle, ends, now_s, end) <= self.share:
                high = middle
            else:
                low = middle + 1
        return low

    def _late(self, replicas: int, ends: Sequence[float], now_s: float, end: int) -> float:
        """The share of late ones with so many replicas, of the requests before `end` that an order now can reach."""
        at_s, service_s = self.tier.requests.at_s, self.tier.requests.service_s
        serves_s = now_s + self.target.cold_start_s
        slots = replicas * self.tier.slots
        free = [max(now_s, end_s) for end_s in ends[:slots]]
        free += [serves_s] * (slots - len(free))
        if not free:
            return 1.0
        heapq.heapify(free)
        late = counted = 0
        for index in range(self.tier.begun, end):
            done_s = max(at_s[index], free[0]) + service_s[index]
            heapq.heapreplace(free, done_s)
            if at_s[index] >= serves_s - self.poll_s:
                counted += 1
                late += done_s - at_s[index] > self.target.slo_s
        return late / counted if counted else 0.0
