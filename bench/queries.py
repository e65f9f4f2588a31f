"""Queries with their right answers, from JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import QueryFileError

OUT_OF_SCOPE = "out_of_scope"
OWN_QUERIES = Path(__file__).with_name("queries.jsonl")
_KEYS = {"skill", "text", "intent", "slots"}


@dataclass(frozen=True)
class Query:
    """One utterance and the frame that a right answer equals."""

    skill: str
    text: str
    intent: str
    slots: Mapping[str, str | list[str]] = field(default_factory=dict)

    @property
    def frame(self) -> dict[str, Any]:
        """The right frame, JSON-ready."""
        return {"intent": self.intent, "slots": dict(self.slots)}


def read(path: Path, skill: str | None = None) -> list[Query]:
    """Read `{"text", "intent", "slots"?, "skill"?}` lines; `skill` is the one of lines that name none.

    Where both are given, lines of another skill are left out. Raises `QueryFileError` naming the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QueryFileError(f"{path} cannot be read as UTF-8 text: {error}") from error
    found = [_query(path, number, line, skill) for number, line in enumerate(lines, 1) if line.strip()]
    queries = [query for query in found if skill in {None, query.skill}]
    if not queries:
        raise QueryFileError(f"{path} holds no query" + (f" of skill '{skill}'" if skill else ""))
    return queries


def _query(path: Path, number: int, line: str, skill: str | None) -> Query:
    where = f"{path.name}, line {number}"
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise QueryFileError(f"{where} is not JSON ({error.msg})") from error
    if not isinstance(values, dict):
        raise QueryFileError(f"{where} is not an object")
    unknown = set(values) - _KEYS
    if unknown:
        raise QueryFileError(f"{where} has the unknown key '{min(unknown)}'; known: {', '.join(sorted(_KEYS))}")
    for key in ("text", "intent"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise QueryFileError(f"{where} needs '{key}' as text")
    named = values.get("skill", skill)
    if not isinstance(named, str):
        raise QueryFileError(f"{where} names no skill; give one with --skill")
    slots = values.get("slots", {})
    if not isinstance(slots, dict) or not all(_is_slot(value) for value in slots.values()):
        raise QueryFileError(f"{where}: 'slots' must map names to a text or a list of texts")
    return Query(named, values["text"], values["intent"], slots)


def _is_slot(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def sample(queries: Sequence[Query], per_skill: int, seed: int = 1) -> list[Query]:
    """Draw up to `per_skill` queries of each skill, the same ones each time, and shuffle them together."""
    rng = random.Random(seed)
    by_skill: dict[str, list[Query]] = {}
    for query in queries:
        by_skill.setdefault(query.skill, []).append(query)
    drawn = [q for group in by_skill.values() for q in rng.sample(group, min(per_skill, len(group)))]
    rng.shuffle(drawn)
    return drawn


def count_by_skill(queries: Iterable[Query]) -> dict[str, int]:
    """How many queries each skill has."""
    counts: dict[str, int] = {}
    for query in queries:
        counts[query.skill] = counts.get(query.skill, 0) + 1
    return counts
