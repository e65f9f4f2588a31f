"""Read a frame out of label logits: which intent, which tag for each word. Pure numpy.

The intent is the best row of the skill's block, once what the model owes to how often it saw an intent in training is
taken off ("logit adjustment", Menon et al. 2021, arXiv 2007.07314). `out_of_scope` has two ways to win: its own row,
and a floor that every in-scope logit must clear ("maximum logit", Hendrycks et al. 2022, arXiv 1911.11132): a query
like nothing in training has low logits everywhere. Tags are decoded by Viterbi over the transitions that BIO allows
and the slots that the intent may carry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ArtifactError
from models.skills import OUT_OF_SCOPE, OUTSIDE, Skill, SkillSet

Floats = NDArray[np.floating[Any]]
_CLOSED = -1e9


@dataclass(frozen=True)
class Choice:
    """A decided label; `logprob` natural log, `margin` = p(chosen) − p(best other)."""

    label: str
    logprob: float
    margin: float


@dataclass(frozen=True)
class IntentRule:
    """What is done to a skill's intent logits before the best one is chosen.

    `prior` (n_intents,), or nothing, is subtracted; then the logit of `out_of_scope` becomes
    log(exp(own + bias) + exp(floor)): how readily the skill says it.
    """

    bias: float = 0.0
    floor: float = -math.inf
    prior: tuple[float, ...] = ()

    @classmethod
    def from_manifest(cls, calibration: Mapping[str, Any], skill: Skill) -> IntentRule:
        """Read the skill's `reject` and `prior` entries; none means the plain logits.

        Raises `ArtifactError` if the prior has not one value an intent.
        """
        entry = calibration.get(skill.name, {})
        reject, prior = entry.get("reject"), tuple(float(p) for p in entry.get("prior", ()))
        if prior and len(prior) != len(skill.intents):
            raise ArtifactError(
                f"calibration of skill '{skill.name}': 'prior' has {len(prior)} values for {len(skill.intents)} "
                "intents; calibrate the tier again"
            )
        return cls(float(reject["bias"]), float(reject["floor"]), prior) if reject else cls(prior=prior)


def intent(logits: Floats, skills: SkillSet, skill: str, rule: IntentRule = IntentRule()) -> Choice:
    """Choose the intent of `skill` from the label logits (n_rows,) at `<answer>`."""
    return choose_intent(logits[skills.intent_rows(skill)], skills[skill], rule)


def choose_intent(scores: Floats, skill: Skill, rule: IntentRule = IntentRule()) -> Choice:
    """Choose from the logits (n_intents,) of the skill's own rows."""
    log_probs = intent_log_probs(scores, skill, rule)
    best = int(log_probs.argmax())
    return Choice(skill.intents[best], float(log_probs[best]), _margin(np.exp(log_probs), best))


def intent_log_probs(scores: Floats, skill: Skill, rule: IntentRule = IntentRule()) -> NDArray[np.float64]:
    """Log-probabilities (…, n_intents) after the rule; a skill without `out_of_scope` rejects nothing."""
    scores = np.array(scores, np.float64)
    if rule.prior:
        scores -= rule.prior
    if OUT_OF_SCOPE in skill.intents:
        row = skill.intents.index(OUT_OF_SCOPE)
        scores[..., row] = np.logaddexp(scores[..., row] + rule.bias, rule.floor)
    return log_softmax(scores)


def tags(logits: Floats, skill: Skill, intent: str) -> list[Choice]:
    """Choose one tag a word from the tag logits (n_words, n_tags), allowed by BIO and by the intent's slots."""
    names = skill.tags
    slots = set(skill.slots.get(intent, ()))
    closed = np.array([0.0 if n == OUTSIDE or n[2:] in slots else _CLOSED for n in names])
    log_probs = log_softmax(np.asarray(logits, np.float64) + closed)
    path = _viterbi(log_probs, names)
    return [Choice(names[t], float(row[t]), _margin(np.exp(row), t)) for row, t in zip(log_probs, path, strict=True)]


def log_softmax(scores: Floats) -> NDArray[np.float64]:
    """Log-softmax over the last axis."""
    shifted = np.asarray(scores, np.float64) - np.max(scores, axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float64)


def _margin(probabilities: NDArray[np.float64], chosen: int) -> float:
    others = np.delete(probabilities, chosen)
    return float(probabilities[chosen] - (others.max() if len(others) else 0.0))


def _viterbi(scores: NDArray[np.float64], names: Sequence[str]) -> list[int]:
    """Best path (n_words,) where `I-x` follows only `B-x` or `I-x`."""
    follows = _transitions(tuple(names))
    starts = np.array([_CLOSED if n.startswith("I-") else 0.0 for n in names])
    total, back = scores[0] + starts, []
    for row in scores[1:]:
        step = total[:, None] + follows
        back.append(step.argmax(0))
        total = step.max(0) + row
    path = [int(total.argmax())]
    for choices in reversed(back):
        path.append(int(choices[path[-1]]))
    return path[::-1]


def _transitions(names: tuple[str, ...]) -> NDArray[np.float64]:
    """(n, n) penalties from row to column: 0 where BIO allows the step."""
    allowed = [[not b.startswith("I-") or a[2:] == b[2:] for b in names] for a in names]
    return np.where(np.array(allowed), 0.0, _CLOSED)
