"""The HPA's formula with its tolerance and its window for scaling down; the same for every policy."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field


@dataclass
class Hpa:
    """Bounds, tolerance and stabilisation, as `autoscaling/v2` documents them; no limit on the pace."""

    minimum: int
    maximum: int
    tolerance: float = 0.1
    stabilisation_s: float = 0.0
    _recent: deque[tuple[float, int]] = field(init=False, default_factory=deque)

    def replicas(self, now_s: float, wanted: float, current: int) -> int:
        """How many there shall be, where there are `current` now."""
        near = current > 0 and abs(wanted / current - 1) <= self.tolerance + 1e-9
        desired = current if near else math.ceil(wanted - 1e-9)
        desired = min(self.maximum, max(self.minimum, desired))
        self._recent.append((now_s, desired))
        while self._recent[0][0] < now_s - self.stabilisation_s:
            self._recent.popleft()
        if desired >= current:
            return desired
        return min(current, max(count for _, count in self._recent))
