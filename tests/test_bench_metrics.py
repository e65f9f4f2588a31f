"""The figures: checked against small sums by hand, and by property."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.metrics import Outcome, ece, ece_floor, local_error, mean, oracle, percentile, row, trade_off
from bench.queries import OUT_OF_SCOPE

floats = st.floats(min_value=0, max_value=1e6, allow_nan=False)
stated = st.tuples(st.floats(min_value=0, max_value=1), st.booleans())


def made(
    right=True,
    *,
    expected="a",
    predicted="a",
    local=True,
    confidence=None,
    latency_ms=1.0,
    network_bytes=0,
    joules=None,
):
    return Outcome(expected, predicted, right, local, latency_ms, confidence, network_bytes, joules)


outcomes = st.builds(
    made,
    st.booleans(),
    expected=st.sampled_from(["a", OUT_OF_SCOPE]),
    predicted=st.sampled_from(["a", OUT_OF_SCOPE, None]),
    local=st.booleans(),
    confidence=st.none() | st.floats(min_value=0, max_value=1),
    latency_ms=floats,
)


@given(st.lists(floats, min_size=1), st.floats(min_value=0, max_value=1))
def test_a_percentile_lies_within_and_grows(values, q):
    assert min(values) <= percentile(values, q) <= max(values)
    assert percentile(values, q) <= percentile(values, min(1.0, q + 0.1)) + 1e-6


@given(st.lists(floats, min_size=1))
def test_the_ends_and_the_middle_of_percentiles(values):
    assert percentile(values, 0) == min(values)
    assert percentile(values, 1) == max(values)
    assert percentile(values, 0.5) == pytest.approx(statistics.median(values))


def test_percentiles_run_linearly_between_neighbours():
    assert percentile([10, 20, 30, 40, 50], 0.95) == pytest.approx(48)
    assert percentile([], 0.5) is None
    assert mean([]) is None


@given(st.lists(stated, min_size=1, max_size=200))
def test_calibration_error_is_a_share_and_no_less_than_the_bias(pairs):
    error = ece(pairs)
    bias = abs(sum(c for c, _ in pairs) - sum(r for _, r in pairs)) / len(pairs)
    assert bias - 1e-9 <= error <= 1 + 1e-9


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_certainty_that_is_always_true_has_no_calibration_error(right):
    assert ece([(float(r), r) for r in right]) == pytest.approx(0)


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.booleans()), min_size=1, max_size=80), st.randoms())
def test_calibration_error_does_not_hang_on_the_order_of_ties(pairs, rng):
    mixed = list(pairs)
    rng.shuffle(mixed)
    assert ece(mixed) == pytest.approx(ece(pairs))


def test_calibration_error_by_hand():
    """Thirty that say the same and are right in half the cases: 0.5 is honest, 0.9 is 0.4 too much."""
    assert ece([(0.5, i % 2 == 0) for i in range(30)]) == pytest.approx(0)
    assert ece([(0.9, i % 2 == 0) for i in range(30)]) == pytest.approx(0.4)
    assert ece([]) is None


@pytest.mark.parametrize("n", [60, 350, 3000])
def test_the_floor_is_what_honest_confidences_show_on_average(n):
    rng = random.Random(n)
    confidences = [rng.uniform(0.5, 1) for _ in range(n)]
    draws = [ece([(c, rng.random() < c) for c in confidences]) for _ in range(100)]
    assert ece_floor(confidences) == pytest.approx(mean(draws), rel=0.1)


def test_the_floor_of_certainty_is_nothing():
    assert ece_floor([0.0, 1.0] * 40) == 0
    assert ece_floor([]) is None


def test_a_row_by_hand():
    found = row(
        [
            made(latency_ms=10, confidence=0.9, network_bytes=0, joules=1.0),
            made(right=False, predicted="b", local=False, latency_ms=20, confidence=0.5, network_bytes=300),
            made(expected=OUT_OF_SCOPE, predicted=OUT_OF_SCOPE, latency_ms=30),
            made(right=False, expected=OUT_OF_SCOPE, predicted="a", latency_ms=40),
            made(right=False, expected="a", predicted=OUT_OF_SCOPE, latency_ms=50, joules=2.0),
        ]
    )
    assert found.n == 5
    assert found.accuracy == pytest.approx(2 / 5)
    assert found.in_scope_accuracy == pytest.approx(1 / 3)
    assert (found.oos_recall, found.oos_precision) == (pytest.approx(1 / 2), pytest.approx(1 / 2))
    assert found.share_local == pytest.approx(4 / 5)
    assert (found.mean_ms, found.p50_ms, found.p95_ms) == (30, 30, pytest.approx(48))
    assert (found.bytes, found.joules, found.mean_confidence) == (60, 1.5, pytest.approx(0.7))


def test_an_empty_row_says_nothing_rather_than_zero():
    found = row([])
    assert found.n == 0
    assert all(value is None for name, value in found.as_dict().items() if name != "n")


@given(st.lists(st.tuples(outcomes, outcomes), min_size=1, max_size=20))
def test_the_oracle_is_at_least_as_good_as_any_threshold(pairs):
    best = sum(oracle(d, e).right for d, e in pairs) / len(pairs)
    points = trade_off(pairs)
    assert all(p.accuracy <= best + 1e-9 for p in points)
    assert oracle(*pairs[0]).right == (pairs[0][0].right or pairs[0][1].right)


@given(st.lists(st.tuples(outcomes, outcomes), min_size=1, max_size=20))
def test_the_trade_off_goes_from_all_edge_to_all_device(pairs):
    points = trade_off(pairs)
    assert points[0].share_local == 0
    assert points[0].accuracy == pytest.approx(sum(e.right for _, e in pairs) / len(pairs))
    assert points[-1].share_local == 1
    assert points[-1].accuracy == pytest.approx(sum(d.right for d, _ in pairs) / len(pairs))
    shares = [p.share_local for p in points]
    assert shares == sorted(set(shares))


@given(st.lists(st.tuples(outcomes, outcomes), min_size=1, max_size=20))
def test_each_point_is_what_that_threshold_gives(pairs):
    for point in trade_off(pairs)[1:]:
        kept = [
            d if (d.confidence if d.confidence is not None else -math.inf) >= point.threshold else e for d, e in pairs
        ]
        assert point.accuracy == pytest.approx(sum(o.right for o in kept) / len(kept))


def test_the_error_among_local_answers():
    assert local_error([made(), made(right=False), made(right=False, local=False)]) == pytest.approx(0.5)
    assert local_error([made(local=False)]) is None
    assert trade_off([]) == []
