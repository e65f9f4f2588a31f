"""One policy on one trace: requests, replicas, polls; what it held and what it cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from bench.simulate.arrivals import Trace
from bench.simulate.hpa import Hpa
from bench.simulate.look import Gatherer
from bench.simulate.policies import Policy
from bench.simulate.tier import Requests, Tier
from scaler.values import Target

START_UTILISATION, START_S = 0.7, 60.0


@dataclass(frozen=True)
class Machine:
    """A replica's speed and power: tokens a second it reads and writes, watts while it idles and works."""

    reads_per_s: float = 1261.0
    writes_per_s: float = 163.0
    idle_watts: float = 2.5
    busy_watts: float = 6.0

    def service_s(self, context: int, generated: int) -> float:
        """Seconds a request takes alone."""
        return context / self.reads_per_s + generated / self.writes_per_s

    def requests(self, trace: Trace) -> Requests:
        """The trace's, as this machine serves them."""
        served = [self.service_s(a.context, a.generated) for a in trace.arrivals]
        return Requests([a.at_s for a in trace.arrivals], served, [a.generated for a in trace.arrivals])


@dataclass(frozen=True)
class Site:
    """What all policies meet alike: the target with bounds and cold start, the poll, the HPA's tolerance."""

    target: Target
    machine: Machine = Machine()
    poll_s: float = 15.0
    tolerance: float = 0.1


@dataclass(frozen=True)
class World:
    """What a policy may be made from; only the oracle looks at what is to come."""

    site: Site
    tier: Tier


Make = Callable[[World], Policy]


@dataclass(frozen=True)
class Setting:
    """A policy with its parameters, the window of its signals and the HPA's window for scaling down.

    `gather_s`: how often it looks; the HPA asks it every poll.
    """

    policy: str
    values: tuple[tuple[str, float], ...]
    make: Make
    window_s: float = 60.0
    stabilisation_s: float = 0.0
    gather_s: float = 15.0

    def __str__(self) -> str:
        parts = [*self.values, ("window", self.window_s), ("down", self.stabilisation_s)]
        return f"{self.policy} ({', '.join(f'{name} {value:g}' for name, value in parts)})"


@dataclass(frozen=True)
class Outcome:
    """What came of it, over the requests from `since_s` on."""

    requests: int
    late: int
    replica_s: float
    joules: float
    p50_s: float
    p95_s: float
    replicas: Sequence[tuple[float, int, int]] = ()
    """When, replicas, requests in flight."""

    @property
    def violations(self) -> float:
        """The share of requests that were late."""
        return self.late / self.requests if self.requests else 0.0


def run(
    trace: Trace, site: Site, setting: Setting, since_s: float = 0.0, *, requests: Requests | None = None
) -> Outcome:
    """Simulate; what is not answered at the end is waited for, without cost. `requests` are the trace's, if at hand."""
    target, machine = site.target, site.machine
    tier = Tier(requests or machine.requests(trace), target.slots, target.cold_start_s)
    tier.start(_first_replicas(tier.requests, target), warm=True)
    policy = setting.make(World(site, tier))
    hpa = Hpa(target.minimum, target.maximum, site.tolerance, setting.stabilisation_s)
    gatherer = Gatherer(tier, setting.window_s, target.percentile)
    gather_s = min(setting.gather_s, site.poll_s)
    marks, costs, due_s, seen = deque([since_s, trace.length_s]), [], 0.0, []
    for number in count():
        now_s = number * gather_s
        while marks and marks[0] <= now_s:
            tier.run(marks.popleft())
            costs.append((tier.replica_s, tier.busy_s))
        if not marks and not tier.queued:
            break
        tier.run(now_s)
        wanted = policy.wanted(gatherer.look())
        if now_s >= due_s - 1e-9:  # sums of seconds
            _resize(tier, hpa.replicas(now_s, wanted, len(tier.replicas)))
            seen.append((now_s, len(tier.replicas), tier.in_flight))
            due_s += site.poll_s
    replica_s, busy_s = (after - before for before, after in zip(*costs, strict=True))
    joules = replica_s * machine.idle_watts + busy_s / target.slots * (machine.busy_watts - machine.idle_watts)
    began = bisect_left(tier.requests.at_s, since_s)
    took_s = np.sort(np.array(tier.done_s[began:]) - tier.requests.times[began:])
    late = int((took_s > target.slo_s).sum())
    return Outcome(len(took_s), late, replica_s, joules, _quantile(took_s, 0.5), _quantile(took_s, 0.95), tuple(seen))


def _first_replicas(requests: Requests, target: Target) -> int:
    """What the first minute takes, begun with warm."""
    first = requests.service_s[: bisect_left(requests.at_s, START_S)]
    begin = math.ceil(sum(first) / START_S / START_UTILISATION / target.slots)
    return min(target.maximum, max(target.minimum, begin))


def _resize(tier: Tier, desired: int) -> None:
    current = len(tier.replicas)
    if desired > current:
        tier.start(desired - current)
    elif desired < current:
        tier.stop(current - desired)


def _quantile(ordered: NDArray[np.float64], share: float) -> float:
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) if len(ordered) else 0.0
