"""The builds and trainings of the command line, from names to finished files. torch is imported where one begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.artifact.store import Artifact
from models.build.adapter import recalibrate_card, write_exits
from models.build.calibrate import Level, Reading, calibrate, decode
from models.build.datasets import Example, load, log_prior, outside
from models.build.exits import measure_exits, train_exits
from models.build.fetch import open_folder, open_source
from models.build.gguf_source import GgufSource
from models.build.progress import Report
from models.build.readings import read
from models.errors import DataError, SourceError
from models.runtime.frames import IntentRule
from models.runtime.local import LocalTier
from models.skills import Skill

GRADES = ("exact", "agree-edge")


def build_tier(
    source: str,
    cache: Path,
    out: Path,
    quant: str,
    adapter: Path | None,
    via: str,
    prune: int,
    report: Report,
    *,
    prefill: bool = False,
) -> Artifact:
    """Build the artifact of whatever `source` names; raises `SourceError` or `ArtifactError`."""
    from models.build.assemble import OPTIMUM, OWN, build

    if via == OWN:
        return build(open_source(source, cache, report), out, quant, adapter, report, prune=prune, prefill=prefill)
    if via != OPTIMUM:
        raise SourceError(f"--via {via} is unknown; use {OWN} or {OPTIMUM}")
    if adapter or prune or prefill:
        raise SourceError("--adapter, --prune and --prefill work on our own graph only; leave --via optimum out")
    from models.build.optimum_export import build_exported

    return build_exported(open_folder(source, cache, report), out, quant, report)


def adapt_edge(
    source: str, cache: Path, data: Path, out: Path, course: int, start: Path | None, report: Report
) -> None:
    """Train the edge adapter on the training splits in `data` and write it to `out`.

    The first course begins afresh, later ones on top of the adapter `start`. Raises `DataError`.
    """
    from models.build.adapt import COURSES, adapt

    if not 1 <= course <= len(COURSES):
        raise DataError(f"course {course} is unknown; there are {len(COURSES)}")
    if (course > 1) != (start is not None):
        raise DataError("the first course starts afresh, the others need --from with the adapter of the one before")
    adapt(_gguf(source, cache, report), _lessons(data), out, COURSES[course - 1], report, start)


def _lessons(data: Path) -> list[Example]:
    return [*load(data, "train"), *outside("train")]


def distil_device(
    source: str,
    cache: Path,
    data: Path,
    adapter: Path,
    out: Path,
    report: Report,
    *,
    taught: bool = True,
    start: Path | None = None,
) -> Artifact:
    """Train the device tier (or its undistilled twin) in `out`, and write its int8 artifact to `out/tier`.

    With `start`, the folder of a finished run, it is a second, gentle course on those weights.
    """
    from models.build.assemble import build
    from models.build.distil import GENTLE, DistilSettings, distil
    from models.build.export import write_student

    settings = replace(GENTLE if start else DistilSettings(), taught=taught)
    student, room = distil(_gguf(source, cache, report), _lessons(data), adapter, out, settings, report, start)
    folder = write_student(student, room.skills, room.tokenizer, out / "source")
    return build(folder, out / "tier", "int8", None, report)


def calibrate_tier(
    tier: Path,
    data: Path,
    edge: Path | None,
    level: Level,
    grade: str,
    report: Report,
    adapter: Path | None = None,
    only: str | None = None,
) -> dict[str, Any]:
    """Fit the tier's calibration on the validation splits in `data`, write it into its manifest, and return it.

    `adapter` is the adapter the tier was built with: its card gets the calibration too, for the next build.
    With `edge` the threshold also keeps the cascade near it. `grade`: 'exact' (right = the label) or 'agree-edge'
    (right = the edge says the same). `only` names the one skill to calibrate; the others stay. Raises `DataError`.
    """
    if grade not in GRADES:
        raise DataError(f"grade '{grade}' is unknown; use one of {', '.join(GRADES)}")
    if grade == "agree-edge" and edge is None:
        raise DataError("'agree-edge' needs the edge's artifact; name it with --edge")
    examples, lessons = [*load(data, "validation"), *outside("validation")], _lessons(data)
    opened = LocalTier.open(tier, tier.name)
    larger = LocalTier.open(edge, "edge") if edge else None
    entries = dict(opened.card.calibration) if only else {}
    skills = opened.card.skills.skills if opened.card.skills else ()
    if only and only not in {skill.name for skill in skills}:
        raise DataError(f"the tier has no skill '{only}'; it has {', '.join(s.name for s in skills) or 'none'}")
    for skill in [s for s in skills if only in {None, s.name}]:
        entries[skill.name] = _calibrate_skill(
            opened,
            larger,
            skill,
            [e for e in examples if e.skill == skill.name],
            level,
            grade,
            report,
            log_prior(skill, lessons),
        )
    Artifact.open(tier).recalibrated(entries)
    if adapter:
        recalibrate_card(adapter, entries)
    return entries


def add_exits(tier: Path, data: Path, adapter: Path | None, work: Path, report: Report) -> dict[str, Any]:
    """Train, calibrate and write a tier's exits; returns how they do on validation data, by skill.

    They go into the artifact and, for the next build, beside its `adapter`. `work` keeps what a stopped run goes on
    from. Raises `DataError`, `ArtifactError`.
    """
    artifact = Artifact.open(tier).keeping()
    heads, tensors, found = train_exits(
        artifact, _lessons(data), [*load(data, "validation"), *outside("validation")], work, report
    )
    artifact.with_exit_heads(heads, tensors)
    if adapter:
        write_exits(adapter, heads, tensors)
    return {name: judged.as_dict(heads.thresholds[name]) for name, judged in found.items()}


def check_exits(tier: Path, data: Path, split: str, work: Path, report: Report) -> dict[str, Any]:
    """How a tier's exits do on one split, by skill; raises `DataError`, `ArtifactError`."""
    found = measure_exits(Artifact.open(tier).keeping(), load(data, split), work, report)
    return {name: judged.as_dict(threshold) for name, (judged, threshold) in found.items()}


def _calibrate_skill(
    tier: LocalTier,
    edge: LocalTier | None,
    skill: Skill,
    examples: Sequence[Example],
    level: Level,
    grade: str,
    report: Report,
    prior: Sequence[float],
) -> dict[str, Any]:
    readings = read(tier, examples, report)
    if edge is None:
        return calibrate(readings, skill, level, prior=prior)
    answers = [decode(r, skill, _rule(edge, skill)) for r in read(edge, examples, report)]
    if grade == "agree-edge":
        agreed: list[Reading] = [replace(r, target=a.frame) for r, a in zip(readings, answers, strict=True)]
        return calibrate(agreed, skill, level, prior=prior)
    return calibrate(readings, skill, level, [a.right for a in answers], prior=prior)


def _rule(tier: LocalTier, skill: Skill) -> IntentRule:
    return IntentRule.from_manifest(tier.card.calibration, skill)


def _gguf(source: str, cache: Path, report: Report) -> GgufSource:
    opened = open_source(source, cache, report)
    if not isinstance(opened, GgufSource):
        raise SourceError("training starts from a .gguf file, or from smollm2")
    return opened
