"""Calibrate a tier on held-out data: when to reject, how sure an answer is, and from where on to trust it.

Input are *readings*: the tier's own label logits for labelled utterances, so nothing here runs a model. Readings carry
weights, because the held-out split has too few out-of-scope queries: they are weighted up to the share that the
deployment is expected to have (18 % for `assistant`), and every count of evidence uses the effective sample size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import DataError
from models.runtime import frames
from models.runtime.confidence import FINAL_FEATURES, FORECAST_FEATURES, Logistic, features
from models.skills import OUT_OF_SCOPE, Frame, Skill, slots_from_tags

Doubles = NDArray[np.float64]
FOLDS = 5
CONVERGED = 1e-8
LEAST_ANSWERS, LEAST_READINGS = 40, 100
PRIOR_SHARES = (0.0, 0.5, 1.0)
"""How much of the training prior may be taken off the logits; few, so that little can be fitted to chance."""
START_SHARE = 0.3
"""Where testing starts, fixed before any data is seen: a device that keeps less than this is of no use."""


@dataclass(frozen=True)
class Reading:
    """What a tier saw for one utterance: `intent_logits` (n_intents,); `tag_logits` (n_words, n_tags) or None."""

    words: tuple[str, ...]
    target: Frame
    intent_logits: NDArray[np.float32]
    tag_logits: NDArray[np.float32] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Decoded:
    """A reading turned into an answer: the frame, its steps, and whether it is right."""

    frame: Frame
    steps: tuple[frames.Choice, ...]
    right: bool
    weight: float


@dataclass(frozen=True)
class Level:
    """What the threshold promises: P(error among local answers > `error`) ≤ `delta`."""

    error: float = 0.05
    delta: float = 0.05
    oos_share: float = 0.18
    max_in_scope_loss: float = 0.003
    cascade_loss: float = 0.001


def decode(reading: Reading, skill: Skill, rule: frames.IntentRule) -> Decoded:
    """Answer as the runtime does."""
    choice = frames.choose_intent(reading.intent_logits, skill, rule)
    steps = [choice]
    slots = {}
    if reading.tag_logits is not None and skill.slots.get(choice.label):
        tags = frames.tags(reading.tag_logits, skill, choice.label)
        steps.extend(tags)
        slots = slots_from_tags(reading.words, [t.label for t in tags])
    frame = Frame(choice.label, slots)
    return Decoded(frame, tuple(steps), frame == reading.target, reading.weight)


def weigh(readings: Sequence[Reading], oos_share: float) -> list[Reading]:
    """Weight out-of-scope readings so that they make up `oos_share`; without any, leave the readings as they are."""
    n_out = sum(r.target.intent == OUT_OF_SCOPE for r in readings)
    n_in = len(readings) - n_out
    if not n_out or not n_in:
        return list(readings)
    factor = oos_share / (1 - oos_share) * n_in / n_out
    return [replace(r, weight=factor) if r.target.intent == OUT_OF_SCOPE else r for r in readings]


def fit_prior(readings: Sequence[Reading], skill: Skill, prior: Sequence[float]) -> tuple[float, ...]:
    """Pick the share of the training prior (n_intents,) that makes in-scope accuracy best with all intents as common.

    Readings are taken to be drawn as the training set was, so each weighs the more the rarer its intent is there.
    Raises `DataError` if the prior has not one value an intent.
    """
    inside = [r for r in readings if r.target.intent != OUT_OF_SCOPE]
    if not inside or not any(prior):
        return ()
    if len(prior) != len(skill.intents):
        raise DataError(f"skill '{skill.name}': the prior has {len(prior)} values for {len(skill.intents)} intents")
    scores = np.stack([r.intent_logits for r in inside]).astype(np.float64)
    targets = np.array([skill.intents.index(r.target.intent) for r in inside])
    weights = np.exp(-np.asarray(prior))[targets]
    best = max(PRIOR_SHARES, key=lambda s: float(((scores - s * np.asarray(prior)).argmax(1) == targets) @ weights))
    return tuple(best * p for p in prior) if best else ()


def fit_reject(
    readings: Sequence[Reading], skill: Skill, level: Level, prior: tuple[float, ...] = ()
) -> frames.IntentRule:
    """Pick bias and floor for the best weighted accuracy that costs at most `max_in_scope_loss` in scope."""
    plain = frames.IntentRule(prior=prior)
    if not any(r.target.intent == OUT_OF_SCOPE for r in readings) or OUT_OF_SCOPE not in skill.intents:
        return plain
    scores = np.stack([r.intent_logits for r in readings]).astype(np.float64)
    if prior:
        scores -= prior
    row = skill.intents.index(OUT_OF_SCOPE)
    targets = np.array([skill.intents.index(r.target.intent) for r in readings])
    weights, inside = np.array([r.weight for r in readings]), targets != row
    own, scores[:, row] = scores[:, row].copy(), -math.inf
    tops, known = scores.max(1), scores.argmax(1) == targets
    base = float((known & (tops >= own))[inside].mean())
    best, best_score = plain, -1.0
    for bias in np.arange(-1.0, 4.01, 0.5):
        for floor in [-math.inf, *np.quantile(tops, np.linspace(0.005, 0.3, 60))]:
            right = np.where(np.logaddexp(own + bias, floor) > tops, ~inside, known)
            score = float((right * weights).sum() / weights.sum())
            if right[inside].mean() >= base - level.max_in_scope_loss and score > best_score:
                best, best_score = frames.IntentRule(float(bias), float(floor), prior), score
    return best


def fit_logistic(x: Doubles, y: Doubles, weights: Doubles, ridge: float = 2.0) -> Logistic:
    """Weighted logistic regression by Newton's method; the ridge keeps separable data finite."""
    means, scales = x.mean(0), np.maximum(x.std(0), 1e-6)
    z = np.column_stack([np.ones(len(x)), (x - means) / scales])
    penalty = np.full(z.shape[1], ridge)
    penalty[0] = 1e-3
    beta = np.zeros(z.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(z @ beta, -30, 30)))
        curve = weights * np.maximum(p * (1 - p), 1e-6)
        step = np.linalg.solve(
            (z * curve[:, None]).T @ z + np.diag(penalty), z.T @ (weights * (y - p)) - penalty * beta
        )
        beta += step
        if np.abs(step).max() < CONVERGED:
            break
    return Logistic(float(beta[0]), *(tuple(float(v) for v in vs) for vs in (beta[1:], means, scales)))


