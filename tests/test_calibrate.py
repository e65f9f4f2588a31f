"""Calibration on simulated tiers whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.build.calibrate import (
    Level,
    Reading,
    apply,
    binomial_cdf,
    calibrate,
    decode,
    fit_prior,
    fit_reject,
    fit_stage,
    learn_then_test,
    near_edge,
    weigh,
)
from models.errors import DataError
from models.runtime import frames
from models.runtime.confidence import Confidence
from models.skills import OUT_OF_SCOPE, Frame, Skill

SKILL = Skill("desk", (*[f"i{n}" for n in range(9)], OUT_OF_SCOPE))


def readings(count: int, seed: int, oos: int = 0) -> list[Reading]:
    """A tier whose logits are noisy: in-scope ones peak at the truth, out-of-scope ones stay flat."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        logits = rng.normal(0, 1.2, len(SKILL.intents)).astype(np.float32)
        target = OUT_OF_SCOPE if i < oos else SKILL.intents[int(rng.integers(9))]
        logits[SKILL.intents.index(target)] += 0.0 if i < oos else rng.choice([1.5, 6.0])
        made.append(Reading(("w",), Frame(target), logits))
    return made


def expected_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over equal-mass bins."""
    parts = np.array_split(np.argsort(confidence), bins)
    return float(sum(len(p) * abs(confidence[p].mean() - right[p].mean()) for p in parts) / len(right))


def test_confidence_fitted_on_one_half_is_calibrated_on_the_other() -> None:
    fit, test = ([decode(r, SKILL, frames.IntentRule()) for r in readings(4000, seed)] for seed in (1, 2))
    confidence = apply(fit_stage(fit, 2), test)
    assert expected_error(confidence, np.array([a.right for a in test])) < 0.03


def test_weights_bring_out_of_scope_to_its_stated_share() -> None:
    weighed = weigh(readings(1000, 3, oos=30), 0.18)
    out = sum(r.weight for r in weighed if r.target.intent == OUT_OF_SCOPE)
    assert out / sum(r.weight for r in weighed) == pytest.approx(0.18)


def test_rejection_gains_recall_within_the_loss_allowed_in_scope() -> None:
    data, level = weigh(readings(3000, 4, oos=150), 0.18), Level(max_in_scope_loss=0.02)
    plain = [decode(r, SKILL, frames.IntentRule()) for r in data]
    rule = fit_reject(data, SKILL, level)
    tuned = [decode(r, SKILL, rule) for r in data]

    def shares(answers: list) -> tuple[float, float]:
        inside = np.array([r.target.intent != OUT_OF_SCOPE for r in data])
        right = np.array([a.right for a in answers])
        return float(right[inside].mean()), float(right[~inside].mean())

    assert shares(tuned)[0] >= shares(plain)[0] - 0.02
    assert shares(tuned)[1] > shares(plain)[1]


def test_what_a_tier_owes_to_commoner_intents_is_taken_off() -> None:
    prior = [math.log(3) if n < 3 else math.log(0.25) if n < 9 else 0.0 for n in range(10)]
    data = [Reading(r.words, r.target, r.intent_logits + np.array(prior, np.float32)) for r in readings(3000, 8)]
    found = fit_prior(data, SKILL, prior)

    def accuracy(rule: frames.IntentRule) -> float:
        return float(np.mean([decode(r, SKILL, rule).right for r in data]))

    assert found == tuple(prior)
    assert accuracy(frames.IntentRule(prior=found)) > accuracy(frames.IntentRule())
    assert fit_prior(data, SKILL, [0.0] * 10) == ()


def test_a_prior_for_other_intents_is_refused() -> None:
    with pytest.raises(DataError, match="2 values for 10 intents"):
        fit_prior(readings(200, 9), SKILL, [0.1, -0.1])


def test_the_promise_of_the_threshold_holds_on_fresh_data_nearly_always() -> None:
    """With δ = 5 % a run breaks its promise once in twenty; 6 or more of 40 has probability below 1.4 %."""
    level, broken = Level(error=0.05, delta=0.05), 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sure = rng.uniform(0.4, 1.0, 1500)
        right = rng.random(1500) < sure
        threshold = learn_then_test(sure, right, np.ones(1500), level)
        true_error = 1 - (threshold + 1) / 2  # confidence is uniform and honest above the threshold
        broken += threshold < 1.0 and true_error > level.error
    assert broken <= 5


def test_nothing_is_promised_when_nothing_can_be_proven() -> None:
    assert learn_then_test(np.linspace(0, 1, 300), np.zeros(300, bool), np.ones(300), Level()) == 1.0


@given(st.integers(0, 30), st.integers(1, 30), st.floats(0.01, 0.99))
def test_binomial_tail_equals_the_plain_sum(k: int, n: int, p: float) -> None:
    plain = sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(min(k, n) + 1))
    assert binomial_cdf(k, n, p) == pytest.approx(min(plain, 1.0), abs=1e-9)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.0, 0.05))
def test_the_cascade_stays_within_the_allowed_loss(seed: int, loss: float) -> None:
    rng = np.random.default_rng(seed)
    confidence, edge = rng.random(400), rng.random(400) < 0.97
    right = rng.random(400) < confidence
    threshold = near_edge(confidence, right, edge, np.ones(400), loss)
    cascade = np.where(confidence >= threshold, right, edge)
    assert cascade.mean() >= edge.mean() - loss - 1e-9


def test_a_calibrated_entry_is_read_back_by_the_runtime() -> None:
    entry = calibrate(readings(2000, 5, oos=60), SKILL, Level())
    confidence = Confidence.from_manifest({"desk": entry})
    sure, unsure = frames.Choice("i1", math.log(0.99), 0.98), frames.Choice("i1", math.log(0.3), 0.05)
    assert confidence.final("desk", "i1", [sure]) > confidence.final("desk", "i1", [unsure])  # type: ignore[operator]
    assert confidence.threshold("desk") == entry["threshold"]


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(DataError, match="at least 100"):
        calibrate(readings(99, 6), SKILL, Level())
