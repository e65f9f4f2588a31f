"""A fleet for a day: devices that route their requests as the dispatcher does, sites whose edge tier capacity sizes.

`routing.route` decides every step and `scaler.capacity` every poll; tiers, batteries, links and losses are modelled.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from bench.simulate.look import Answered, Now, reading
from bench.simulate.pool import Job, Pool
from routing.policy import Policy
from routing.power import Power, PowerLimits, next_power
from routing.power import Reading as PowerReading
from routing.route import route
from routing.values import Answer, Conditions, Failure, Kind, Observed, Pending, Request, Step
from scaler.capacity import Capacity, Tuning
from scaler.values import Reading, Target

_DAY_S = 86_400.0
_SKILL = "assistant"
_QUIET = 0.2  # the night's rate as a share of the day's
_EDGE_HALF_LIFE = 0.02


@dataclass(frozen=True)
class Plan:
    """What is simulated; times of tiers and networks in milliseconds, energy in joules, battery in joules.

    Nodes serve `replicas` each; a share of them, `on_battery`, stops serving when its battery is empty. Each node is
    lost `losses_a_day` times a day in the mean, for `repair_s`.
    """

    devices: int = 10_000
    sites: int = 50
    nodes: int = 4
    replicas: int = 3
    length_s: float = _DAY_S
    requests_a_day: float = 40.0
    deadline_ms: float = 250.0
    device_ms: float = 38.0
    edge_ms: float = 92.0
    network_ms: float = 12.0
    threshold: float = 0.8
    on_battery: float = 0.3
    node_battery_j: float = 400_000.0
    device_battery_j: float = 40_000.0
    idle_watts: float = 2.5
    busy_watts: float = 6.0
    device_idle_watts: float = 0.4
    device_joules: float = 0.15
    losses_a_day: float = 0.2
    repair_s: float = 1800.0
    cold_start_s: float = 10.0
    poll_s: float = 30.0
    seed: int = 0

    @property
    def target(self) -> Target:
        """What a site's edge tier holds: what the deadline leaves it."""
        slo_s = (self.deadline_ms - self.device_ms - self.network_ms) / 1000
        return Target(slo_s, 0.95, 1, self.nodes * self.replicas, self.cold_start_s)


@dataclass(slots=True)
class Node:
    """A machine of a site; `battery_j` is infinite on mains."""

    battery_j: float
    up: bool = True


@dataclass(slots=True)
class Device:
    """One asks at a time; its battery drains while it idles and with each answer."""

    site: Site
    battery_j: float
    free_s: float = 0.0
    spent_j: float = 0.0
    power: Power = field(default_factory=Power)


class Site:
    """Nodes, the pool on them, and the capacity that sizes it."""

    def __init__(self, env: simpy.Environment, plan: Plan, rng: random.Random) -> None:
        self.plan, self.rng = plan, rng
        self.pool = Pool(env, 1, plan.cold_start_s)
        self.nodes = [
            Node(plan.node_battery_j if rng.random() < plan.on_battery else math.inf) for _ in range(plan.nodes)
        ]
        # A day has thousands of polls on each of many sites: the past is rehearsed twice an hour.
        self.capacity = Capacity(plan.target, Tuning(memory_s=3600.0, review_s=1800.0, interval_s=plan.poll_s))
        self.edge_ms = plan.edge_ms + plan.network_ms
        self.drained = 0
        self._submitted = 0

    def placed(self) -> int:
        """The node that runs the fewest replicas of those that are up."""
        used = Counter(replica.node for replica in self.pool.replicas)
        return min((i for i, node in enumerate(self.nodes) if node.up), key=lambda i: used[i])

    def ceiling(self) -> int:
        """Replicas that the nodes which are up can run."""
        return self.plan.replicas * sum(node.up for node in self.nodes)

    def poll(self) -> list[Job]:
        """Drain batteries, then size the pool; returns the requests that a drained node lost."""
        lost = self._drain()
        ceiling = self.ceiling()
        decided = self.capacity.decide(self._look(ceiling)).replicas
        wanted, current = min(decided, ceiling), len(self.pool.replicas)
        if wanted > current:
            self.pool.start(wanted - current, self.placed)
        elif wanted < current:
            self.pool.stop(current - wanted)
        return lost

    def _look(self, ceiling: int) -> Reading:
        """What the pool has done in the last two polls."""
        pool, now_s = self.pool, self.pool.env.now
        pool.count()
        window_s = 2 * self.plan.poll_s
        while pool.arrived and pool.arrived[0] < now_s - window_s:
            pool.arrived.popleft()
        while pool.finished and pool.finished[0].done_s < now_s - window_s:
            pool.finished.popleft()
        rows = [(job.at_s, job.begun_s, job.done_s, job.tokens) for job in pool.finished]
        answered = Answered(*np.array(rows, float).reshape(-1, 4).T)
        ready, arrived, self._submitted = pool.ready, pool.submitted - self._submitted, pool.submitted
        window_s = min(window_s, max(now_s, 1.0))
        starting = len(pool.replicas) - ready
        now = Now(now_s, window_s, len(pool.queue), pool.running, ready, starting, arrived, ceiling)
        return reading(now, np.array(pool.arrived), answered, self.plan.target.percentile)

    def _drain(self) -> list[Job]:
        used = Counter(replica.node for replica in self.pool.replicas)
        busy = Counter(replica.node for replica in self.pool.replicas if replica.jobs)
        lost: list[Job] = []
        for index, node in enumerate(self.nodes):
            if node.up and node.battery_j < math.inf:
                watts = self.plan.idle_watts * used[index]
                watts += (self.plan.busy_watts - self.plan.idle_watts) * busy[index]
                node.battery_j -= watts * self.plan.poll_s
                if node.battery_j <= 0:
                    self.drained += 1
                    lost += self.down(index)
        return lost

    def down(self, index: int) -> list[Job]:
        """A node falls out; what it worked on is returned."""
        self.nodes[index].up = False
        return self.pool.lose(index)


