"""Make a tier's exits: train a head at each depth, calibrate it, and choose thresholds, on validation data only.

Nothing of the base or the adapter changes. No torch but in `exit_net`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from models.build.exit_net import ExitSettings

PASSED = (12, 15, 18)
"""Where SmolLM2's exits are, in numbers of layers passed."""
MAX_LOSS = 0.001
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

    def since(self, first: int) -> Judged:
        """The same without the exits before the one numbered `first`."""
        return replace(self, passed=self.passed[first:], right=self.right[first:], confidence=self.confidence[first:])

    def best(self, max_loss: float) -> Judged:
        """The same from that exit on with which frames pass the fewest layers: a poor one costs more than it saves."""
        found = [self.since(first) for first in range(len(self.passed))]
        return min(found, key=lambda judged: judged.at(judged.choose(max_loss))[2])

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

    def decided_at(self, passed: int, scorer: Scorer, calibration: Mapping[str, Any]) -> list[Decoded]:
        """Answers of an exit."""
        rule = IntentRule.from_manifest(calibration, self.skill)
        return [decode(reading, self.skill, rule) for reading in self.at_exit(passed, scorer)]

    def decided(self, calibration: Mapping[str, Any], oos_share: float | None = None) -> list[Decoded]:
        """Answers of the last layer, out-of-scope ones weighed up to a share of all if one is named."""
        readings = self.at_end() if oos_share is None else weigh(self.at_end(), oos_share)
        rule = IntentRule.from_manifest(calibration, self.skill)
        return [decode(reading, self.skill, rule) for reading in readings]

    def judged(
        self, passed: Sequence[int], exits: Sequence[tuple[Sequence[Decoded], Any]], ends: Sequence[Decoded]
    ) -> Judged:
        """Hold the answers of exits, each with how sure it is of them, against those at the end."""
        return Judged(
            passed=tuple(passed),
            n_layers=self._n_layers,
            right=np.array([[a.right for a in answers] for answers, _ in exits]),
            confidence=np.array([confidence for _, confidence in exits]),
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
    settings: ExitSettings | None = None,
) -> tuple[ExitHeads, dict[str, Any], dict[str, Judged]]:
    """Return the exits' card and weights, and how they do on validation data by skill.

    `work` keeps states and checkpoints: a stopped run goes on from there. Raises `DataError`.
    """
    from models.build.exit_net import ExitSettings, train_exit

    settings = settings or ExitSettings()
    observer, tensors = Observer(artifact, passed), dict[str, Any]()
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
        name, prior, exits = depths.skill.name, log_prior(depths.skill, train), []
        for depth, scorer in scorers.items():
            readings = depths.at_exit(depth, scorer)
            calibration[depth][name], answers, sure = calibrated(readings, depths.skill, level, prior)
            exits.append((answers, sure))
        ends = depths.decided(artifact.manifest.calibration, level.oos_share)
        found[name] = depths.judged(passed, exits, ends).best(MAX_LOSS)
        for depth in set(passed) - set(found[name].passed):
            del calibration[depth][name]
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
    observer = Observer(artifact, card.passed)
    scorers = scorers_of(artifact.exit_heads(), observer)
    found = {}
    for depths in depths_of(observer, examples, work / "states", report):
        name = depths.skill.name
        passed = [depth for depth in card.passed if name in card.calibration[depth]]
        exits = [_answered(depths, depth, scorers[depth], card.calibration[depth]) for depth in passed]
        judged = depths.judged(passed, exits, depths.decided(artifact.manifest.calibration))
        found[name] = (judged, card.thresholds.get(name, NO_EXIT))
    return found


def _answered(
    depths: Depths, passed: int, scorer: Scorer, calibration: Mapping[str, Any]
) -> tuple[list[Decoded], NDArray[np.float64]]:
    """An exit's answers and how sure it is of each."""
    answers = depths.decided_at(passed, scorer, calibration)
    entry = calibration[depths.skill.name]["final"]
    return answers, apply({scope: Logistic.from_dict(model) for scope, model in entry.items()}, answers)


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
