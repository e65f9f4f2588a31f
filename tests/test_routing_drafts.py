"""Whether a draft is worth sending, by what was measured."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.drafts import FIRST_PIECE, Acceptance, expected_tokens, tokens_looked_at, worth_drafting

RATES = st.floats(0, 1)
MS = st.floats(0.01, 1e4)


@pytest.mark.parametrize(
    ("round_trip_ms", "acceptance", "tokens", "ms_per_token", "ms_per_verified_token", "worth"),
    [
        (12, 0.8, 30, 10, 2, True),  # four tokens saved, some fourteen looked at
        (12, 0.1, 30, 10, 2, False),  # mostly read in vain
        (12, 0.8, 1, 10, 2, True),
        (12, 0.8, 0, 10, 2, False),  # no draft
        (12, 1.0, 100, 10, 10, False),  # verifying costs as much as decoding
        (2000, 0.8, 30, 10, 2, False),  # 20 ms are not noticed in two seconds
        (12, 0.8, 30, math.nan, 2, False),  # not measured yet
        (math.nan, 0.8, 30, 10, 2, False),
        (12, math.nan, 30, 10, 2, False),
        (12, 0.8, 30, 10, math.inf, False),
    ],
)
def test_worth_drafting(
    round_trip_ms: float, acceptance: float, tokens: int, ms_per_token: float, ms_per_verified_token: float, worth: bool
) -> None:
    assert worth_drafting(round_trip_ms, acceptance, tokens, ms_per_token, ms_per_verified_token) is worth


@given(RATES, RATES, st.integers(0, 200), MS, MS, MS)
def test_a_likelier_draft_is_never_worth_less(
    a: float, b: float, tokens: int, round_trip_ms: float, step_ms: float, verify_ms: float
) -> None:
    """As long as looking at a token costs less than a step, and the draft is one piece."""
    low, high = sorted((a, b))
    tokens = min(tokens, FIRST_PIECE)
    if worth_drafting(round_trip_ms, low, tokens, step_ms, verify_ms):
        assert worth_drafting(round_trip_ms, high, tokens, step_ms, verify_ms)


@given(st.floats(0, 0.99), st.integers(0, 60))
def test_expectations_are_those_of_trials(acceptance: float, tokens: int) -> None:
    """Against the sum over where the first disagreement may be."""
    chances = [acceptance**k * (1 - acceptance) for k in range(tokens)] + [acceptance**tokens]
    assert expected_tokens(acceptance, tokens) == pytest.approx(sum(k * p for k, p in enumerate(chances)), abs=1e-9)
    ends = [next(e for e in (8, 16, 32, 64, 96) if e > k) for k in range(tokens)] + [tokens]
    looked_at = sum(min(end, tokens) * p for end, p in zip(ends, chances, strict=True))
    assert tokens_looked_at(acceptance, tokens) == pytest.approx(looked_at, abs=1e-9)
    assert expected_tokens(1.0, tokens) == tokens_looked_at(1.0, tokens) == tokens


def test_acceptance_is_learned_and_follows_a_change() -> None:
    """200 drafts of 20 tokens, each token right with p: some 400 trials count, three deviations are 0.075."""
    rng, known = random.Random(4), Acceptance()
    assert known.rate == 0.5
    for p in (0.8, 0.3):
        for _ in range(200):
            accepted = next((k for k in range(20) if rng.random() >= p), 20)
            known = known.after(20, accepted)
        assert known.rate == pytest.approx(p, abs=0.1)


@given(st.lists(st.integers(0, 50).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=30))
def test_a_rate_stays_a_probability(drafts: list[tuple[int, int]]) -> None:
    known = Acceptance()
    for proposed, accepted in drafts:
        known = known.after(proposed, accepted)
        assert 0 <= known.rate <= 1


@pytest.mark.parametrize(("proposed", "accepted"), [(3, 4), (3, -1), (-1, -1)])
def test_what_cannot_be_is_refused(proposed: int, accepted: int) -> None:
    with pytest.raises(ValueError, match="accepted"):
        Acceptance().after(proposed, accepted)
