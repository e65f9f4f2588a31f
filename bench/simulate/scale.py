"""One policy on one trace: requests, replicas, polls; what it held and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import simpy

from bench.simulate.arrivals import Trace
from bench.simulate.hpa import Hpa
from bench.simulate.look import Gatherer
from bench.simulate.policies import Policy
from bench.simulate.pool import Job, Pool
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


@dataclass(frozen=True)
class Site:
    """What all policies meet alike: the target with bounds and cold start, the poll, the HPA's tolerance."""

    target: Target
    machine: Machine = Machine()
    poll_s: float = 15.0
    tolerance: float = 0.1


@dataclass(frozen=True)
class World:
    """What a policy may be made from; only the oracle looks at `jobs`."""

    site: Site
    pool: Pool
    jobs: Sequence[Job]


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


def run(trace: Trace, site: Site, setting: Setting, since_s: float = 0.0) -> Outcome:
    """Simulate; what is not answered at the end is waited for, without cost."""
    env = simpy.Environment()
    machine, target = site.machine, site.target
    pool = Pool(env, target.slots, target.cold_start_s)
    jobs = [Job(a.at_s, machine.service_s(a.context, a.generated), a.generated) for a in trace.arrivals]
    first = [job.service_s for job in jobs if job.at_s < START_S]
    begin = math.ceil(sum(first) / START_S / START_UTILISATION / target.slots)
    pool.start(min(target.maximum, max(target.minimum, begin)), warm=True)
    policy = setting.make(World(site, pool, jobs))
    hpa = Hpa(target.minimum, target.maximum, site.tolerance, setting.stabilisation_s)
    gatherer = Gatherer(pool, setting.window_s, target.percentile)
    seen: list[tuple[float, int, int]] = []

    def apply(wanted: float) -> None:
        current = len(pool.replicas)
        desired = hpa.replicas(env.now, wanted, current)
        if desired > current:
            pool.start(desired - current)
        elif desired < current:
            pool.stop(current - desired)
        seen.append((env.now, len(pool.replicas), pool.in_flight))

    def polls() -> simpy.events.ProcessGenerator:
        due_s = 0.0
        while True:
            wanted = policy.wanted(gatherer.look())
            if env.now >= due_s - 1e-9:  # sums of seconds
                apply(wanted)
                due_s += site.poll_s
            yield env.timeout(min(setting.gather_s, site.poll_s))

    _arrive(env, pool, jobs)
    env.process(polls())
    if since_s > 0:
        env.run(since_s)
    pool.count()
    before = pool.replica_s, pool.busy_s
    env.run(trace.length_s)
    pool.count()
    replica_s, busy_s = pool.replica_s - before[0], pool.busy_s - before[1]
    while pool.in_flight:
        env.step()
    joules = replica_s * machine.idle_watts + busy_s / target.slots * (machine.busy_watts - machine.idle_watts)
    return _outcome([job for job in jobs if job.at_s >= since_s], site, replica_s, joules, seen)


def _arrive(env: simpy.Environment, pool: Pool, jobs: Sequence[Job]) -> None:
    """Chain the arrivals, so that the calendar holds one of them at a time."""
    coming = iter(jobs)

    def next_one(event: simpy.Event) -> None:
        if event.value is not None:
            pool.submit(event.value)
        job = next(coming, None)
        if job is not None:
            env.timeout(max(0.0, job.at_s - env.now), job).callbacks.append(next_one)

    env.timeout(0).callbacks.append(next_one)


def _outcome(
    jobs: Sequence[Job], site: Site, replica_s: float, joules: float, seen: Sequence[tuple[float, int, int]]
) -> Outcome:
    took = sorted(job.done_s - job.at_s for job in jobs)
    late = sum(seconds > site.target.slo_s for seconds in took)

    def quantile(share: float) -> float:
        return took[min(len(took) - 1, int(share * len(took)))] if took else 0.0

    return Outcome(len(jobs), late, replica_s, joules, quantile(0.5), quantile(0.95), tuple(seen))
