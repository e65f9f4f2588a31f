"""Hold an artifact against golden texts: greedy decoding must give the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from models.artifact.keys import KeyWrapper
from models.artifact.store import Artifact
from models.errors import DataError
from models.runtime.local import LocalTier
from models.runtime.tier import Chat, Completion, Limits, Prompt


@dataclass(frozen=True)
class GoldenCase:
    """One reference answer; `smallest_gap` is the least lead of the best logit on its path."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    greedy_ids: tuple[int, ...]
    smallest_gap: float


@dataclass(frozen=True)
class GoldenResult:
    """How one case went: equal tokens before the first difference, of how many."""

    case: GoldenCase
    ids: tuple[int, ...]

    @property
    def same(self) -> int:
        """Length of the common beginning."""
        pairs = zip(self.ids, self.case.greedy_ids, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(self.case.greedy_ids)))

    @property
    def matches(self) -> bool:
        """Whether all tokens are equal."""
        return self.ids == self.case.greedy_ids


def golden_cases(path: Path) -> list[GoldenCase]:
    """Read a golden file; raises `DataError`."""
    try:
        return [_case(entry) for entry in json.loads(path.read_bytes())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of golden texts: {error}") from error


def _case(entry: dict[str, Any]) -> GoldenCase:
    prompt: Prompt = Chat(tuple(entry["messages"])) if "messages" in entry else Completion(entry["prompt"])
    gap = float(entry.get("smallest_gap", 0.0))
    return GoldenCase(prompt, tuple(entry["prompt_ids"]), tuple(entry["greedy_ids"]), gap)


def golden_texts(path: Path) -> list[Sequence[int]]:
    """Prompt and answer of each golden case, as token sequences for `build(texts=…)`."""
    return [(*case.prompt_ids, *case.greedy_ids) for case in golden_cases(path)]


def golden(artifact: Path, path: Path, threads: int = 2, keys: KeyWrapper | None = None) -> list[GoldenResult]:
    """Decode every golden case greedily with the artifact; `keys` open a sealed one."""
    tier = LocalTier.open(artifact, "golden", threads, keys=keys)
    results = []
    for case in golden_cases(path):
        tokens = list(tier.generate(case.prompt, Limits(max_tokens=len(case.greedy_ids))))
        results.append(GoldenResult(case, tuple(token.id for token in tokens)))
    return results


def report_golden(artifact: Path, path: Path) -> str:
    """Return a table for people: case, equal tokens, and the number of matches."""
    tokenizer = Tokenizer.from_str(Artifact.open(artifact).tokenizer_json())
    results = golden(artifact, path)
    lines = [
        f"{'same' if r.matches else 'left'} {r.same:3d}/{len(r.case.greedy_ids):3d} (gap {r.case.smallest_gap:.4f})  "
        f"{tokenizer.decode(r.ids)[:60]!r}"
        for r in results
    ]
    return "\n".join([*lines, f"{sum(r.matches for r in results)} of {len(results)} golden texts reproduced"])
