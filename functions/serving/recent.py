"""How long a target took lately: percentiles over a sliding window."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque


class Recent:
    """The last `size` durations not older than `age_s`; sorted as they come. Not locked: its owner does that."""

    def __init__(self, size: int = 128, age_s: float = 30.0, least: int = 8) -> None:
        self._size = size
        self._age_s = age_s
        self._least = least
        self._window: deque[tuple[float, float]] = deque()
        self._sorted: list[float] = []

    def add(self, duration_s: float, now_s: float) -> None:
        """Note one duration; times never run backwards."""
        self._window.append((now_s, duration_s))
        insort(self._sorted, duration_s)
        self._forget(now_s)

    def percentile(self, share: float, now_s: float) -> float | None:
        """The smallest duration that `share` of them do not exceed; None where too few are known (nearest rank)."""
        self._forget(now_s)
        count = len(self._sorted)
        return None if count < self._least else self._sorted[max(0, math.ceil(share * count) - 1)]

    def _forget(self, now_s: float) -> None:
        while self._window and (len(self._window) > self._size or now_s - self._window[0][0] > self._age_s):
            _, old = self._window.popleft()
            del self._sorted[bisect_left(self._sorted, old)]
