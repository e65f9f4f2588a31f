"""A level from what a meter measures: by the battery's voltage, or by counting what flows."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise

_SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True)
class VoltageCurve:
    """Pairs of volts and level of the battery as it is wired, both rising; raises `ValueError`.

    Under load a battery's voltage sags by the current times its inner resistance: measure the curve under the load
    that is usual.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        """Refuse what is no curve."""
        volts, levels = [volt for volt, _ in self.points], [level for _, level in self.points]
        steps = [*pairwise(volts)]
        if len(volts) < 2 or not all(0 < one < other < 1000 for one, other in steps):  # noqa: PLR2004
            raise ValueError("needs at least two points, with rising volts")
        if not all(0 <= level <= 1 for level in levels) or levels != sorted(levels):
            raise ValueError("needs levels from 0 to 1 that do not fall")

    def level(self, volts: float) -> float | None:
        """Between two points on the line that joins them; outside, the nearer end.

        None far outside (under half of the lowest, over twice the highest): there is no such battery on the meter.
        """
        if not self.points[0][0] / 2 <= volts <= 2 * self.points[-1][0]:
            return None
        above = bisect_right(self.points, volts, key=lambda point: point[0])
        if above == 0:
            return self.points[0][1]
        if above == len(self.points):
            return self.points[-1][1]
        (v0, l0), (v1, l1) = self.points[above - 1 : above + 1]
        return l0 + (l1 - l0) * (volts - v0) / (v1 - v0)


@dataclass
class CoulombCount:
    """Counts the charge that leaves a battery of `capacity_ah`, between two readings as if its current changed evenly.

    The count begins at a level that something else tells. Over a gap of more than `gap_s` it is lost, because nobody
    knows what flowed, and must begin again.
    """

    capacity_ah: float
    gap_s: float = 60.0
    _level: float | None = field(default=None, init=False)
    _last: tuple[float, float] | None = field(default=None, init=False)

    def count(self, amperes: float, at_s: float, begin: float | None) -> float | None:
        """The level after a reading of `amperes` out of the battery; `begin` is where a count would begin now."""
        last, self._last = self._last, (amperes, at_s)
        if last is None or self._level is None or not 0 <= at_s - last[1] <= self.gap_s:
            self._level = begin
            return self._level
        drawn_ah = (last[0] + amperes) / 2 * (at_s - last[1]) / _SECONDS_AN_HOUR
        self._level = min(1.0, max(0.0, self._level - drawn_ah / self.capacity_ah))
        return self._level


@dataclass
class Gauge:
    """The level of a battery behind a meter: counted where a capacity is known, else by voltage, else not known.

    A count begins by the curve, or at `start_level`, which holds for the first count alone: nobody knows it after
    a gap.
    """

    curve: VoltageCurve | None = None
    count: CoulombCount | None = None
    start_level: float | None = None

    def level(self, volts: float, amperes: float | None, at_s: float) -> float | None:
        """The level after one reading; `amperes` flow out of the battery."""
        by_voltage = self.curve.level(volts) if self.curve else None
        if self.count is None or amperes is None:
            return by_voltage
        begin, self.start_level = (self.start_level if by_voltage is None else by_voltage), None
        return self.count.count(amperes, at_s, begin)
