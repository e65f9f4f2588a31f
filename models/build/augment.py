"""Make new utterances out of labelled ones: swapped slot values, neighbouring words, crossed sentences. No torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.build.datasets import Example


class SlotSwapper:
    """Replaces slot values by other training values of the same slot, so that spans are learnt, not names."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._values: dict[str, list[list[str]]] = {}
        for example in examples:
            for name, words in spans(example) if example.tags else ():
                if name:
                    self._values.setdefault(name, []).append(words)

    def swap(self, example: Example, rate: float, rng: random.Random) -> Example:
        """Return the example with each slot value replaced with probability `rate`."""
        if not example.tags:
            return example
        words: list[str] = []
        tags: list[str] = []
        for name, span in spans(example):
            value = rng.choice(self._values[name]) if name and rng.random() < rate else span
            words.extend(value)
            tags.extend(["O"] * len(value) if not name else [f"B-{name}", *[f"I-{name}"] * (len(value) - 1)])
        return replace(example, text=" ".join(words), tags=tuple(tags))


def spans(example: Example) -> Iterator[tuple[str, list[str]]]:
    """Yield `(slot name or '', words)` in order."""
    name, words = "", list[str]()
    for word, tag in zip(example.text.split(), example.tags, strict=True):
        if tag.startswith("I-") and tag[2:] == name:
            words.append(word)
            continue
        if words:
            yield name, words
        name, words = tag[2:], [word]
    if words:
        yield name, words


class Neighbours:
    """For words that are one token, the words whose embeddings lie nearest, such as `sent` for `send`."""

    def __init__(
        self,
        words: Sequence[str],
        tokenizer: Tokenizer,
        embedding: NDArray[np.float32],
        count: int = 6,
        least: float = 0.4,
    ) -> None:
        single = {
            w: e.ids[0]
            for w, e in zip(words, tokenizer.encode_batch([f" {w}" for w in words]), strict=True)
            if len(e.ids) == 1
        }
        known = list(single)
        table = embedding[[single[w] for w in known]].astype(np.float32)
        table -= table.mean(0)
        table /= np.linalg.norm(table, axis=1, keepdims=True)
        likeness = table @ table.T
        np.fill_diagonal(likeness, -1)
        best = np.argsort(-likeness, axis=1)[:, :count]
        self._near: Mapping[str, list[str]] = {
            w: [known[j] for j in best[i] if likeness[i, j] >= least] for i, w in enumerate(known)
        }

    def replace(self, example: Example, rate: float, rng: random.Random) -> Example:
        """Return the example with a share of its unlabelled words replaced by neighbours."""
        words = example.text.split()
        tags = example.tags or ("O",) * len(words)
        new = [
            rng.choice(self._near[w.lower()]) if t == "O" and rng.random() < rate and self._near.get(w.lower()) else w
            for w, t in zip(words, tags, strict=True)
        ]
        return replace(example, text=" ".join(new))


class Crossing:
    """Joins the head of one utterance to the tail of another of the same intent."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._by_intent: dict[tuple[str, str], list[Example]] = {}
        for example in examples:
            self._by_intent.setdefault((example.skill, example.intent), []).append(example)

    def cross(self, example: Example, rng: random.Random) -> Example:
        """Return a crossing of the example with a random sibling."""
        other = rng.choice(self._by_intent[example.skill, example.intent])
        words, tail = example.text.split(), other.text.split()
        cut = rng.uniform(0.3, 0.7)
        return replace(
            example, text=" ".join(words[: max(1, round(cut * len(words)))] + tail[round(cut * len(tail)) :])
        )
