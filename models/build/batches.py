"""Turn examples into padded token batches of similar length, with optional noise. Knows nothing of torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.build.datasets import Example
from models.skills import SkillSet, encode

IGNORE = -100
"""A tag position that carries no label."""


@dataclass(frozen=True)
class Row:
    """One encoded example: tokens `<skill> w… <answer> [w…]`, its intent row and the rows of its tags."""

    ids: tuple[int, ...]
    answer_at: int
    skill: int
    intent: int
    tag_at: tuple[int, ...] = ()
    tags: tuple[int, ...] = ()
    key: int = -1


@dataclass(frozen=True)
class Batch:
    """Padded rows: `ids` (B, T); one intent a row; flat tag positions `tag_at` (N, 2) = (row, position).

    `skill` (B,) indexes the skill set; `intent` and `tags` count from the skill's first intent or tag row.
    `keys` (B,) identify examples, for cached teacher outputs.
    """

    ids: NDArray[np.int64]
    answer_at: NDArray[np.int64]
    skill: NDArray[np.int64]
    intent: NDArray[np.int64]
    tag_at: NDArray[np.int64]
    tags: NDArray[np.int64]
    keys: NDArray[np.int64]


class Encoder:
    """Encodes examples for one model's tokenizer; words are cached."""

    def __init__(self, tokenizer: Tokenizer, skills: SkillSet, vocab_size: int) -> None:
        self._tokenizer, self._skills, self._vocab_size = tokenizer, skills, vocab_size
        self._words: dict[str, list[int]] = {}
        self._intents = [{name: i for i, name in enumerate(s.intents)} for s in skills.skills]
        self._tags = [{name: i for i, name in enumerate(s.tags)} for s in skills.skills]

    def tokenize(self, word: str) -> list[int]:
        """Ids of one word, led by a space."""
        if word not in self._words:
            self._words[word] = self._tokenizer.encode(word, add_special_tokens=False).ids
        return self._words[word]

    def row(self, example: Example, key: int = -1) -> Row:
        """Encode one example."""
        skill = self._skills.index(example.skill)
        prompt = encode(self._skills, example.skill, example.text, self.tokenize, self._vocab_size)
        answer_at, intent = len(prompt.ids) - 1, self._intents[skill][example.intent]
        if not example.tags:
            return Row(prompt.ids, answer_at, skill, intent, key=key)
        known = self._tags[skill]
        tags = tuple(known.get(tag, IGNORE) for tag in example.tags)
        at = tuple(answer_at + 1 + end for end in prompt.word_ends)
        return Row(prompt.ids + prompt.echo, answer_at, skill, intent, at, tags, key)


def batches(
    rows: Sequence[Row], token_budget: int, rng: random.Random | None = None, pool: int = 2048
) -> Iterator[Batch]:
    """Group rows of similar length into batches of up to `token_budget` padded tokens; `rng` shuffles them.

    Lengths are padded to multiples of four: fewer shapes, fewer kernels to compile.
    """
    order = list(range(len(rows)))
    if rng:
        rng.shuffle(order)
    groups: list[list[int]] = []
    for start in range(0, len(order), pool):
        group: list[int] = []
        for index in sorted(order[start : start + pool], key=lambda i: len(rows[i].ids)):
            if group and (len(group) + 1) * _padded(len(rows[index].ids)) > token_budget:
                groups.append(group)
                group = []
            group.append(index)
        groups.append(group)
    if rng:
        rng.shuffle(groups)
    for group in groups:
        yield collate([rows[i] for i in group])


def _padded(length: int) -> int:
    return -(-length // 4) * 4


def collate(rows: Sequence[Row]) -> Batch:
    """Pad rows on the right; causal attention never looks there."""
    width = _padded(max(len(r.ids) for r in rows))
    ids = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
    marks = [(i, at, tag) for i, r in enumerate(rows) for at, tag in zip(r.tag_at, r.tags, strict=True)]
    flat = np.array(marks, np.int64).reshape(-1, 3)
    column: Mapping[str, NDArray[np.int64]] = {
        name: np.array([getattr(r, name) for r in rows], np.int64) for name in ("answer_at", "skill", "intent", "key")
    }
    return Batch(ids, column["answer_at"], column["skill"], column["intent"], flat[:, :2], flat[:, 2], column["key"])


def add_noise(batch: Batch, rate: float, vocab_size: int, rng: np.random.Generator) -> Batch:
    """Replace a share of the utterance's tokens by random ones, the same in both copies."""
    ids = batch.ids.copy()
    for i, at in enumerate(batch.answer_at):
        n = int(at) - 1
        hit = np.flatnonzero(rng.random(n) < rate)
        random_ids = rng.integers(0, vocab_size, len(hit))
        ids[i, 1 + hit] = random_ids
        if ids.shape[1] > at + n and (batch.tag_at[:, 0] == i).any():
            ids[i, at + 1 + hit] = random_ids
    return replace(batch, ids=ids)
