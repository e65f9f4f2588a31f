"""Admission: so many at work, so many waiting in order, the rest refused at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functions.serving.admission import Gate, Place
from functions.serving.errors import ClientLeftError, OverloadedError
from tests.fakes import wait_until


@contextmanager
def filled(gate: Gate, count: int) -> Iterator[ExitStack]:
    with ExitStack() as inside:
        for _ in range(count):
            inside.enter_context(gate.admitted(inf))
        yield inside


def test_a_free_place_costs_no_wait() -> None:
    gate = Gate(2, 0)
    with gate.admitted(inf) as place:
        assert (place.waited_s, gate.inflight) == (0.0, 1)
    assert gate.inflight == 0


def test_the_place_is_given_back_after_an_error() -> None:
    gate = Gate(1, 0)
    with pytest.raises(RuntimeError), gate.admitted(inf):
        raise RuntimeError
    assert gate.inflight == 0


def test_over_place_and_queue_it_is_429() -> None:
    gate = Gate(1, 0)
    with filled(gate, 1):
        assert gate.full
        with pytest.raises(OverloadedError) as refused, gate.admitted(inf):
            pass
    assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
    assert not gate.full


def test_waiting_ends_with_the_deadline() -> None:
    gate = Gate(1, 1, clock=lambda: 10.0)
    with filled(gate, 1), pytest.raises(OverloadedError) as refused, gate.admitted(10.0):
        pass
    assert (refused.value.status, refused.value.code) == (503, "deadline")
    assert gate.waiting == 0


def test_a_caller_who_hangs_up_leaves_the_queue() -> None:
    gate = Gate(1, 1)
    with filled(gate, 1), pytest.raises(ClientLeftError), gate.admitted(inf, gone=lambda: True):
        pass
    assert (gate.inflight, gate.waiting) == (0, 0)
    with pytest.raises(ClientLeftError), gate.admitted(inf, gone=lambda: True):
        pass
    assert gate.inflight == 0, "the place was given back"


def test_who_waited_longest_is_next() -> None:
    gate, order = Gate(1, 3), list[int]()

    def work(number: int) -> None:
        with gate.admitted(inf) as place:
            order.append(number)
            assert place.waited_s > 0

    with ThreadPoolExecutor(3) as pool, filled(gate, 1):
        for number in range(3):
            pool.submit(work, number)
            wait_until(lambda n=number: gate.waiting == n + 1)  # type: ignore[misc]
    assert order == [0, 1, 2]


def test_the_earliest_deadline_is_next() -> None:
    now = [0.0]
    gate, order = Gate(1, 3, clock=lambda: now[0]), list[float]()

    def work(expires: float) -> None:
        with gate.admitted(expires):
            order.append(expires)

    with ThreadPoolExecutor(3) as pool, filled(gate, 1):
        for number, expires in enumerate((30.0, 10.0, 20.0)):
            pool.submit(work, expires)
            wait_until(lambda n=number: gate.waiting == n + 1)  # type: ignore[misc]
    assert order == [10.0, 20.0, 30.0]


class Timed:
    """A gate on a clock of its own, through which answers go one by one."""

    def __init__(self, places: int, queue: int = 0) -> None:
        self.now = 0.0
        self.gate = Gate(places, queue, clock=lambda: self.now)

    def answers(self, count: int, took_s: float, granted_s: float, together: int = 1) -> None:
        for _ in range(count):
            with ExitStack() as inside:
                for _ in range(together):
                    inside.enter_context(self.gate.admitted(self.now + granted_s))
                self.now += took_s


def test_late_answers_close_places_and_timely_ones_open_them_again() -> None:
    timed = Timed(8)
    timed.answers(10, took_s=0.1, granted_s=1)
    assert timed.gate.limit == 8
    timed.answers(60, took_s=1, granted_s=1)
    assert timed.gate.limit == 1, "one place stays open"
    for _ in range(100):
        timed.answers(1, took_s=0.1, granted_s=1, together=timed.gate.limit)
    assert timed.gate.limit == 8


def test_what_is_answered_without_the_tier_opens_no_place_and_for_want_of_it_closes_some() -> None:
    timed = Timed(8)
    timed.answers(10, took_s=0.1, granted_s=1)
    timed.answers(60, took_s=1, granted_s=1)
    for _ in range(100):
        with timed.gate.admitted(timed.now + 1) as place:
            place.is_answer = False
            timed.now += 0.001
    assert timed.gate.limit == 1
    timed = Timed(8)
    timed.answers(10, took_s=0.1, granted_s=1)
    for _ in range(60):
        with timed.gate.admitted(timed.now + 1) as place:
            place.is_answer, place.is_late = False, True
            timed.now += 0.001
    assert timed.gate.limit == 1


def test_one_with_no_time_to_begin_with_closes_nothing() -> None:
    timed = Timed(8)
    timed.answers(10, took_s=0.1, granted_s=1)
    timed.answers(20, took_s=0.05, granted_s=0.05)
    assert timed.gate.limit == 8


def test_who_would_wait_in_vain_is_told_at_once() -> None:
    timed = Timed(1, queue=9)
    timed.answers(10, took_s=2, granted_s=99)
    with filled(timed.gate, 1), pytest.raises(OverloadedError) as refused, timed.gate.admitted(timed.now + 1):
        pass
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (503, "deadline", 2)
    assert (timed.gate.inflight, timed.gate.waiting) == (0, 0)


def test_a_turn_that_came_too_late_is_passed_on() -> None:
    timed, outcomes = Timed(1, queue=9), list[str]()
    timed.answers(10, took_s=2, granted_s=99)

    def work(granted_s: float) -> None:
        try:
            with timed.gate.admitted(timed.now + granted_s):
                outcomes.append(f"{granted_s} in")
        except OverloadedError:
            outcomes.append(f"{granted_s} out")

    with ThreadPoolExecutor(2) as pool, filled(timed.gate, 1):
        for number, granted_s in enumerate((5, 50)):
            pool.submit(work, granted_s)
            wait_until(lambda n=number: timed.gate.waiting == n + 1)  # type: ignore[misc]
        timed.now += 4
    assert sorted(outcomes) == ["5 out", "50 in"]
    assert (timed.gate.inflight, timed.gate.waiting) == (0, 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 12))
def test_never_more_than_allowed_and_nothing_is_lost(places: int, queue: int, callers: int) -> None:
    gate, lock = Gate(places, queue), threading.Lock()
    inside, most, done, refused = 0, 0, 0, 0

    def call(_number: int) -> None:
        nonlocal inside, most, done, refused
        try:
            with gate.admitted(inf):
                with lock:
                    inside, most = inside + 1, max(most, inside + 1)
                with lock:
                    inside, done = inside - 1, done + 1
        except OverloadedError:
            with lock:
                refused += 1

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(call, range(callers)))
    assert most <= places
    assert done + refused == callers
    assert (gate.inflight, gate.waiting) == (0, 0)


@pytest.mark.parametrize("passed_s", [4.5, 6])
def test_where_all_are_kept_who_waited_in_vain_is_let_in_without_time(passed_s: float) -> None:
    timed, places = Timed(1, queue=9), list[Place]()
    timed.gate = Gate(1, 9, clock=lambda: timed.now, keeps_all=True)
    timed.answers(10, took_s=2, granted_s=99)

    def work() -> None:
        with timed.gate.admitted(timed.now + 5) as place:
            places.append(place)

    with ThreadPoolExecutor(1) as pool, filled(timed.gate, 1):
        pool.submit(work)
        wait_until(lambda: timed.gate.waiting == 1)
        timed.now += passed_s  # too late for an answer as they usually come, and past the deadline
    assert [(place.has_time, place.waited_s) for place in places] == [(False, passed_s)]
    assert (timed.gate.inflight, timed.gate.waiting, timed.gate.limit) == (0, 0, 1)


def test_after_lateness_places_open_slowly_at_first() -> None:
    timed, limits = Timed(8), list[int]()
    timed.answers(10, took_s=0.1, granted_s=1)
    timed.answers(1, took_s=1, granted_s=1)
    for _ in range(100):
        limits.append(timed.gate.limit)
        timed.answers(1, took_s=0.1, granted_s=1, together=timed.gate.limit)
    assert (limits[0], limits[10]) == (5, 5)
    assert limits[30] - limits[20] > limits[10] - limits[0]
    assert limits[-1] == 8


def test_a_full_house_is_known_at_the_door() -> None:
    gate, waited = Gate(1, 1), list[bool]()

    def work() -> None:
        with gate.admitted(inf) as place:
            waited.append(place.has_time)

    gate.refuse_early(inf)
    with ThreadPoolExecutor(1) as pool, filled(gate, 1):
        gate.refuse_early(inf)
        pool.submit(work)
        wait_until(lambda: gate.waiting == 1)
        with pytest.raises(OverloadedError) as refused:
            gate.refuse_early(inf)
        assert refused.value.status == 429
    assert waited == [True]


def test_who_would_wait_in_vain_is_told_at_the_door() -> None:
    timed = Timed(1, queue=9)
    timed.answers(10, took_s=2, granted_s=99)
    timed.gate.refuse_early(timed.now + 1)
    with filled(timed.gate, 1):
        timed.gate.refuse_early(timed.now + 50)
        with pytest.raises(OverloadedError) as refused:
            timed.gate.refuse_early(timed.now + 1)
    assert (refused.value.status, refused.value.code) == (503, "deadline")
