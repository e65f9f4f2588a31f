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

from functions.serving.admission import Gate
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
    with gate.admitted(inf) as waited_s:
        assert (waited_s, gate.inflight) == (0.0, 1)
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
        with gate.admitted(inf) as waited_s:
            order.append(number)
            assert waited_s > 0

    with ThreadPoolExecutor(3) as pool, filled(gate, 1):
        for number in range(3):
            pool.submit(work, number)
            wait_until(lambda n=number: gate.waiting == n + 1)  # type: ignore[misc]
    assert order == [0, 1, 2]


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
