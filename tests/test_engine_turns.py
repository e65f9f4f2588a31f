"""Whose turn it is: one run at a time, the urgent first, and shared where it can be."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from models.runtime.turns import Turns
from tests.fakes import wait_until


class Engine:
    """Runs that note who took part, and can be held up."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.runs: list[list[Any]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.at_work = 0

    def run(self, members: Sequence[Any]) -> None:
        self.at_work += 1
        assert self.at_work == 1, "two runs at once"
        self.runs.append(sorted(members))
        self.go_on.wait(20)
        time.sleep(self.pause_s)
        self.at_work -= 1


def start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def queued(turns: Turns, count: int) -> None:
    wait_until(lambda: len(turns._queue) == count)


def test_one_alone_waits_for_nobody() -> None:
    turns, engine = Turns(patience=1e9), Engine()
    for _ in range(3):
        turns.take("a", 1.0, engine.run, shared=True)
    assert engine.runs == [["a"]] * 3
    assert (turns.stats.shared_runs, turns.stats.shared_turns) == (3, 3)


def test_the_most_urgent_goes_first_and_equals_in_order_of_arrival() -> None:
    turns, engine = Turns(), Engine()
    engine.go_on.clear()
    threads = [start(lambda: turns.take("first", 0.0, engine.run))]
    wait_until(lambda: engine.at_work == 1)
    for number, (who, deadline) in enumerate([("late", 9.0), ("soon", 1.0), ("never", math.inf), ("soon2", 1.0)]):
        threads.append(start(lambda who=who, deadline=deadline: turns.take(who, deadline, engine.run)))
        queued(turns, number + 1)
    engine.go_on.set()
    for thread in threads:
        thread.join(20)
    assert engine.runs == [["first"], ["soon"], ["soon2"], ["late"], ["never"]]


def test_turns_of_one_kind_share_a_run_and_others_do_not() -> None:
    turns, engine, other = Turns(), Engine(), Engine()
    engine.go_on.clear()
    threads = [start(lambda: turns.take("first", 0.0, engine.run))]
    wait_until(lambda: engine.at_work == 1)
    wanted = [("a", engine, True), ("x", other, True), ("b", engine, True), ("c", engine, False), ("d", engine, True)]
    for number, (who, where, shared) in enumerate(wanted):
        threads.append(start(lambda who=who, w=where, s=shared: turns.take(who, 5.0, w.run, shared=s)))
        queued(turns, number + 1)
    engine.go_on.set()
    for thread in threads:
        thread.join(20)
    assert engine.runs == [["first"], ["a", "b", "d"], ["c"]]
    assert other.runs == [["x"]]


def test_those_who_shared_the_last_run_are_waited_for_until_they_come_or_leave() -> None:
    """With boundless patience, four threads of 30 steps each always go together."""
    turns, engine = Turns(patience=1e9), Engine(pause_s=0.001)
    met = threading.Barrier(4)

    def work(who: int, steps: int) -> None:
        met.wait(20)
        for _ in range(steps):
            turns.take(who, math.inf, engine.run, shared=True)
        turns.leave(who)

    threads = [start(lambda who=who: work(who, 30 + 10 * who)) for who in range(4)]
    for thread in threads:
        thread.join(30)
    assert sum(map(len, engine.runs)) == 30 + 40 + 50 + 60
    assert len(engine.runs) < 90, "only the beginning, before all have met, may be taken apart"


def test_as_many_go_together_as_may_and_neighbours_first() -> None:
    turns, engine = Turns(), Engine()
    engine.go_on.clear()
    threads = [start(lambda: turns.take("first", 0.0, engine.run))]
    wait_until(lambda: engine.at_work == 1)
    for number, place in enumerate((0, 3, 1, 2)):
        take = partial(turns.take, place, 5.0, engine.run, shared=True, most=2, place=place)
        threads.append(start(take))
        queued(turns, number + 1)
    engine.go_on.set()
    for thread in threads:
        thread.join(20)
    assert engine.runs == [["first"], [0, 1], [2, 3]]


def test_nobody_is_waited_for_once_there_are_enough() -> None:
    """With boundless patience, four threads go by twos; whoever ends first leaves the others to go on."""
    turns, engine = Turns(patience=1e9), Engine(pause_s=0.001)
    met = threading.Barrier(4)

    def work(who: int) -> None:
        met.wait(20)
        for _ in range(30):
            turns.take(who, math.inf, engine.run, shared=True, most=2, place=who)
        turns.leave(who)

    threads = [start(partial(work, who)) for who in range(4)]
    for thread in threads:
        thread.join(30)
    assert sum(map(len, engine.runs)) == 4 * 30
    assert max(map(len, engine.runs)) == 2
    assert sum(len(run) == 2 for run in engine.runs) > 40, "only at both ends may one go alone"


def test_patience_ends() -> None:
    """One who shared a run and never comes again, nor leaves, holds nobody up for long."""
    turns, engine = Turns(patience=0.1), Engine()
    turns.take("ghost", math.inf, engine.run, shared=True)
    for _ in range(3):
        turns.take("a", math.inf, engine.run, shared=True)
    assert engine.runs == [["ghost"], ["a"], ["a"], ["a"]]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_reaches_who_took_the_turn_and_the_next_goes_on(error: type[BaseException]) -> None:
    turns = Turns()

    def fails(_members: Sequence[Any]) -> None:
        raise error("broken")

    with pytest.raises(error, match="broken"):
        turns.take("a", 0.0, fails, shared=True)
    engine = Engine()
    turns.take("b", 0.0, engine.run)
    assert engine.runs == [["b"]]