def fit_stage(answers: Sequence[Decoded], n_features: int) -> dict[str, Logistic]:
    """A calibrator for answers in scope and one for rejections; where one kind is rare, both share one model."""
    out = np.array([a.frame.intent == OUT_OF_SCOPE for a in answers])
    x = np.array([features(a.steps)[:n_features] for a in answers])
    y, w = np.array([float(a.right) for a in answers]), np.array([a.weight for a in answers])
    models = {}
    for name, mask in (("in_scope", ~out), (OUT_OF_SCOPE, out)):
        used = mask if mask.sum() >= LEAST_ANSWERS and 0 < y[mask].mean() < 1 else np.ones(len(y), bool)
        models[name] = fit_logistic(x[used], y[used], w[used])
    return models


def apply(models: Mapping[str, Logistic], answers: Sequence[Decoded]) -> Doubles:
    """Calibrated confidence of each answer."""
    return np.array(
        [models[OUT_OF_SCOPE if a.frame.intent == OUT_OF_SCOPE else "in_scope"](features(a.steps)) for a in answers]
    )


def cross_fitted(answers: Sequence[Decoded], n_features: int) -> Doubles:
    """Confidence of each answer by a calibrator that has not seen it (five folds)."""
    confidence = np.empty(len(answers))
    for fold in range(FOLDS):
        train = [a for i, a in enumerate(answers) if i % FOLDS != fold]
        held = range(fold, len(answers), FOLDS)
        confidence[fold::FOLDS] = apply(fit_stage(train, n_features), [answers[i] for i in held])
    return confidence