@dataclass
class Tally:
    """What the requests came to."""

    requests: int = 0
    in_time: int = 0
    routes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    degraded: int = 0
    steps: int = 0


class Fleet:
    """Wires devices and sites to one clock."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.env = simpy.Environment()
        self.rng = random.Random(plan.seed)
        self.tally = Tally()
        self.policy = Policy()
        self.limits = PowerLimits()
        self.sites = [Site(self.env, plan, self.rng) for _ in range(plan.sites)]
        self.devices = [
            Device(self.sites[i % plan.sites], plan.device_battery_j * self.rng.uniform(0.5, 1.0))
            for i in range(plan.devices)
        ]
        self.losses = 0

    def run(self, report: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
        """Simulate the whole length; `report` is told the share that is done."""
        began = time.process_time()
        for site in self.sites:
            site.pool.start(1, site.placed, warm=True)
            self.env.process(self._polls(site))
            for index in range(len(site.nodes)):
                if self.plan.losses_a_day > 0:
                    self.env.process(self._losses(site, index))
        self._arrive(None)
        for part in range(1, 101):
            self.env.run(self.plan.length_s * part / 100)
            report(part / 100)
        for site in self.sites:
            site.pool.count()
        return self._figures(time.process_time() - began)

    # ---- what happens by itself ----

    def _polls(self, site: Site) -> simpy.events.ProcessGenerator:
        yield self.env.timeout(self.rng.uniform(0, self.plan.poll_s))
        while True:
            self._fail(site.poll())
            yield self.env.timeout(self.plan.poll_s)

    def _losses(self, site: Site, index: int) -> simpy.events.ProcessGenerator:
        node = site.nodes[index]
        while True:
            yield self.env.timeout(self.rng.expovariate(self.plan.losses_a_day / _DAY_S))
            if node.up:
                self.losses += 1
                self._fail(site.down(index))
                yield self.env.timeout(self.plan.repair_s)
                node.up = node.battery_j > 0

    def _fail(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.failed = True
            if job.then is not None:
                job.then(job)

    def _arrive(self, event: simpy.Event | None) -> None:
        """Poisson arrivals with a day's wave, at any device, by thinning."""
        if event is not None:
            wave = math.sin(math.pi * self.env.now / _DAY_S) ** 2
            if self.rng.random() < _QUIET + (1 - _QUIET) * wave:
                self._ask(self.rng.choice(self.devices))
        mean_share = _QUIET + (1 - _QUIET) / 2
        peak = self.plan.devices * self.plan.requests_a_day / _DAY_S / mean_share
        self.env.timeout(self.rng.expovariate(peak)).callbacks.append(self._arrive)

    def _ask(self, device: Device) -> None:
        plan = self.plan
        spent = device.spent_j + self.env.now * plan.device_idle_watts
        level = max(0.0, 1 - spent / device.battery_j)
        device.power = next_power(self.limits, device.power, [PowerReading("model", self.env.now, level)], self.env.now)
        self.tally.requests += 1
        Asked(self, device).go()

    def _figures(self, cpu_s: float) -> dict[str, Any]:
        plan, tally = self.plan, self.tally
        replica_s = sum(site.pool.replica_s for site in self.sites)
        busy_s = sum(site.pool.busy_s for site in self.sites)
        return {
            "devices": plan.devices,
            "nodes": plan.sites * plan.nodes,
            "simulated_s": plan.length_s,
            "cpu_s": cpu_s,
            "requests": tally.requests,
            "in_time": tally.in_time / max(1, tally.requests),
            "degraded": tally.degraded / max(1, tally.requests),
            "routes": dict(tally.routes.most_common()),
            "reasons": dict(tally.reasons.most_common()),
            "route_calls": tally.steps,
            "replica_s": replica_s,
            "edge_joules": replica_s * plan.idle_watts + busy_s * (plan.busy_watts - plan.idle_watts),
            "device_joules": sum(device.spent_j for device in self.devices),
            "nodes_lost": self.losses,
            "nodes_drained": sum(site.drained for site in self.sites),
        }


