"""Loaders of the three skill sets, as lists of `Example`.

The data is never part of this project. A folder holds `clinc150/`, `snips/` and `banking77/` as published:

| skill     | set       | published at                                      | licence   |
|-----------|-----------|---------------------------------------------------|-----------|
| assistant | CLINC150  | github clinc/oos-eval (arXiv 1909.02027)          | CC BY 3.0 |
| home      | SNIPS     | github sonos/nlu-benchmark (arXiv 1805.10190)     | CC0 1.0   |
| banking   | BANKING77 | github PolyAI-LDN/task-specific-datasets (arXiv 2003.04807) | CC BY 4.0 |
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import DataError
from models.skills import OUT_OF_SCOPE, Frame, Skill, SkillSet, slots_from_tags

SPLITS = ("train", "validation", "test")
BANKING_VALIDATION_SHARE = 0.1
OUTSIDE_VALIDATION_SHARE = 0.2
OUTSIDE_FILE = Path(__file__).with_name("outside.txt")


@dataclass(frozen=True)
class Example:
    """One labelled utterance; `tags` (one a word) only where the skill has slots."""

    skill: str
    text: str
    intent: str
    tags: tuple[str, ...] = field(default=())

    @property
    def frame(self) -> Frame:
        """The frame that a right answer equals."""
        return Frame(self.intent, slots_from_tags(self.text.split(), self.tags) if self.tags else {})


def load(folder: Path, split: str, skills: Iterable[str] = ("assistant", "home", "banking")) -> list[Example]:
    """Load one split of the named skills; raises `DataError` if a file is absent or malformed."""
    if split not in SPLITS:
        raise DataError(f"split '{split}' is unknown; use one of {', '.join(SPLITS)}")
    examples: list[Example] = []
    for skill in skills:
        if skill not in _LOADERS:
            raise DataError(f"no data set is known for skill '{skill}'; known: {', '.join(_LOADERS)}")
        try:
            examples.extend(_LOADERS[skill](folder, split))
        except FileNotFoundError as error:
            raise DataError(
                f"{error.filename} is missing; see models/build/datasets.py for where it is published"
            ) from error
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"the data of skill '{skill}' in {folder} is malformed: {error}") from error
    return examples


def outside(split: str) -> list[Example]:
    """Our own queries that no intent of `assistant` covers (outlier exposure, arXiv 1812.04606); none for the test."""
    lines = OUTSIDE_FILE.read_text("utf-8").splitlines() if split != "test" else []
    chosen = [t for t in lines if _held_out(t, OUTSIDE_VALIDATION_SHARE) == (split == "validation")]
    return [Example("assistant", text, OUT_OF_SCOPE) for text in chosen]


def _clinc(folder: Path, split: str) -> list[Example]:
    data = json.loads((folder / "clinc150" / "data.json").read_text("utf-8"))
    name = {"train": "train", "validation": "val", "test": "test"}[split]
    rows = [*data[name], *data[f"oos_{name}"]]
    return [Example("assistant", text, OUT_OF_SCOPE if intent == "oos" else intent) for text, intent in rows]


def _snips(folder: Path, split: str) -> list[Example]:
    name = {"train": "train", "validation": "valid", "test": "test"}[split]
    lines = (folder / "snips" / f"{name}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line]
    return [Example("home", " ".join(r["tokens"]), r["intent"], tuple(r["tags"])) for r in rows]


def _banking(folder: Path, split: str) -> list[Example]:
    """BANKING77 publishes no validation split: a tenth of train, chosen by digest, is held out."""
    name = "test" if split == "test" else "train"
    with (folder / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = [Example("banking", row["text"].strip(), row["category"]) for row in csv.DictReader(file)]
    if split == "test":
        return rows
    return [row for row in rows if _held_out(row.text, BANKING_VALIDATION_SHARE) == (split == "validation")]


def _held_out(text: str, share: float) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


_LOADERS: Mapping[str, Callable[[Path, str], list[Example]]] = {
    "assistant": _clinc,
    "home": _snips,
    "banking": _banking,
}


def skill_set(examples: Iterable[Example]) -> SkillSet:
    """Collect the label inventory of a training set; every skill may answer `out_of_scope`."""
    intents: dict[str, set[str]] = {}
    slots: dict[str, dict[str, set[str]]] = {}
    for example in examples:
        intents.setdefault(example.skill, {OUT_OF_SCOPE}).add(example.intent)
        names = {tag[2:] for tag in example.tags if tag != "O"}
        if names:
            slots.setdefault(example.skill, {}).setdefault(example.intent, set()).update(names)
    return SkillSet(
        tuple(
            Skill(name, tuple(sorted(found)), {i: tuple(sorted(s)) for i, s in sorted(slots.get(name, {}).items())})
            for name, found in intents.items()
        )
    )


def log_prior(skill: Skill, examples: Iterable[Example]) -> list[float]:
    """Log of how often each intent (n_intents,) of the skill is among the examples, against the mean intent.

    `out_of_scope` is zero, as are intents not seen: how common they are is made, not observed.
    """
    counts = Counter(e.intent for e in examples if e.skill == skill.name and e.intent != OUT_OF_SCOPE)
    mean = counts.total() / max(len(counts), 1)
    return [math.log(counts[intent] / mean) if counts[intent] else 0.0 for intent in skill.intents]


def foreign(examples: Iterable[Example], skills: SkillSet) -> list[Example]:
    """Make out-of-scope examples for each skill from other skills' utterances that it surely does not cover.

    `assistant` gets the screen, book and creative-work requests of `home`; `home` gets all of `banking` and the
    `assistant` queries outside its own themes; `banking` gets all of `home`.
    """
    shared_themes = (
        "music",
        "song",
        "weather",
        "restaurant",
        "playlist",
        "book",
        "rate",
        "meal",
        "movie",
        "reservation",
    )
    made: list[Example] = []
    for example in examples:
        if example.skill == "home":
            targets = ["banking"]
            if example.intent in {"RateBook", "SearchCreativeWork", "SearchScreeningEvent"}:
                targets.append("assistant")
        elif example.skill == "banking":
            targets = ["home"]
        else:
            themed = any(theme in example.text or theme in example.intent for theme in shared_themes)
            targets = [] if themed else ["home"]
        made.extend(
            Example(t, example.text, OUT_OF_SCOPE, ("O",) * len(example.text.split()) if skills[t].tags else ())
            for t in targets
            if t in skills.names
        )
    return made
