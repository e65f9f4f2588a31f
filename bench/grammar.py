"""`edgecascade bench grammar`: what holding answers to a form costs, and what forced tokens save.

In turns, from one prompt: free text, the same text under a grammar that allows any text and functions to be called (so
that nothing is forced and the ids are the same), and JSON of a schema. The machine may be busy: compare the rows of one
run. The grammar's own work is timed once more alone, on the ids that were decoded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from models.artifact.store import Artifact
from models.runtime.decode import Guide
from models.runtime.grammar import Grammars
from models.runtime.local import LocalTier
from models.runtime.tier import Chat, JsonForm, Limits, Token, Tool, ToolUse

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 40},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 4},
        "mood": {"enum": ["cheerful", "calm", "tired"]},
    },
    "required": ["name", "age", "city", "hobbies", "mood"],
    "additionalProperties": False,
}
PROMPT = Chat(({"role": "user", "content": "Describe a person called Anna, 34, of Lyon, who plays chess and tennis."},))
TOOL = Tool("look_up", '{"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}')
FORMS = {
    "free": Limits(),
    "free text, calls possible": Limits(tools=ToolUse((TOOL,))),
    "JSON of a schema": Limits(json=JsonForm(json.dumps(SCHEMA), strict=True)),
}


@dataclass(frozen=True)
class Row:
    """One form of answer; for each round the seconds of a token, and how many of them the grammar takes alone."""

    tokens: int
    forced: int
    token_s: Sequence[float]
    grammar_s: Sequence[float]

    @property
    def grammar_share(self) -> float:
        """The grammar's part of the decode."""
        return median(self.grammar_s) / median(self.token_s)

    def slower_than(self, other: Row) -> float:
        """Median ratio of a token's time to the other's, round by round: both met the same load."""
        return median(mine / its for mine, its in zip(self.token_s, other.token_s, strict=True))


def measure(path: Path, rounds: int, max_tokens: int, threads: int) -> dict[str, Row]:
    """Decode in turns; raises `ArtifactError`. The first round warms up and is not counted."""
    tier = LocalTier.open(path, "bench", threads)
    artifact = Artifact.open(path)
    vocab_size = artifact.manifest.architecture.vocab_size
    grammars = Grammars(artifact.tokenizer_json(), vocab_size, artifact.manifest.eos_ids)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    answers: dict[str, list[Token]] = {}
    for _ in range(rounds + 1):
        for name, limits in FORMS.items():
            answers[name], token_s = _decode(tier, Limits(max_tokens, json=limits.json, tools=limits.tools))
            times[name].append((token_s, _walk(grammars.guide(limits), answers[name], vocab_size)))
    return {name: _row(answers[name], times[name][1:]) for name in FORMS}


def report(rows: Mapping[str, Row], *, as_json: bool) -> None:
    """A table for a person, and JSON last."""
    if not as_json:
        Console(width=110).print(_table(rows))
    print(json.dumps({name: round(value, 4) for name, value in _figures(rows).items()}))


def _table(rows: Mapping[str, Row]) -> Table:
    table = Table("", "tokens", "forced", "ms a token", "grammar, µs a token", "share of decode")
    for name, row in rows.items():
        cells = (f"{1e3 * median(row.token_s):.2f}", f"{1e6 * median(row.grammar_s):.0f}")
        table.add_row(name, str(row.tokens), str(row.forced), *cells, f"{100 * row.grammar_share:.1f} %")
    return table


def _figures(rows: Mapping[str, Row]) -> dict[str, float]:
    free, held, schema = rows.values()
    return {
        "mask_decode_ratio": held.slower_than(free),
        "mask_share": held.grammar_share,
        "schema_share": schema.grammar_share,
        "schema_token_ratio": schema.slower_than(free),
        "forced_share": schema.forced / schema.tokens,
    }


def _decode(tier: LocalTier, limits: Limits) -> tuple[list[Token], float]:
    """The answer, and seconds a token after the first that was not forced: with that one the prompt has been read."""
    answer = list[Token]()
    begun, before = time.perf_counter(), 0
    for token in tier.generate(PROMPT, limits):
        answer.append(token)
        if not before and not _is_forced(token):
            begun, before = time.perf_counter(), len(answer)
    return answer, (time.perf_counter() - begun) / max(1, len(answer) - before)


def _is_forced(token: Token) -> bool:
    return (token.logprob, token.margin) == (0.0, 1.0)


def _walk(guide: Guide, answer: Sequence[Token], vocab_size: int) -> float:
    """Seconds a token that the guide takes alone on the ids of an answer."""
    logits, ids = np.zeros(vocab_size, np.float32), [token.id for token in answer]
    begun = time.perf_counter()
    at = 0
    while at < len(ids):
        at += len(guide.forced())
        if at < len(ids):
            guide.masked(logits)
            guide.take(ids[at])
            at += 1
    return (time.perf_counter() - begun) / len(ids)


def _row(answer: Sequence[Token], times: Sequence[tuple[float, float]]) -> Row:
    forced = sum(_is_forced(token) for token in answer)
    token_s, grammar_s = zip(*times, strict=True)
    return Row(len(answer), forced, token_s, grammar_s)
