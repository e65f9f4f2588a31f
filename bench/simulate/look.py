"""What a poll sees of a tier: the reading that capacity takes, and what other autoscalers go by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bench.simulate.tier import Tier
from scaler.values import Reading

STABLE_S, PANIC_S = 60.0, 6.0
_LEAST_FOR_SPREAD = 3

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Answered:
    """Requests that were answered in a window: when they came, were taken up and were answered, their tokens."""

    at_s: Seconds
    begun_s: Seconds
    done_s: Seconds
    tokens: Seconds

    def __len__(self) -> int:
        return len(self.done_s)


@dataclass(frozen=True)
class Now:
    """How things stand at a poll; `arrived` since the one before."""

    at_s: float
    window_s: float
    queued: int
    running: int
    ready: int
    starting: int
    arrived: int
    power_ceiling: int | None = None


def reading(now: Now, came_s: Seconds, done: Answered, percentile: float) -> Reading:
    """What capacity is told; `came_s` and `done` are of the window."""
    service_s, service_scv = _spread(done.done_s - done.begun_s)
    _, arrivals_scv = _spread(np.diff(came_s))
    latencies = np.sort(done.done_s - done.at_s)
    return Reading(
        at_s=now.at_s,
        arrivals_per_s=len(came_s) / now.window_s,
        arrivals_scv=arrivals_scv,
        in_flight=now.queued + now.running,
        queued=now.queued,
        queue_wait_s=float(np.mean(done.begun_s - done.at_s)) if len(done) else None,
        service_s=service_s,
        service_scv=service_scv,
        latency_s=float(latencies[min(len(done) - 1, int(percentile * len(done)))]) if len(done) else None,
        tokens_per_request=float(np.mean(done.tokens)) if len(done) else None,
        ready=now.ready,
        starting=now.starting,
        power_ceiling=now.power_ceiling,
        arrived=now.arrived,
    )


def _spread(values: Seconds) -> tuple[float | None, float | None]:
    """Mean and squared coefficient of variation; the latter needs three values."""
    if not len(values):
        return None, None
    mean = float(values.mean())
    if len(values) < _LEAST_FOR_SPREAD or mean <= 0:
        return mean, None
    return mean, float(values.var()) / mean**2


class Gatherer:
    """Polls a tier; signals are over `window_s`. A look is to be used before time goes on: it reads when asked."""

    def __init__(self, tier: Tier, window_s: float, percentile: float) -> None:
        self.tier = tier
        self.window_s = window_s
        self.percentile = percentile
        self.oldest = 0
        self._busy_s = 0.0
        self._at_s = 0.0
        self._came = 0

    def look(self) -> Look:
        """Poll now."""
        tier = self.tier
        busy_s = tier.busy_s
        look = Look(self, tier.came - self._came, busy_s - self._busy_s, tier.now_s - self._at_s)
        self._came, self._busy_s, self._at_s = tier.came, busy_s, tier.now_s
        self._forget(tier.now_s - max(self.window_s, STABLE_S))
        return look

    def _forget(self, before_s: float) -> None:
        """Move `oldest` past the requests that were answered before; those begun later may have been, too."""
        done_s = self.tier.done_s
        while self.oldest < len(done_s) and done_s[self.oldest] < before_s:
            self.oldest += 1


@dataclass(frozen=True)
class Look:
    """One poll: requests that came, seconds that slots worked, and seconds that passed since the last one."""

    gatherer: Gatherer
    arrived: int
    busy_s: float
    passed_s: float

    @property
    def at_s(self) -> float:
        """When."""
        return self.gatherer.tier.now_s

    @cached_property
    def ready(self) -> int:
        """Replicas that serve."""
        return self.gatherer.tier.ready

    @property
    def utilisation(self) -> float:
        """The share of ready slots that were busy since the last poll."""
        return self.busy_s / (max(self.passed_s, 1e-9) * max(1, self.ready) * self.gatherer.tier.slots)

    @property
    def concurrency(self) -> float:
        """Requests in flight in the mean over 60 s, as Knative takes them."""
        return self._mean_flight(STABLE_S)

    @property
    def panic(self) -> float:
        """The same over 6 s."""
        return self._mean_flight(PANIC_S)

    @cached_property
    def reading(self) -> Reading:
        """What capacity takes."""
        tier, now_s = self.gatherer.tier, self.at_s
        window_s = min(self.gatherer.window_s, max(now_s, 1.0))
        since_s = now_s - self.gatherer.window_s
        now = Now(now_s, window_s, tier.queued, tier.running, self.ready, len(tier.replicas) - self.ready, self.arrived)
        times, services = tier.requests.times, tier.requests.services
        came_s = times[np.searchsorted(times[: tier.came], since_s) : tier.came]
        chosen = np.arange(self.gatherer.oldest, tier.begun)
        done_s = np.array(tier.done_s[self.gatherer.oldest :])
        inside = (done_s >= since_s) & (done_s < now_s)
        chosen, done_s = chosen[inside], done_s[inside]
        answered = Answered(times[chosen], done_s - services[chosen], done_s, tier.requests.tokens[chosen])
        return reading(now, came_s, answered, self.gatherer.percentile)

    def _mean_flight(self, window_s: float) -> float:
        tier, now_s = self.gatherer.tier, self.at_s
        since_s = max(0.0, now_s - window_s)
        if now_s <= since_s:
            return float(tier.in_flight)
        begin_s = np.maximum(tier.requests.times[self.gatherer.oldest : tier.came], since_s)
        end_s = np.full(len(begin_s), now_s)
        done_s = np.array(tier.done_s[self.gatherer.oldest :])
        end_s[: len(done_s)] = np.minimum(done_s, now_s)
        return float(np.maximum(end_s - begin_s, 0.0).sum()) / (now_s - since_s)
