"""Kubernetes' HorizontalPodAutoscaler for one external metric of type AverageValue, target 1: pure, time is given.

After pkg/controller/podautoscaler (`replica_calculator.go`, `horizontal.go`) and the defaults of `behavior` in
autoscaling/v2.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Behaviour:
    """`*_window_s`: stabilisation; upwards at most the larger of `up_pods` and `up_share` more in `period_s`."""

    tolerance: float = 0.1
    up_window_s: float = 0.0
    down_window_s: float = 300.0
    up_pods: int = 4
    up_share: float = 1.0
    period_s: float = 15.0


@dataclass
class Hpa:
    """Remembers its recommendations and what it did, as the controller does."""

    minimum: int
    maximum: int
    behaviour: Behaviour = field(default_factory=Behaviour)
    _recommended: deque[tuple[float, int]] = field(default_factory=deque)
    _grown: deque[tuple[float, int]] = field(default_factory=deque)

    def desired(self, now_s: float, current: int, value: float) -> int:
        """The replicas to run, from the `current` ones (ready or not) and the metric's value."""
        b = self.behaviour
        ratio = value / current if current else math.inf
        within = 1.0 - b.tolerance <= ratio <= 1.0 + b.tolerance
        replicas = self._stable(now_s, current, current if within else math.ceil(value))
        replicas = min(replicas, self._most(now_s, current))
        replicas = max(self.minimum, min(self.maximum, replicas))
        if replicas > current:
            self._grown.append((now_s, replicas - current))
        return replicas

    def _stable(self, now_s: float, current: int, recommended: int) -> int:
        """Up no further than every recommendation of the one window, down no further than any of the other."""
        b = self.behaviour
        self._recommended.append((now_s, recommended))
        while self._recommended[0][0] < now_s - max(b.up_window_s, b.down_window_s):
            self._recommended.popleft()
        least_up = min(r for at_s, r in self._recommended if at_s >= now_s - b.up_window_s)
        most_down = max(r for at_s, r in self._recommended if at_s >= now_s - b.down_window_s)
        return min(max(current, least_up), most_down)

    def _most(self, now_s: float, current: int) -> int:
        b = self.behaviour
        while self._grown and self._grown[0][0] < now_s - b.period_s:
            self._grown.popleft()
        before = current - sum(count for _, count in self._grown)
        return max(before + b.up_pods, math.ceil(before * (1 + b.up_share)))
