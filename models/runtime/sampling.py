"""Pick the next token from logits. Pure: the caller owns the random generator."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.runtime.tier import Limits

Floats = NDArray[np.float32]
_FIRST_LOOK = 1024
"""Candidates that are sorted at first; the nucleus seldom needs more."""
_FEW = 4
"""Up to so many of the best are found faster by a scan each than by a partition (49,152 logits: 12 against 308 µs)."""


class Random(Protocol):
    """Where a draw comes from."""

    def random(self) -> float:
        """A number from 0 to below 1."""
        ...


class Draws:
    """The numbers of a generator, which can be looked at before they are drawn."""

    def __init__(self, seed: int | None) -> None:
        self._rng = np.random.default_rng(seed)
        self._seen: deque[float] = deque()

    def random(self) -> float:
        """The next number."""
        return self._seen.popleft() if self._seen else self._rng.random()

    def ahead(self, count: int) -> Sequence[float]:
        """The next `count` numbers; none of them is drawn."""
        while len(self._seen) < count:
            self._seen.append(self._rng.random())
        return list(islice(self._seen, count))


@dataclass(frozen=True)
class Pick:
    """The chosen token; `logprob` and `margin` before temperature, `top` the likeliest ids and log-probabilities."""

    id: int
    logprob: float
    margin: float
    top: tuple[tuple[int, float], ...] = ()


def pick(logits: Floats, limits: Limits, rng: Random) -> Pick:
    """Choose a token id from logits (V,); one whose logit is −inf is neither chosen nor reported."""
    peak = float(logits.max())
    log_total = peak + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    best = best_ids(logits, max(2, limits.top_logprobs))
    probabilities = np.exp(logits[best[:2]].astype(np.float64) - log_total)
    margin = float(probabilities[0] - probabilities[1]) if len(probabilities) > 1 else 1.0
    chosen = int(best[0]) if limits.temperature == 0 else draw(logits, limits.temperature, limits.top_p, rng)
    top = tuple((int(i), float(logits[i] - log_total)) for i in best[: limits.top_logprobs] if logits[i] > -np.inf)
    return Pick(chosen, float(logits[chosen] - log_total), margin, top)


def best_ids(logits: Floats, count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest logits, largest first; among equals the smaller id, as argmax does."""
    count = min(count, len(logits))
    if count <= _FEW:
        found = _best_by_scans(logits, count)
        if np.isfinite(logits[found[-1]]):  # among masked logits a scan finds the same one again
            return found
    floor = np.partition(logits, -count)[-count]
    candidates = np.flatnonzero(logits >= floor)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]


def _best_by_scans(logits: Floats, count: int) -> NDArray[np.intp]:
    left, found = logits.copy(), np.empty(count, np.intp)
    for place in range(count):
        found[place] = left.argmax()
        left[found[place]] = -np.inf
    return found


def nucleus(scaled: Floats, top_p: float) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the smallest set of ids whose probability reaches `top_p`, likeliest first, with their probabilities."""
    weights = np.exp(scaled.astype(np.float64) - float(scaled.max()))
    weights /= weights.sum()
    count = _FIRST_LOOK if top_p < 1 else len(weights)
    ids = best_ids(scaled, count)
    if count < len(weights) and weights[ids].sum() < top_p:
        ids = best_ids(scaled, len(weights))
    reached = np.cumsum(weights[ids]) >= top_p
    kept = ids[: int(reached.argmax()) + 1] if top_p < 1 and reached.any() else ids
    kept = kept[weights[kept] > 0]
    return kept, weights[kept]


def draw(logits: Floats, temperature: float, top_p: float, rng: Random) -> int:
    """Draw from the nucleus of the tempered distribution; the same generator state gives the same token."""
    scaled = (logits - logits.max()) / max(temperature, 1e-6)
    ids, weights = nucleus(np.asarray(scaled, np.float32), top_p)
    edges = np.cumsum(weights)
    return int(ids[min(int(np.searchsorted(edges, rng.random() * edges[-1], side="right")), len(ids) - 1)])
