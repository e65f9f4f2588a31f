"""Make a tier's exits: train a head at each depth, calibrate it, and choose thresholds, on validation data only.

Nothing of the base or the adapter changes. No torch but in `exit_net`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.manifest import ExitHeads
from models.artifact.store import Artifact
from models.build.calibrate import (
    Decoded,
    Level,
    Reading,
    apply,
    cross_fitted,
    decode,
    fit_prior,
    fit_reject,
    rule_entry,
    stage_entry,
    weigh,
)
from models.build.datasets import Example, log_prior
from models.build.exit_states import SEED, Observer, Seen, kept_at, lessons, see_all
from models.build.progress import Report
from models.errors import DataError
from models.runtime.confidence import FINAL_FEATURES, FORECAST_FEATURES, Logistic
from models.runtime.exits import Scorer, of_exit
from models.runtime.frames import IntentRule
from models.runtime.tier import NO_EXIT
from models.skills import Skill

PASSED = (12, 15, 18)
"""Where SmolLM2's exits are, in numbers of layers passed."""
MAX_LOSS = 0.0
"""Accuracy that a threshold may cost on validation data."""


@dataclass(frozen=True)
class Judged:
    """One skill's queries at every depth.

    (E, n): whether each exit is `right` and its `confidence`; (n,): whether the last layer is, what a query weighs, and
    the tokens that are read for it.
    """

    passed: tuple[int, ...]
    n_layers: int
    right: NDArray[np.bool_]
    confidence: NDArray[np.float64]
    right_full: NDArray[np.bool_]
    weights: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def at(self, threshold: float) -> tuple[float, float, float]:
        """Accuracy with exits, accuracy without, and mean layers a token."""
        stops = self._stops(threshold)
        right = np.vstack([self.right, self.right_full])[stops, np.arange(len(stops))]
        layers = np.array([*self.passed, self.n_layers])[stops]
        share = self.weights / self.weights.sum()
        read = share * self.tokens
        return float(right @ share), float(self.right_full @ share), float(layers @ read / read.sum())

    def _stops(self, threshold: float) -> NDArray[np.int64]:
        """Which exit answers each query (n,), or how many there are where none does."""
        sure = np.vstack([self.confidence >= threshold, np.ones((1, len(self.weights)), bool)])
        return np.asarray(sure.argmax(0))

    def as_dict(self, threshold: float) -> dict[str, Any]:
        """JSON-ready: accuracies in %, mean layers a token, how many times fewer that is, `stops` by layers passed."""
        right, right_full, layers = self.at(threshold)
        stops = self._stops(threshold)
        depths = (*self.passed, self.n_layers)
        return {
            "n": len(self.weights),
            "threshold": threshold,
            "accuracy_full": 100 * right_full,
            "accuracy_with_exits": 100 * right,
            "layers_per_token": layers,
            "ratio": self.n_layers / layers,
            "stops": {str(depth): int((stops == number).sum()) for number, depth in enumerate(depths)},
        }

    def choose(self, max_loss: float) -> float:
        """The smallest threshold from which on, up to 1, no more than `max_loss` of accuracy is lost."""
        chosen = NO_EXIT
        for threshold in sorted({float(c) for c in self.confidence.ravel()}, reverse=True):
            with_exits, without, _ = self.at(threshold)
            if without - with_exits > max_loss + 1e-9:
                break
            chosen = threshold
        return chosen


@dataclass(frozen=True)
class Query:
    """A labelled utterance, and what the tier saw of it."""

    example: Example
    seen: Seen

    def reading(self, intents: Any, tags: Any) -> Reading:
        """What some depth makes of it."""
        return Reading(tuple(self.example.text.split()), self.example.frame, intents, tags)


class Depths:
    """What exits and the last layer make of one skill's queries."""

    def __init__(self, observer: Observer, skill: Skill, queries: Sequence[Query]) -> None:
        self.skill, self.passed, self._queries = skill, observer.passed, queries
        self._skills, self._labels, self._n_layers = observer.skills, observer.labels, observer.n_layers

    def at_exit(self, passed: int, scorer: Scorer) -> list[Reading]:
        """Readings of an exit."""
        number, found = self.passed.index(passed), []
        for query in self._queries:
            states = query.seen.states[number].astype(np.float32)
            cut = query.seen.row.answer_at + 1
            found.append(query.reading(*scorer.logits(self.skill, states[:cut], states[cut:])))
        return found

    def at_end(self) -> list[Reading]:
        """Readings of the last layer."""
        rows, tag_rows = self._skills.intent_rows(self.skill.name), self._skills.tag_rows(self.skill.name)
        found = []
        for query in self._queries:
            final = query.seen.final.astype(np.float32)
            tags = final[1:] @ self._labels[tag_rows].T if self.skill.tags else None
            found.append(query.reading(self._labels[rows] @ final[0], tags))
        return found

    def judged(
        self,
        answers: Sequence[Sequence[Decoded]],
        confidence: Sequence[Any],
        calibration: Mapping[str, Any],
        level: Level,
    ) -> Judged:
        """Hold the exits' answers against those at the end."""
        rule = IntentRule.from_manifest(calibration, self.skill)
        ends = [decode(r, self.skill, rule) for r in weigh(self.at_end(), level.oos_share)]
        return Judged(
            passed=self.passed,
            n_layers=self._n_layers,
            right=np.array([[a.right for a in exits] for exits in answers]),
            confidence=np.array(confidence),
            right_full=np.array([a.right for a in ends]),
            weights=np.array([a.weight for a in ends]),
            tokens=np.array([len(q.seen.row.ids) for q in self._queries]),
        )


