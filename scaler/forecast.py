"""What the arrival rate will be when a replica ordered now is ready: a level, a damped trend, and their error. Pure.

Holt's method with a damped trend (Gardner and McKenzie, "Forecasting Trends in Time Series", Management Science 1985),
for looks at irregular times; the error is that of its own forecasts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Smoothing:
    """Half lives in seconds: of the level, of the trend, of the measured error, and of the trend as it is continued."""

    level_s: float = 10.0
    trend_s: float = 60.0
    error_s: float = 300.0
    damping_s: float = 30.0


@dataclass(frozen=True)
class Rate:
    """A forecast rate, a second, and its standard deviation."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Forecast:
    """The state between two looks; `Forecast()` has seen nothing. All rates are per second."""

    smoothing: Smoothing = Smoothing()
    at_s: float = -math.inf
    level: float = 0.0
    trend: float = 0.0
    variance: float = 0.0

    def seen(self, at_s: float, rate: float) -> Forecast:
        """The state after a look at `at_s`; one that is not newer than the last changes nothing."""
        passed_s = at_s - self.at_s
        if passed_s == math.inf:
            return Forecast(self.smoothing, at_s, level=rate)
        if passed_s <= 0:
            return self
        expected = self.ahead(passed_s).mean
        error = rate - expected
        level = expected + _weight(passed_s, self.smoothing.level_s) * error
        slope = (level - self.level) / passed_s
        trend = self.trend + _weight(passed_s, self.smoothing.trend_s) * (slope - self.trend)
        variance = self.variance + _weight(passed_s, self.smoothing.error_s) * (error * error - self.variance)
        return Forecast(self.smoothing, at_s, level, trend, variance)

    def ahead(self, seconds: float) -> Rate:
        """The rate `seconds` after the last look; never below zero."""
        life_s = self.smoothing.damping_s / math.log(2)
        reach_s = life_s * (1 - math.exp(-seconds / life_s))
        return Rate(max(0.0, self.level + self.trend * reach_s), math.sqrt(self.variance))


def _weight(passed_s: float, half_life_s: float) -> float:
    """The share of what came in the last `passed_s`, where weights halve every `half_life_s`."""
    return 1 - 2 ** (-passed_s / half_life_s)
