"""Percentiles of the recent past, and the budget for doing things twice."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from functions.dispatcher.budget import Budget
from functions.serving.recent import Recent

durations = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 3)), max_size=60)


@given(durations, st.floats(0.01, 1))
def test_it_is_the_nearest_rank_of_what_is_still_known(added: list[tuple[float, float]], share: float) -> None:
    recent, now_s, all_of_them = Recent(size=20, age_s=10, least=3), 0.0, []
    for duration_s, gap_s in added:
        now_s += gap_s
        recent.add(duration_s, now_s)
        all_of_them.append((now_s, duration_s))
        known = sorted(d for at, d in all_of_them[-20:] if now_s - at <= 10)
        expected = known[math.ceil(share * len(known)) - 1] if len(known) >= 3 else None
        assert recent.percentile(share, now_s) == expected
    assert recent.percentile(share, now_s + 11) is None


@given(st.floats(0.0, 1), st.lists(st.booleans(), max_size=300))
def test_no_more_is_taken_than_the_share_and_a_few(share: float, wishes: list[bool]) -> None:
    budget, taken = Budget(), 0
    for number, wish in enumerate(wishes, 1):
        budget.deposit(share)
        could = budget.available
        took = wish and budget.take()
        assert took == (wish and could)
        taken += took
        assert taken <= (share * number + 3 + 1e-9 if share else 0)
