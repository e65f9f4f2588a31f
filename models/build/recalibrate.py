"""Calibrate an artifact in place: read held-out utterances through it, fit, rewrite its manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.artifact.store import Artifact
from models.build.calibrate import Level, Reading, calibrate, decode
from models.build.datasets import Example
from models.build.pack import Report
from models.build.readings import read
from models.runtime import frames
from models.runtime.local import LocalTier
from models.skills import Frame


@dataclass(frozen=True)
class Judge:
    """Who says what is right: the labels, or the edge's own answers (for utterances without labels)."""

    edge: LocalTier | None = None
    by_edge: bool = False


def recalibrate(path: Path, examples: Sequence[Example], level: Level, judge: Judge, report: Report) -> dict[str, Any]:
    """Write each skill's calibration into the manifest at `path` and return it; other skills' entries stay."""
    tier = LocalTier.open(path, "device")
    found: dict[str, Any] = {}
    for skill in dict.fromkeys(e.skill for e in examples):
        mine = [e for e in examples if e.skill == skill]
        readings = read(tier, mine, report)
        grade, edge_right = None, None
        if judge.edge:
            answers = _answers(judge.edge, mine, report)
            edge_right = [answer == e.frame for answer, e in zip(answers, mine, strict=True)]
            if judge.by_edge:
                grade, edge_right = _grade(readings, answers), None
        skills = tier.card.skills
        assert skills is not None  # noqa: S101 - `read` refused a tier without skills
        found[skill] = calibrate(readings, skills[skill], level, edge_right, grade)
    artifact = Artifact.open(path)
    artifact.recalibrated({**artifact.manifest.calibration, **found})
    return found


def _answers(tier: LocalTier, examples: Sequence[Example], report: Report) -> list[Frame]:
    skills = tier.card.skills
    assert skills is not None  # noqa: S101 - `read` refuses a tier without skills
    return [
        decode(reading, skills[e.skill], frames.Reject.from_manifest(tier.card.calibration, e.skill)).frame
        for e, reading in zip(examples, read(tier, examples, report), strict=True)
    ]


def _grade(readings: Sequence[Reading], answers: Sequence[Frame]) -> Callable[[Reading], Frame]:
    by_id = {id(reading): answer for reading, answer in zip(readings, answers, strict=True)}
    return lambda reading: by_id[id(reading)]
