"""What would have held the target lately, and what it would have cost: the last half hour, played again. Pure.

A fluid queue: work comes as it came, what is ordered serves a lead time later and is kept for a while. Each `Habit` is
played with ever smaller floors; the cheapest that held the percentile is what to go on with. So bursts that come too
quickly for any order are met by what is kept for them, and quiet traffic pays for none of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from scaler.queueing import Service

LEAST_SLACK = 1.05
"""So much more lateness is allowed than service alone causes, where that is too much already."""
_EPISODE_S = 300.0
"""What was late within so long a time came of one burst."""


@dataclass(frozen=True)
class Past:
    """One stretch of time: its seconds, the requests that came, their work in seconds of one slot.

    `demands` are the replicas that each of the estimates asked for after it.
    """

    length_s: float
    requests: float
    work_s: float
    demands: tuple[int, ...]


@dataclass(frozen=True)
class Habit:
    """How to go on: which of the estimates to follow, how long to keep what was wanted, in what time to clear a queue.

    `share`: how much of what the estimate asks for is followed; the queue makes up for the rest. `patience_s`: a wait
    that is left alone. `floor`: how many at least; that share of them, `idle`, while nothing arrives.
    """

    estimate: int
    hold_s: float
    clear_s: float
    idle: float = 1.0
    floor: int = 0
    share: float = 1.0
    patience_s: float = 0.0

    def floor_at(self, requests: float) -> int:
        """The floor after a stretch with so many requests."""
        return self.floor if requests > 0 else math.ceil(self.idle * self.floor)

    def following(self, needed: int) -> int:
        """The replicas of an estimate's."""
        return math.ceil(self.share * needed)

    def clearing(self, backlog_s: float, width: float, slots: int) -> int:
        """Replicas that work off in time what so many seconds of one slot are beyond patience; `width` slots serve."""
        return math.ceil(max(0.0, backlog_s - self.patience_s * width) / self.clear_s / slots)


@dataclass(frozen=True)
class Terms:
    """What a habit is played against: the target, slots of a replica, the lead of an order."""

    slo_s: float
    allowed_late: float
    maximum: int
    slots: int
    lead_s: float


@dataclass(frozen=True)
class Played:
    """What a habit would have done: requests late, and late beside the worst burst, as shares; replica-seconds."""

    late: float
    replica_s: float
    late_again: float


def play(past: Sequence[Past], habit: Habit, service: Service, terms: Terms, most_late: float = math.inf) -> Played:
    """Play the past again; linear in its length. With more than `most_late` requests late it is given up."""
    backlog_s = late = worst = episode = requests = cost = now_s = 0.0
    episode_ends_s = -math.inf
    always_late = service.beyond(terms.slo_s)
    kept: deque[tuple[float, int]] = deque()  # ever smaller numbers, with when they were last wanted
    serving: deque[tuple[float, int]] = deque()  # the same, of those whose lead time is over
    coming: deque[tuple[float, int]] = deque()
    ordered = serves = habit.floor
    for stretch in past:
        while coming and coming[0][0] <= now_s - terms.lead_s:
            _push(serving, *coming.popleft())
        _forget(serving, now_s - max(habit.hold_s, terms.lead_s))
        serves = min(ordered, serving[0][1]) if serving else min(ordered, serves)
        width = max(serves, 1e-3) * terms.slots
        left_s = max(0.0, backlog_s + stretch.work_s - serves * terms.slots * stretch.length_s)
        if stretch.requests:
            wait_s = (backlog_s + left_s) / 2 / width
            missed = stretch.requests * (service.beyond(terms.slo_s - wait_s) if wait_s > 0 else always_late)
            if wait_s > 0 and now_s >= episode_ends_s:
                episode, episode_ends_s = 0.0, now_s + _EPISODE_S
            if now_s < episode_ends_s:
                episode += missed
                worst = max(worst, episode)
            late += missed
            requests += stretch.requests
            if late - worst > most_late:
                return Played(1.0, math.inf, 1.0)
        backlog_s = left_s
        now_s += stretch.length_s
        wanted = habit.following(stretch.demands[habit.estimate])
        if backlog_s > 0:
            wanted += habit.clearing(backlog_s, width, terms.slots)
        wanted = min(terms.maximum, max(habit.floor_at(stretch.requests), wanted))
        _push(kept, now_s, wanted)
        _forget(kept, now_s - habit.hold_s)
        coming.append((now_s, wanted))
        ordered = kept[0][1]
        cost += ordered * stretch.length_s
    total = max(requests, 1e-9)
    return Played(late / total, cost, (late - worst) / total)


def _push(window: deque[tuple[float, int]], at_s: float, count: int) -> None:
    while window and window[-1][1] <= count:
        window.pop()
    window.append((at_s, count))


def _forget(window: deque[tuple[float, int]], before_s: float) -> None:
    while window and window[0][0] < before_s:
        window.popleft()


def cheapest(past: Sequence[Past], habits: Iterable[Habit], service: Service, terms: Terms) -> Habit:
    """The habit that would have cost least, with its smallest sufficient floor; the maximum where none suffices.

    It is then given the floor that suffices without the worst burst: what came once in that time is not kept for. The
    search begins at the floor that each habit has, which is where it mostly ends.
    """
    allowed = max(terms.allowed_late, LEAST_SLACK * service.beyond(terms.slo_s))
    most_late = allowed * sum(stretch.requests for stretch in past)

    def played(habit: Habit, floor: int) -> Played:
        return play(past, replace(habit, floor=floor), service, terms, most_late)

    def always(habit: Habit, floor: int) -> bool:
        return played(habit, floor).late <= allowed

    def but_once(habit: Habit, floor: int) -> bool:
        return played(habit, floor).late_again <= allowed

    chosen, least = None, math.inf
    for habit in habits:
        floor = _smallest(partial(always, habit), habit.floor, terms.maximum)
        tried = played(habit, floor)
        spent = tried.replica_s if tried.late <= allowed else math.inf
        if chosen is None or spent < least:
            chosen, least = replace(habit, floor=floor), spent
    if chosen is None:
        raise ValueError("no habit to choose from")
    return replace(chosen, floor=_smallest(partial(but_once, chosen), chosen.floor, terms.maximum))


def _smallest(suffices: Callable[[int], bool], guess: int, maximum: int) -> int:
    """The smallest floor that suffices; the maximum if none does."""
    low, high = _bracket(suffices, guess, maximum)
    while low < high:
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _bracket(suffices: Callable[[int], bool], floor: int, maximum: int) -> tuple[int, int]:
    """Bounds of the smallest floor that suffices, found from a guess by steps that double; both the maximum if none."""
    step, floor = 1, min(floor, maximum)
    if suffices(floor):
        low = floor
        while low > 0 and suffices(low := max(0, floor - step)):
            floor, step = low, 2 * step
        return (0 if floor == 0 else low + 1), floor
    while floor < maximum:
        higher = min(maximum, floor + step)
        if suffices(higher):
            return floor + 1, higher
        floor, step = higher, 2 * step
    return maximum, maximum
