"""Run a tier's frames engine over labelled utterances and keep what exits are trained on: states between layers.

States are those of the real engine, in its quantisation, each divided by its root mean square (as the next layer's norm
would) and kept in fp16. Work is done in parts, which a stopped run finds again. No torch. C width, L layers kept.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.artifact.names import FRAMES, PLAIN
from models.artifact.store import Artifact
from models.build.batches import Encoder, Row
from models.build.datasets import Example, foreign
from models.build.progress import Report
from models.errors import DataError
from models.runtime.engine import Embeddings
from models.runtime.exits import unit
from models.runtime.layers import Layers
from models.runtime.sessions import EngineOptions, parts_of
from models.skills import SkillSet

Array = NDArray[Any]
PART_ROWS = 500


@dataclass(frozen=True)
class Seen:
    """What the tier saw of one row: `states` (L, T + W, C) of the prompt's tokens and of the echo's word ends.

    `final` (1 + W, C) are the last layer's normalised states at `<answer>` and the word ends.
    """

    row: Row
    states: Array
    final: Array


@dataclass(frozen=True)
class Kept:
    """The same at one depth: `states` (T + W, C) after `passed` layers."""

    row: Row
    passed: int
    states: Array
    final: Array


FOREIGN_PER_SKILL, ROWS, SEED = 400, 35_000, 13
"""Of other skills', in all, and what shuffles them."""


def lessons(examples: Sequence[Example], encoder: Encoder, skills: SkillSet) -> list[Row]:
    """The rows that exits learn from, shuffled: the examples, and some of other skills that each must reject."""
    rng, strange, mix = random.Random(SEED), foreign(examples, skills), list(examples)
    for name in skills.names:
        pool = [e for e in strange if e.skill == name]
        mix += rng.sample(pool, min(FOREIGN_PER_SKILL, len(pool)))
    rng.shuffle(mix)
    return [encoder.row(e) for e in mix[:ROWS]]


class Observer:
    """An artifact's frames engine, cut wherever states are kept: after each number of layers in `passed`."""

    def __init__(self, artifact: Artifact, passed: Sequence[int], threads: int = 1) -> None:
        shape, self.passed = artifact.manifest.architecture, tuple(passed)
        if artifact.manifest.skills is None:
            raise DataError(f"{artifact.path} has no skills; exits are trained on a tier that answers them")
        options = EngineOptions(threads, spin=False, sequences=1)
        parts = dict(parts_of(artifact, options, passed))
        chosen = parts.get(FRAMES) or parts[PLAIN]
        self._embeddings = Embeddings(artifact.embeddings(), artifact.labels().get("inputs"), shape.width)
        self._layers = Layers(shape, chosen.segments, options, table=self._embeddings.flat())
        self.identity = f"{artifact.manifest.model_version} {self.passed}"
        self.skills, self.vocab_size = artifact.manifest.skills, self._embeddings.vocab_size
        self.encoder = Encoder(Tokenizer.from_str(artifact.tokenizer_json()), self.skills, self.vocab_size)
        self.labels, self.n_layers = artifact.labels()["labels"], shape.n_layers

    def see(self, row: Row) -> Seen:
        """Read the prompt and, where there are tags, the echo after it, as the runtime does."""
        prompt = row.answer_at + 1
        states, final = self._pass(row.ids[:prompt], 0)
        if row.tag_at:
            echoed, ends = self._pass(row.ids[prompt:], prompt), [at - prompt for at in row.tag_at]
            states = np.concatenate([states, echoed[0][:, ends]], axis=1)
            final = np.concatenate([final[-1:], echoed[1][ends]])
        return Seen(row, states, final if row.tag_at else final[-1:])

    def _pass(self, ids: Sequence[int], before: int) -> tuple[Array, Array]:
        """Kept states (L, T, C) and the last ones (T, C), both fp16."""
        length, kept = before + len(ids), []
        stack = self._layers.stack(range(1), length, len(ids), head=False)
        for segment in stack.run(self._embeddings.rows(ids)[None], [length - 1]):
            if segment.span.stop in self.passed:
                kept.append(unit(segment["carried"][0]).astype(np.float16))
        return np.stack(kept), segment["hidden"][0].astype(np.float16)


def kept_at(passed: int, observer: Observer, rows: Sequence[Row], cache: Path, report: Report) -> list[Kept]:
    """What the tier saw of each row at one depth."""
    at = observer.passed.index(passed)
    seen = see_all(observer, rows, cache, report)
    return [Kept(s.row, passed, s.states[at].copy(), s.final.copy()) for s in seen]


def see_all(observer: Observer, rows: Sequence[Row], cache: Path, report: Report) -> Iterator[Seen]:
    """Yield what the tier sees of each row, in order; parts that `cache` holds already are read instead."""
    cache.mkdir(parents=True, exist_ok=True)
    text = repr([(row.ids, row.answer_at, row.tag_at) for row in rows])
    stamp = hashlib.sha256(f"{observer.identity} {text}".encode()).hexdigest()[:12]
    for start in range(0, len(rows), PART_ROWS):
        part, file = rows[start : start + PART_ROWS], cache / f"{stamp}-{start // PART_ROWS:04d}.npz"
        if not file.is_file():
            _write(file, [observer.see(row) for row in part])
        yield from _read(file, part)
        report(start + len(part), len(rows), "states")


def _write(file: Path, seen: Sequence[Seen]) -> None:
    half = file.with_suffix(".part")
    with half.open("wb") as out:
        states, final = np.concatenate([s.states for s in seen], axis=1), np.concatenate([s.final for s in seen])
        np.savez(out, states=states, final=final)
    half.replace(file)


def _read(file: Path, rows: Sequence[Row]) -> Iterator[Seen]:
    with np.load(file) as held:
        states, final = held["states"], held["final"]
    at = top = 0
    for row in rows:
        n_states, n_final = row.answer_at + 1 + len(row.tag_at), 1 + len(row.tag_at)
        yield Seen(row, states[:, at : at + n_states], final[top : top + n_final])
        at, top = at + n_states, top + n_final