def train_exits(
    artifact: Artifact,
    train: Sequence[Example],
    validation: Sequence[Example],
    work: Path,
    report: Report,
    passed: Sequence[int] = PASSED,
) -> tuple[ExitHeads, dict[str, Any], dict[str, Judged]]:
    """Return the exits' card and weights, and how they do on validation data by skill.

    `work` keeps states and checkpoints: a stopped run goes on from there. Raises `DataError`.
    """
    from models.build.exit_net import ExitSettings, train_exit

    observer, settings, tensors = Observer(artifact, passed), ExitSettings(), dict[str, Any]()
    rows = lessons(train, observer.encoder, observer.skills)
    for depth in passed:
        kept = kept_at(depth, observer, rows, work / "states", report)
        checkpoint = work / f"exit-{depth}.pt"
        weights = train_exit(kept, observer.labels, observer.skills, settings, checkpoint, report)
        tensors |= {f"exit.{depth}.{name}": value for name, value in weights.items()}
        del kept
    scorers, level = scorers_of(tensors, observer), Level()
    calibration: dict[int, dict[str, Any]] = {depth: {} for depth in passed}
    found = {}
    for depths in depths_of(observer, validation, work / "states", report):
        name, prior = depths.skill.name, log_prior(depths.skill, train)
        answers, confidence = [], []
        for depth, scorer in scorers.items():
            readings = depths.at_exit(depth, scorer)
            calibration[depth][name], decoded, sure = calibrated(readings, depths.skill, level, prior)
            answers.append(decoded)
            confidence.append(sure)
        found[name] = depths.judged(answers, confidence, artifact.manifest.calibration, level)
    thresholds = {name: judged.choose(MAX_LOSS) for name, judged in found.items()}
    made = {"settings": repr(settings), "rows": len(rows), "seed": SEED, "max_loss": MAX_LOSS}
    return ExitHeads(tuple(passed), calibration, thresholds, made), tensors, found


def measure_exits(
    artifact: Artifact, examples: Sequence[Example], work: Path, report: Report
) -> dict[str, tuple[Judged, float]]:
    """How an artifact's exits do on labelled data, and each skill's threshold; raises `DataError` if it has none."""
    card = artifact.manifest.exit_heads
    if card is None:
        raise DataError(f"{artifact.path} has no exits with heads; make them with 'edgecascade exits'")
    observer, plain = Observer(artifact, card.passed), Level(oos_share=0.0)
    scorers = scorers_of(artifact.exit_heads(), observer)
    found = {}
    for depths in depths_of(observer, examples, work / "states", report):
        skill, answers, confidence = depths.skill, [], []
        for depth, scorer in scorers.items():
            entry = card.calibration[depth]
            rule = IntentRule.from_manifest(entry, skill)
            answers.append([decode(r, skill, rule) for r in depths.at_exit(depth, scorer)])
            models = {scope: Logistic.from_dict(model) for scope, model in entry[skill.name]["final"].items()}
            confidence.append(apply(models, answers[-1]))
        judged = depths.judged(answers, confidence, artifact.manifest.calibration, plain)
        found[skill.name] = (judged, card.thresholds.get(skill.name, NO_EXIT))
    return found


def depths_of(observer: Observer, examples: Sequence[Example], cache: Path, report: Report) -> Iterator[Depths]:
    """The examples at every depth, skill by skill."""
    seen = list(see_all(observer, [observer.encoder.row(e) for e in examples], cache, report))
    for skill in observer.skills.skills:
        queries = [Query(e, s) for e, s in zip(examples, seen, strict=True) if e.skill == skill.name]
        if queries:
            yield Depths(observer, skill, queries)


def scorers_of(tensors: Mapping[str, Any], observer: Observer) -> dict[int, Scorer]:
    """Each exit's scorer, from tensors named as in an artifact."""
    return {depth: Scorer(of_exit(tensors, depth), observer.skills) for depth in observer.passed}


def calibrated(
    readings: Sequence[Reading], skill: Skill, level: Level, prior: Sequence[float]
) -> tuple[dict[str, Any], list[Decoded], Any]:
    """An exit's calibration for a skill, its answers, and how sure calibrators that have not seen them are of each."""
    weighed = weigh(readings, level.oos_share)
    rule = fit_reject(weighed, skill, level, fit_prior(weighed, skill, prior))
    answers = [decode(r, skill, rule) for r in weighed]
    n_features = len(FINAL_FEATURES) if skill.tags else len(FORECAST_FEATURES)
    return {**rule_entry(rule), "final": stage_entry(answers, n_features)}, answers, cross_fitted(answers, n_features)
