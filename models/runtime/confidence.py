"""Calibrated confidence: P(the answer is right) from what the decode itself reported.

A frame's evidence is the first label's log-probability and margin, and for slots the two least certain tags, the sum
of the tags' log-probabilities and how many are unsure (Gupta et al. 2024, arXiv 2404.10136: quantiles of token
log-probabilities beat sums and means). A logistic model per skill, fitted on held-out data, maps it to a probability;
answers in and out of scope have a model each, because a rejection is right for other reasons than an intent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from models.skills import OUT_OF_SCOPE

FINAL_FEATURES = (
    "first_logit",
    "first_margin",
    "least_tag_logit",
    "tag_logprob_sum",
    "least_tag_margin",
    "second_least_tag_logprob",
    "unsure_tags",
)
FORECAST_FEATURES = FINAL_FEATURES[:2]
_TINY = 1e-6
_UNSURE = math.log(0.9)
"""Log-probability under which a tag counts as unsure."""


class Evidence(Protocol):
    """What one decoded label reports; `Token` and `Choice` both do."""

    @property
    def logprob(self) -> float:
        """Natural log of the chosen label's probability."""

    @property
    def margin(self) -> float:
        """Probability of the chosen label less the best other's."""


def features(steps: Sequence[Evidence]) -> tuple[float, ...]:
    """`FINAL_FEATURES` of a frame's steps (intent first, then one a word); constants where there are no tags."""
    first, tags = steps[0], steps[1:]
    logprobs = sorted(t.logprob for t in tags) or [0.0]
    return (
        _logit(math.exp(first.logprob)),
        first.margin,
        _logit(math.exp(logprobs[0])),
        max(-20.0, sum(logprobs)),
        min((t.margin for t in tags), default=1.0),
        logprobs[1] if len(logprobs) > 1 else 0.0,
        float(sum(value < _UNSURE for value in logprobs)),
    )


def _logit(p: float) -> float:
    p = min(max(p, _TINY), 1 - _TINY)
    return math.log(p / (1 - p))


@dataclass(frozen=True)
class Logistic:
    """P = 1 / (1 + exp(−(bias + Σ weight·(feature − mean)/scale)))."""

    bias: float
    weights: tuple[float, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]

    def __call__(self, values: Sequence[float]) -> float:
        """Probability for the feature values; extra values at the end are not looked at."""
        used = zip(self.weights, values, self.means, self.scales, strict=False)
        z = self.bias + sum(w * (v - m) / s for w, v, m, s in used)
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, z))))

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Logistic:
        """Read a manifest entry."""
        weights, means, scales = (tuple(float(v) for v in entry[k]) for k in ("weights", "means", "scales"))
        return cls(float(entry["bias"]), weights, means, scales)


@dataclass(frozen=True)
class Confidence:
    """The calibrators of a tier; `None` stands for 'not calibrated'."""

    models: Mapping[tuple[str, str, bool], Logistic]
    thresholds: Mapping[str, float]

    @classmethod
    def from_manifest(
        cls, calibration: Mapping[str, Any], exits: Mapping[int, Mapping[str, Any]] | None = None
    ) -> Confidence:
        """Read the manifest's `calibration`: skill → {final|forecast: {in_scope|out_of_scope: model}, threshold}.

        `exits` are those of early exits, by layers passed.
        """
        early = {
            (skill, f"exit {passed}", scope == OUT_OF_SCOPE): Logistic.from_dict(entry)
            for passed, skills in (exits or {}).items()
            for skill, entries in skills.items()
            for scope, entry in entries["final"].items()
        }
        found = {
            (skill, stage, scope == OUT_OF_SCOPE): Logistic.from_dict(entry)
            for skill, entries in calibration.items()
            for stage in ("final", "forecast")
            for scope, entry in entries.get(stage, {}).items()
        }
        return cls(
            {**found, **early}, {skill: float(e["threshold"]) for skill, e in calibration.items() if "threshold" in e}
        )

    def final(self, skill: str, intent: str, steps: Sequence[Evidence], exit_layer: int | None = None) -> float | None:
        """P(right) of a finished frame, which an early exit may have read."""
        early = self._apply(f"exit {exit_layer}", skill, intent, steps)
        return self._apply("final", skill, intent, steps) if early is None else early

    def forecast(self, skill: str, intent: str, first: Evidence) -> float | None:
        """P(right) of the frame as known after its first label."""
        return self._apply("forecast", skill, intent, (first,))

    def threshold(self, skill: str) -> float:
        """The confidence from which an answer stays local; 1.0 (never) where nothing was calibrated."""
        return self.thresholds.get(skill, 1.0)

    def _apply(self, stage: str, skill: str, intent: str, steps: Sequence[Evidence]) -> float | None:
        model = self.models.get((skill, stage, intent == OUT_OF_SCOPE))
        return None if model is None else model(features(steps))
