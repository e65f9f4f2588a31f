"""Samples of counters, gauges and histograms over a window, and what can be told from them: plain arithmetic.

The same for samples out of Prometheus and for those we took ourselves, so that both mean the same. Times are seconds
on one monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Sample = tuple[float, float]
"""(time in seconds, value)."""


@dataclass(frozen=True)
class Series:
    """One series' samples in the window, oldest first, at least one."""

    name: str
    labels: Mapping[str, str]
    samples: Sequence[Sample]

    @property
    def last_s(self) -> float:
        """When it was last seen."""
        return self.samples[-1][0]

    def increase(self, after_s: float = -math.inf) -> float:
        """How far a counter rose; after a reset it began at 0 again. The first sample counts for nothing."""
        return sum(_risen(before, after) for (_, before), (at_s, after) in pairwise(self.samples) if at_s > after_s)


@dataclass(frozen=True)
class Buckets:
    """A histogram's increase: (upper bound, how many are at most that), rising, the last bound infinite."""

    cumulative: Sequence[tuple[float, float]]

    @property
    def count(self) -> float:
        """Observations in all."""
        return self.cumulative[-1][1] if self.cumulative else 0.0

    def quantile(self, q: float) -> float | None:
        """As PromQL's `histogram_quantile`: linear within a bucket, the highest finite bound beyond it."""
        if self.count <= 0:
            return None
        rank, low, below = q * self.count, 0.0, 0.0
        for bound, upto in self.cumulative:
            if upto >= rank and upto > below:
                return low if math.isinf(bound) else min(bound, low + (bound - low) * (rank - below) / (upto - below))
            low, below = (low if math.isinf(bound) else bound), upto
        return low

    def variance(self) -> float | None:
        """As if values were spread evenly within each bucket; beyond the highest finite bound they lie at it."""
        if self.count <= 0:
            return None
        parts: list[tuple[float, float, float]] = []
        low, below = 0.0, 0.0
        for bound, upto in self.cumulative:
            high = low if math.isinf(bound) else bound
            parts.append((upto - below, (low + high) / 2, (high - low) ** 2 / 12))
            low, below = high, upto
        mean = sum(n * middle for n, middle, _ in parts) / self.count
        return sum(n * ((middle - mean) ** 2 + within) for n, middle, within in parts) / self.count


@dataclass(frozen=True)
class Window:
    """All series of one look. One that was not seen for more than `missed` of its intervals is over.

    Prometheus looks at each target at another time, so that up to one interval tells nothing. `previous_s` is when the
    look before was, where each look takes samples of its own.
    """

    series: Sequence[Series]
    missed: float = 1.5
    previous_s: float | None = None

    @property
    def newest_s(self) -> float | None:
        """When anything was last seen; None if nothing was."""
        return max((s.last_s for s in self.series), default=None)

    @property
    def span_s(self) -> float:
        """From the first sample to the last."""
        first_s = min((s.samples[0][0] for s in self.series), default=0.0)
        return (self.newest_s or first_s) - first_s

    def named(self, name: str, **labels: Collection[str | None]) -> list[Series]:
        """Those of a name, with each given label one of the values."""
        return [s for s in self.series if s.name == name and all(s.labels.get(k) in v for k, v in labels.items())]

    def increase(self, name: str, after_s: float = -math.inf, **labels: Collection[str | None]) -> float:
        """How far a counter rose after a time, over all its series."""
        return sum(s.increase(after_s) for s in self.named(name, **labels))

    def latest(self, name: str) -> float | None:
        """A gauge's value now, over all series that still live; None if none does."""
        values = [s.samples[-1][1] for s in self.named(name) if self._lives(s)]
        return sum(values) if values else None

    def mean(self, histogram: str) -> float | None:
        """Mean of what was observed within the window."""
        count = self.increase(f"{histogram}_count")
        return self.increase(f"{histogram}_sum") / count if count > 0 else None

    def buckets(self, histogram: str) -> Buckets:
        """A histogram's increase, over all series with the same bounds."""
        counts: dict[float, float] = {}
        for s in self.named(f"{histogram}_bucket"):
            bound = float(s.labels["le"])
            counts[bound] = counts.get(bound, 0.0) + s.increase()
        return Buckets(sorted(counts.items()))

    def dispersion(self, name: str) -> float | None:
        """Variance of a counter's steps over their mean, each step against its length; None if that tells too little.

        For a renewal process this tends to the squared coefficient of variation of the times between events (the
        asymptotic index of dispersion for counts: Cox and Lewis, 1966, section 4.5): 1 for a Poisson process.
        """
        deviations: list[float] = []
        for s in self.named(name):
            span_s = s.last_s - s.samples[0][0]
            rate = s.increase() / span_s if span_s > 0 else 0.0
            steps = [(after[0] - before[0], _risen(before[1], after[1])) for before, after in pairwise(s.samples)]
            deviations += [(risen - rate * dt) ** 2 / (rate * dt) for dt, risen in steps if rate * dt > 0]
        if len(deviations) < _LEAST_STEPS:
            return None
        return sum(deviations) / (len(deviations) - 1)

    def _lives(self, series: Series) -> bool:
        """Whether it was seen at the last look: a replica that is gone must not keep its requests in flight."""
        if len(series.samples) == 1:
            return True
        interval_s = (series.last_s - series.samples[0][0]) / (len(series.samples) - 1)
        return (self.newest_s or 0.0) - series.last_s <= self.missed * interval_s


_LEAST_STEPS = 4


def _risen(before: float, after: float) -> float:
    return after - before if after >= before else after
