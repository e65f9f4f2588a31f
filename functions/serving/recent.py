"""How long a target took lately: percentiles over a sliding window."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque


class Recent:
    """The last `size` durations not older than `age_s`; sorted as they come. Not locked: its owner does that.

    The newest `least` are kept for `keeps_s`, so that what is seldom asked is known all the same; by default no longer.
    """

    def __init__(self, size: int = 128, age_s: float = 30.0, least: int = 8, keeps_s: float = 0.0) -> None:
        self._size = size
        self._age_s = age_s
        self._least = least
        self._keeps_s = max(age_s, keeps_s)
        self._window: deque[tuple[float, float]] = deque()
        self._sorted: list[float] = []

    def add(self, duration_s: float, now_s: float) -> None:
        """Note one duration; times never run backwards."""
        self._window.append((now_s, duration_s))
        insort(self._sorted, duration_s)
        self._forget(now_s)

    def is_fresh(self, now_s: float) -> bool:
        """Whether anything was noted within `age_s`."""
        return bool(self._window) and now_s - self._window[-1][0] <= self._age_s

    def percentile(self, share: float, now_s: float) -> float | None:
        """The smallest duration that `share` of them do not exceed; None where too few are known (nearest rank)."""
        self._forget(now_s)
        count = len(self._sorted)
        return None if count < self._least else self._sorted[max(0, math.ceil(share * count) - 1)]

    def _forget(self, now_s: float) -> None:
        while self._window and self._is_over(now_s):
            _, old = self._window.popleft()
            del self._sorted[bisect_left(self._sorted, old)]

    def _is_over(self, now_s: float) -> bool:
        """Whether the oldest is to go."""
        age_s, count = now_s - self._window[0][0], len(self._window)
        return count > self._size or age_s > (self._age_s if count > self._least else self._keeps_s)
