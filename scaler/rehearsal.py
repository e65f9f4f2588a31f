"""What would have held the target lately, and what it would have cost: the last half hour, played again. Pure.

A fluid queue: work comes as it came, what is ordered serves a lead time later and is kept for a while. Each `Habit` is
played with ever smaller floors; the cheapest that held the percentile is what to go on with. So bursts that come too
quickly for any order are met by what is kept for them, and quiet traffic pays for none of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from scaler.queueing import Service


@dataclass(frozen=True)
class Past:
    """One stretch of time: its seconds, the requests that came, and what each habit of estimating then asked for."""

    length_s: float
    requests: float
    demands: tuple[int, ...]


@dataclass(frozen=True)
class Habit:
    """How to go on: which of the estimates to follow, how long to keep what was wanted, and how many at least."""

    estimate: int
    hold_s: float
    floor: int = 0


@dataclass(frozen=True)
class Terms:
    """What a habit is played against: the target, slots of a replica, the lead of an order, the time to clear a queue."""

    slo_s: float
    allowed_late: float
    maximum: int
    slots: int
    lead_s: float
    clear_s: float


@dataclass(frozen=True)
class Played:
    """What a habit would have done: the share of requests late, and replica-seconds."""

    late: float
    replica_s: float


def play(past: Sequence[Past], habit: Habit, service: Service, terms: Terms) -> Played:
    """Play the past again; linear in its length."""
    backlog_s = late = requests = cost = now_s = 0.0
    ordered: deque[tuple[float, int]] = deque()  # falling numbers with when they were last wanted
    serving: deque[tuple[float, int]] = deque()  # the same, a lead time later
    coming: deque[tuple[float, int]] = deque()
    serves = float(habit.floor)
    for stretch in past:
        while coming and coming[0][0] <= now_s - terms.lead_s:
            _push(serving, *coming.popleft())
        _forget(serving, now_s - terms.lead_s - habit.hold_s)
        _forget(ordered, now_s - habit.hold_s)
        serves = max(habit.floor, serving[0][1] if serving else 0)
        width = max(serves, 1e-3) * terms.slots
        work_s = stretch.requests * service.mean_s
        left_s = max(0.0, backlog_s + work_s - serves * terms.slots * stretch.length_s)
        if stretch.requests:
            wait_s = (backlog_s + left_s) / 2 / width
            late += stretch.requests * service.beyond(terms.slo_s - wait_s)
            requests += stretch.requests
        backlog_s = left_s
        now_s += stretch.length_s
        wanted = stretch.demands[habit.estimate] + math.ceil(left_s / terms.clear_s / terms.slots)
        wanted = min(terms.maximum, max(habit.floor, wanted))
        _push(ordered, now_s, wanted)
        coming.append((now_s, wanted))
        cost += max(habit.floor, ordered[0][1]) * stretch.length_s
    return Played(late / requests if requests else 0.0, cost)


def _push(window: deque[tuple[float, int]], at_s: float, count: int) -> None:
    while window and window[-1][1] <= count:
        window.pop()
    window.append((at_s, count))


def _forget(window: deque[tuple[float, int]], before_s: float) -> None:
    while window and window[0][0] < before_s:
        window.popleft()


def cheapest(past: Sequence[Past], habits: Sequence[Habit], service: Service, terms: Terms) -> Habit:
    """The habit, with its smallest sufficient floor, that would have cost least; the safest where none suffices."""
    best: tuple[float, float, Habit] | None = None
    allowed = max(terms.allowed_late, service.beyond(terms.slo_s) * 1.05)
    for habit in habits:
        low, high = 0, terms.maximum
        while low < high:
            middle = (low + high) // 2
            played = play(past, Habit(habit.estimate, habit.hold_s, middle), service, terms)
            if played.late <= allowed:
                high = middle
            else:
                low = middle + 1
        chosen = Habit(habit.estimate, habit.hold_s, low)
        played = play(past, chosen, service, terms)
        rank = (max(0.0, played.late - allowed), played.replica_s, chosen)
        if best is None or rank[:2] < best[:2]:
            best = rank
    return best[2] if best else Habit(0, 0.0)