class Asked:
    """One request between `route`'s steps."""

    __slots__ = ("answered", "began_s", "confidence", "device", "device_asked_s", "edge_asked_s", "fleet", "observed")

    def __init__(self, fleet: Fleet, device: Device) -> None:
        self.fleet, self.device = fleet, device
        self.began_s = fleet.env.now
        self.observed = Observed()
        self.device_asked_s = self.edge_asked_s = 0.0
        self.confidence = fleet.rng.betavariate(6.0, 1.0)
        self.answered = False

    def go(self) -> None:
        """Take steps until there is something to wait for."""
        fleet = self.fleet
        while not self.answered:
            now_s = fleet.env.now
            observed = self._with_waits(now_s)
            remaining_ms = fleet.plan.deadline_ms - 1000 * (now_s - self.began_s)
            fleet.tally.steps += 1
            step = route(fleet.policy, self._conditions(remaining_ms), _REQUEST, observed)
            if step.is_last:
                self._finish(step, remaining_ms)
            elif step.kind is Kind.ASK_DEVICE:
                self._ask_device(now_s)
            elif step.kind is Kind.ASK_EDGE:
                self._ask_edge(now_s)
            else:
                self._later(min(step.look_again_ms, remaining_ms))
                return

    def _conditions(self, remaining_ms: float) -> Conditions:
        site = self.device.site
        return Conditions(
            edge_up=bool(site.pool.ready),
            remaining_ms=remaining_ms if remaining_ms > 1e-6 else 0.0,  # noqa: PLR2004  # what is left of a sum
            power=self.device.power,
            device_ms=self.fleet.plan.device_ms,
            edge_ms=site.edge_ms,
        )

    def _with_waits(self, now_s: float) -> Observed:
        device, edge = self.observed.device, self.observed.edge
        if isinstance(device, Pending):
            device = Pending(1000 * (now_s - self.device_asked_s))
        if isinstance(edge, Pending):
            edge = Pending(1000 * (now_s - self.edge_asked_s))
        return Observed(device, edge)

    def _ask_device(self, now_s: float) -> None:
        fleet, device = self.fleet, self.device
        took_s = fleet.plan.device_ms / 1000 * fleet.rng.lognormvariate(-0.02, 0.2)
        device.free_s = max(now_s, device.free_s) + took_s
        device.spent_j += fleet.plan.device_joules
        self.device_asked_s = now_s
        self.observed = Observed(Pending(), self.observed.edge)
        fleet.env.timeout(device.free_s - now_s).callbacks.append(self._device_answers)

    def _device_answers(self, _: simpy.Event) -> None:
        self.observed = Observed(Answer(self.confidence, self.fleet.plan.threshold), self.observed.edge)
        self.go()

    def _ask_edge(self, now_s: float) -> None:
        plan, rng = self.fleet.plan, self.fleet.rng
        self.edge_asked_s = now_s
        self.observed = Observed(self.observed.device, Pending())
        service_s = plan.edge_ms / 1000 * rng.lognormvariate(-0.08, 0.4)
        self.fleet.env.timeout(plan.network_ms / 2000, service_s).callbacks.append(self._reaches_edge)

    def _reaches_edge(self, event: simpy.Event) -> None:
        pool = self.device.site.pool
        pool.submit(Job(self.fleet.env.now, event.value, then=self._edge_done))

    def _edge_done(self, job: Job) -> None:
        self.fleet.env.timeout(self.fleet.plan.network_ms / 2000, job.failed).callbacks.append(self._edge_answers)

    def _edge_answers(self, event: simpy.Event) -> None:
        took_ms = 1000 * (self.fleet.env.now - self.edge_asked_s)
        site = self.device.site
        site.edge_ms += _EDGE_HALF_LIFE * (took_ms - site.edge_ms)
        edge = Failure("edge_unavailable", retriable=True) if event.value else Answer(1.0, 0.0)
        self.observed = Observed(self.observed.device, edge)
        self.go()

    def _later(self, wait_ms: float) -> None:
        if wait_ms < math.inf:
            self.fleet.env.timeout(max(0.0, wait_ms) / 1000).callbacks.append(lambda _: self.go())

    def _finish(self, step: Step, remaining_ms: float) -> None:
        tally = self.fleet.tally
        self.answered = True
        tally.in_time += remaining_ms > -1e-6  # noqa: PLR2004  # what is left of a sum
        tally.degraded += step.degraded
        tally.routes[step.route] += 1
        tally.reasons[step.reason] += 1


_REQUEST = Request(_SKILL)
