"""Replicas behind one queue between polls, without a calendar: first come, first served, by the slot free the longest.

Nothing but a poll changes the replicas here, so a heap of the times at which slots come free is the whole state, and a
request costs one exchange on it. Where requests fail or wait for each other, in a fleet, `bench.simulate.pool` plays
the same rules on simpy's clock; a test holds the two together.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np


class Requests:
    """What comes, in the order of time: seconds at which, seconds of service, tokens that answer. For many runs."""

    def __init__(self, at_s: Sequence[float], service_s: Sequence[float], tokens: Sequence[int]) -> None:
        self.at_s, self.service_s = list(at_s), list(service_s)
        self.times, self.services = np.array(at_s, float), np.array(service_s, float)  # shape (requests,)
        self.tokens = np.array(tokens, float)

    def __len__(self) -> int:
        return len(self.at_s)


@dataclass(slots=True, eq=False)
class Replica:
    """Serves from `ready_s` on."""

    ready_s: float


class Tier:
    """What serves. `begun` requests have been taken up, `came` have come; those between wait."""

    def __init__(self, requests: Requests, slots: int, cold_start_s: float) -> None:
        self.requests = requests
        self.slots = slots
        self.cold_start_s = cold_start_s
        self.now_s = 0.0
        self.replicas: list[Replica] = []  # the oldest first, without those that stop
        self.done_s: list[float] = []  # of those that have begun
        self.came = 0
        self.replica_s = 0.0
        self._served_s = 0.0  # of all that have begun, to their end
        self._free: list[tuple[float, int, Replica]] = []  # one entry a slot: when it comes free
        self._leaving: list[float] = []  # the last end on each replica that stops
        self._ending: list[float] = []  # ends of what is served on those
        self._orders = count()

    # ---- how things stand ----

    @property
    def begun(self) -> int:
        """Requests that were taken up so far."""
        return len(self.done_s)

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self.came - self.begun

    @property
    def running(self) -> int:
        """Requests that are served now."""
        return sum(1 for _ in self._ends())

    @property
    def in_flight(self) -> int:
        """Requests not yet answered."""
        return self.queued + self.running

    @property
    def ready(self) -> int:
        """Replicas that serve."""
        return sum(replica.ready_s <= self.now_s for replica in self.replicas)

    @property
    def busy_s(self) -> float:
        """Seconds that slots have worked until now."""
        return self._served_s - sum(end_s - self.now_s for end_s in self._ends())

    def ends(self) -> list[float]:
        """When the slots of the replicas that serve come free, the oldest replica first; what is past is free."""
        by_replica: dict[Replica, list[float]] = {r: [] for r in self.replicas if r.ready_s <= self.now_s}
        for end_s, _, replica in self._free:
            if replica in by_replica:
                by_replica[replica].append(end_s)
        return [end_s for ends in by_replica.values() for end_s in ends]

    def _ends(self) -> list[float]:
        now_s = self.now_s
        served = [end_s for end_s, _, replica in self._free if end_s > now_s >= replica.ready_s]
        return served + [end_s for end_s in self._ending if end_s > now_s]

    # ---- time ----

    def run(self, until_s: float) -> None:
        """Let time pass; what happens at `until_s` itself is still to come."""
        at_s, service_s, free, done_s = self.requests.at_s, self.requests.service_s, self._free, self.done_s
        index, total = len(done_s), len(at_s)
        while index < total and free:
            begins_s, _, replica = free[0]
            begins_s = max(begins_s, at_s[index])
            if begins_s >= until_s:
                break
            end_s = begins_s + service_s[index]
            heapq.heapreplace(free, (end_s, next(self._orders), replica))
            done_s.append(end_s)
            self._served_s += service_s[index]
            index += 1
        self.came = bisect_left(at_s, until_s, lo=self.came)
        self._count(until_s)

    def _count(self, until_s: float) -> None:
        self.replica_s += (until_s - self.now_s) * len(self.replicas)
        self.replica_s += sum(min(end_s, until_s) - self.now_s for end_s in self._leaving)
        self._leaving = [end_s for end_s in self._leaving if end_s > until_s]
        self._ending = [end_s for end_s in self._ending if end_s > until_s]
        self.now_s = until_s

    # ---- replicas ----

    def start(self, number: int, *, warm: bool = False) -> None:
        """Order so many more; they serve after a cold start, or at once if `warm`."""
        ready_s = self.now_s if warm else self.now_s + self.cold_start_s
        for _ in range(number):
            replica = Replica(ready_s)
            self.replicas.append(replica)
            for _ in range(self.slots):
                heapq.heappush(self._free, (ready_s, next(self._orders), replica))

    def stop(self, number: int) -> None:
        """Let so many go: those that still start first, then the newest, as Kubernetes does; they finish their work."""
        order = sorted(self.replicas, key=lambda replica: replica.ready_s > self.now_s)  # keeps the oldest first
        stopped = set(order[len(order) - number :])
        self.replicas = [replica for replica in self.replicas if replica not in stopped]
        last: dict[Replica, float] = {}
        for end_s, _, replica in self._free:
            if replica in stopped and end_s > self.now_s >= replica.ready_s:
                self._ending.append(end_s)
                last[replica] = max(end_s, last.get(replica, 0.0))
        self._leaving += last.values()
        self._free = [entry for entry in self._free if entry[2] not in stopped]
        heapq.heapify(self._free)