def learn_then_test(confidence: Doubles, right: NDArray[np.bool_], weights: Doubles, level: Level) -> float:
    """Smallest threshold whose error among accepted answers is proven ≤ `error`.

    Learn-then-Test (Angelopoulos et al., arXiv 2110.01052) in a fixed sequence from strict to loose: start where
    `START_SHARE` is accepted (and enough to prove anything), stop at the first threshold where the binomial tail of
    the observed errors exceeds `delta`. Weighted counts enter by their effective sample size. Returns 1.0 if nothing
    can be proven.
    """
    order = np.argsort(-confidence)
    w, wrong = weights[order], (~right[order]).astype(np.float64)
    total, squares, errors = np.cumsum(w), np.cumsum(w * w), np.cumsum(w * wrong)
    effective = total**2 / squares
    provable = math.ceil(math.log(level.delta) / math.log(1 - level.error))
    accepted = 1.0
    for i in range(max(provable, math.ceil(START_SHARE * len(order))), len(order)):
        if i + 1 < len(order) and confidence[order[i]] == confidence[order[i + 1]]:
            continue
        n = math.floor(effective[i])
        if binomial_cdf(math.ceil(errors[i] / total[i] * n - 1e-9), n, level.error) > level.delta:
            break
        accepted = float(confidence[order[i]])
    return accepted


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X ≤ k) for X ~ Binomial(n, p)."""
    terms = (
        math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) + j * math.log(p) + (n - j) * math.log1p(-p)
        for j in range(min(k, n) + 1)
    )
    return min(1.0, math.fsum(math.exp(t) for t in terms))


def near_edge(
    confidence: Doubles, right: NDArray[np.bool_], edge_right: NDArray[np.bool_], weights: Doubles, loss: float
) -> float:
    """Smallest threshold at which the cascade's weighted accuracy stays within `loss` of the edge's own."""
    order = np.argsort(confidence)
    w = weights[order] / weights.sum()
    gain = np.cumsum((w * (edge_right[order].astype(float) - right[order]))[::-1])[
        ::-1
    ]  # loss if all from i on are local
    good = np.flatnonzero(gain <= loss)
    return float(confidence[order[good[0]]]) if len(good) else 1.0


def calibrate(
    readings: Sequence[Reading],
    skill: Skill,
    level: Level,
    edge_right: Sequence[bool] | None = None,
    grade: Callable[[Reading], Frame] | None = None,
    prior: Sequence[float] = (),
) -> dict[str, Any]:
    """Fit one skill's calibration entry for the manifest, with a report of what it promises.

    `edge_right` (same order) also keeps the cascade within `cascade_loss` of the edge; `grade` replaces the label by
    another judge's frame, for data without labels; `prior` (n_intents,) is the log of how common each intent was in
    training. Raises `DataError` with fewer than 100 readings.
    """
    if len(readings) < LEAST_READINGS:
        raise DataError(
            f"skill '{skill.name}': {len(readings)} held-out examples are too few to calibrate; "
            f"give at least {LEAST_READINGS}"
        )
    judged = [replace(r, target=grade(r)) for r in readings] if grade else list(readings)
    weighed = weigh(judged, level.oos_share)
    rule = fit_reject(weighed, skill, level, fit_prior(weighed, skill, prior))
    answers = [decode(r, skill, rule) for r in weighed]
    stages = {
        "final": len(FINAL_FEATURES) if skill.tags else len(FORECAST_FEATURES),
        "forecast": len(FORECAST_FEATURES),
    }
    confidence = cross_fitted(answers, stages["final"])
    right, weights = np.array([a.right for a in answers]), np.array([a.weight for a in answers])
    tested = learn_then_test(confidence, right, weights, level)
    bound = (
        near_edge(confidence, right, np.array(edge_right), weights, level.cascade_loss)
        if edge_right is not None
        else 0.0
    )
    threshold = max(tested, bound)
    local = confidence >= threshold
    return {
        **rule_entry(rule),
        **{stage: stage_entry(answers, n) for stage, n in stages.items()},
        "threshold": threshold,
        "promise": {
            "local_error_at_most": level.error,
            "delta": level.delta,
            "oos_share": level.oos_share if any(r.target.intent == OUT_OF_SCOPE for r in judged) else 0.0,
            "share_to_edge": _share(~local, weights),
            "local_error_seen": _share((~right)[local], weights[local]),
            "accuracy": _share(right, weights),
            "n": len(readings),
            "learn_then_test_threshold": tested,
        },
    }


def _share(mask: NDArray[np.bool_], weights: Doubles) -> float:
    return float((mask * weights).sum() / weights.sum()) if weights.sum() else 0.0


def rule_entry(rule: frames.IntentRule) -> dict[str, Any]:
    """A rule as it stands in a calibration."""
    reject = {"bias": rule.bias, "floor": rule.floor if math.isfinite(rule.floor) else -1e9}
    return {"reject": reject, **({"prior": list(rule.prior)} if rule.prior else {})}


def stage_entry(answers: Sequence[Decoded], n_features: int) -> dict[str, Any]:
    """The calibrators of one stage as they stand in a calibration."""
    return {name: _entry(model) for name, model in fit_stage(answers, n_features).items()}


def _entry(model: Logistic) -> dict[str, Any]:
    return {"bias": model.bias, **{k: list(getattr(model, k)) for k in ("weights", "means", "scales")}}
