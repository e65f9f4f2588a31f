"""What is asked of the HPA, held against the HPA's own arithmetic."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.tolerance import asked


def within(ratio: float, tolerance: float) -> bool:
    """Since 1.33."""
    return 1.0 - tolerance <= ratio <= 1.0 + tolerance


def within_before(ratio: float, tolerance: float) -> bool:
    """Up to 1.32; at the very edge floats make it differ."""
    return abs(1.0 - ratio) <= tolerance


def hpa(value: float, current: int, tolerance: float = 0.1, holds=within) -> int:
    """`GetExternalPerPodMetricReplicas`, target 1, as Kubernetes documents it; the metric comes in thousandths."""
    usage, target = int(value * 1000), 1000
    return current if holds(usage / (target * current), tolerance) else math.ceil(usage / target)


@pytest.mark.parametrize(
    ("current", "wanted", "value"),
    [(12, 13, 14), (10, 11, 12), (9, 10, 10), (20, 21, 23), (20, 22, 23), (12, 12, 12), (14, 13, 13), (12, 20, 20)],
)
def test_the_value_for_some_cases(current, wanted, value):
    assert asked(wanted, current, 0.1) == value


def test_without_it_the_thirteenth_replica_would_never_come():
    assert hpa(13, 12) == 12
    assert hpa(13.2, 12) == 12, "the edge of the band lies within it"
    assert hpa(13.201, 12) == 14, "no value gives 13"
    assert hpa(asked(13, 12, 0.1), 12) == 14


@given(st.integers(1, 1000), st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.33]))
def test_the_hpa_runs_what_is_wanted_or_a_little_more_and_then_rests(current, wanted, tolerance):
    value = asked(wanted, current, tolerance)
    replicas = hpa(value, current, tolerance)
    if wanted > current:
        assert wanted <= replicas <= max(wanted, math.floor(current * (1 + tolerance)) + 1)
        assert hpa(value, current, tolerance, within_before) == replicas
        if wanted < replicas:
            assert hpa(asked(wanted, replicas, tolerance), replicas, tolerance) == replicas, "no swinging"
    else:
        assert value == wanted
        assert wanted <= replicas <= current


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.2]))
def test_no_smaller_value_would_do(current, wanted, tolerance):
    value = asked(wanted, current, tolerance)
    if value > wanted:
        assert hpa(value - 1, current, tolerance) < wanted


@pytest.mark.parametrize("wanted", [0, 1, 7])
def test_from_zero_what_is_wanted_is_asked(wanted):
    assert asked(wanted, 0, 0.1) == wanted
