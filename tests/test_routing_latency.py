"""The latency ceiling: shut above it, probes while shut, open again below the lower bound. Time is an argument."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.latency import LatencyGate, LatencyLimits

LIMITS = LatencyLimits(canned_above_ms=100, back_below_ms=60, window=20, window_s=30, probe_every=4, probe_after_s=10)


def after(gate: LatencyGate, *took_ms: float, begin_s: float = 0.0) -> LatencyGate:
    """The gate after requests that took so long, a tenth of a second apart."""
    for number, value in enumerate(took_ms):
        gate = gate.observe(begin_s + number / 10, value)
    return gate


def test_fast_answers_leave_it_open() -> None:
    gate = after(LatencyGate(LIMITS), *[50, 90, 99] * 20)
    assert not gate.canned
    assert gate.admit(7.0) == (gate, True)


def test_it_shuts_when_the_percentile_is_over_the_ceiling_and_not_for_a_single_outlier() -> None:
    assert not after(LatencyGate(LIMITS), *[50] * 19, 500).canned
    assert after(LatencyGate(LIMITS), *[50] * 18, 500, 500).canned


def test_nothing_is_decided_on_too_few_samples() -> None:
    assert not after(LatencyGate(LIMITS), *[500] * 4).canned
    assert after(LatencyGate(LIMITS), *[500] * 5).canned


def test_samples_age_out() -> None:
    gate = after(LatencyGate(LIMITS), *[500] * 4)
    assert not after(gate, 500, begin_s=31).canned


def test_while_it_is_shut_every_fourth_request_is_a_probe() -> None:
    gate, admitted = after(LatencyGate(LIMITS), *[500] * 5), []
    for _ in range(8):
        gate, admits = gate.admit(1.0)
        admitted.append(admits)
    assert admitted == [False, False, False, True] * 2


def test_with_few_requests_one_goes_through_after_a_while() -> None:
    gate = after(LatencyGate(LIMITS), *[500] * 5)
    assert [gate.admit(now_s)[1] for now_s in (1.0, 9.0, 10.5)] == [False, False, True]


def test_it_comes_back_by_itself_below_the_lower_bound_only() -> None:
    shut = after(LatencyGate(LIMITS), *[500] * 5)
    between = after(shut, *[80] * 30, begin_s=1)
    assert between.canned
    back = after(shut, *[50] * 5, begin_s=1)
    assert not back.canned
    assert not after(back, *[90] * 20, begin_s=2).canned  # what opened it is forgotten: it starts afresh


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"back_below_ms": 100}, "back_below_ms"),
        ({"back_below_ms": float("nan")}, "back_below_ms"),
        ({"canned_above_ms": float("inf")}, "canned_above_ms"),
        ({"percentile": 0}, "percentile"),
        ({"least_samples": 65}, "least_samples"),
        ({"probe_every": 0}, "probe_every"),
    ],
)
def test_limits_under_which_it_would_flutter_or_stick_are_refused(changes: dict[str, float], field: str) -> None:
    values = {"canned_above_ms": 100, "back_below_ms": 60, **changes}
    with pytest.raises(ValueError, match=field):
        LatencyLimits(**values)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.floats(0.001, 5), st.floats(0, 1000)), max_size=200))
def test_whatever_happens_it_is_bounded_never_stuck_and_changes_only_over_its_bounds(
    steps: list[tuple[float, float]],
) -> None:
    gate, now_s, refused = LatencyGate(LIMITS), 0.0, 0
    for pause_s, took_ms in steps:
        now_s += pause_s
        gate, admits = gate.admit(now_s)
        refused = 0 if admits else refused + 1
        assert refused < LIMITS.probe_every
        if not admits:
            continue
        before, gate = gate, gate.observe(now_s, took_ms)
        assert len(gate.samples) <= LIMITS.window
        if gate.canned != before.canned:
            seen = [value for when, value in before.samples if when > now_s - LIMITS.window_s] + [took_ms]
            assert max(seen) > LIMITS.canned_above_ms if gate.canned else min(seen) < LIMITS.back_below_ms
            assert len(seen) >= LIMITS.least_samples


@given(st.lists(st.floats(0, 1000), max_size=50), st.integers(0, 3))
def test_once_the_models_are_fast_again_it_opens_within_a_bounded_number_of_requests(
    history: list[float], offset: int
) -> None:
    gate, now_s = after(LatencyGate(LIMITS), *history), 5.0 + offset
    for _ in range(LIMITS.probe_every * (LIMITS.window + LIMITS.least_samples)):
        now_s += 0.01
        gate, admits = gate.admit(now_s)
        if admits:
            gate = gate.observe(now_s, 10)
    assert not gate.canned
