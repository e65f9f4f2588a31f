"""How much power there is to spend, as routing sees it. Pure: readings and time come in as values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

REQUEST = "request"
"""The source of a level that came with a request: it outranks what the sensors say."""

_CREDIBLE_C = (-60.0, 200.0)
"""Outside of it a thermometer is broken or not connected: sensors say -127, -273 or 65535 then."""


class PowerMode(StrEnum):
    """What the battery and the heat allow."""

    NORMAL = "normal"
    SAVE = "save"
    """Under `battery.downscale_below`, or hot: smaller work, no hedging."""
    CRITICAL = "critical"
    """Under `battery.fallback_below`: no model at all."""


_ORDER = tuple(PowerMode)


@dataclass(frozen=True)
class Reading:
    """What one source said once; None: it does not know.

    `level` is a share, 0…1. `charging`: power comes from outside, whether the battery takes it or is full. `watts`
    are drawn from the battery (below 0: charging), or by what the meter measures. `throttled`: the processor is held
    back to cool down. `taken_at_s` is on the clock of `next_power`'s `now_s`.
    """

    source: str
    taken_at_s: float
    level: float | None = None
    charging: bool | None = None
    watts: float | None = None
    celsius: float | None = None
    throttled: bool | None = None


@dataclass(frozen=True)
class PowerLimits:
    """When to save and when to stop; raises `ValueError` naming the field.

    Shares of a full battery: `downscale_below`, `fallback_below`, and `hysteresis`, the width that a level must rise
    above a limit before its mode is left. Degrees Celsius: hot from `hot_above_c` until under `cool_below_c`.
    `max_age_s`: readings older than that are not believed.
    """

    downscale_below: float = 0.2
    fallback_below: float = 0.05
    hysteresis: float = 0.03
    hot_above_c: float = 80.0
    cool_below_c: float = 70.0
    max_age_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse limits that contradict each other or could never be left again."""
        if not 0 <= self.downscale_below < 1:
            raise ValueError(f"downscale_below is {self.downscale_below}; it must be a share from 0 to below 1")
        if not 0 <= self.fallback_below <= self.downscale_below:
            raise ValueError(f"fallback_below is {self.fallback_below}; it must be from 0 to downscale_below")
        if not 0 <= self.hysteresis < 1 - self.downscale_below:
            raise ValueError(f"hysteresis is {self.hysteresis}; downscale_below and it must stay below 1 together")
        if not _CREDIBLE_C[0] < self.cool_below_c <= self.hot_above_c < _CREDIBLE_C[1]:
            raise ValueError(f"cool_below_c is {self.cool_below_c}; it must not be above hot_above_c, degrees Celsius")
        if not 0 < self.max_age_s < math.inf:
            raise ValueError(f"max_age_s is {self.max_age_s}; it must be a number of seconds above 0")


@dataclass(frozen=True)
class Power:
    """The state that a decision is made in. `level` is a share, 0…1, None where nothing tells it.

    `mode` is the worse of what the battery and the heat ask for; `battery` is the battery's part, which the next
    step needs. `source` gave the level, and with it `charging`; `celsius` is the hottest that was read.
    """

    mode: PowerMode = PowerMode.NORMAL
    level: float | None = None
    hot: bool = False
    source: str = "none"
    battery: PowerMode = PowerMode.NORMAL
    charging: bool | None = None
    celsius: float | None = None


def next_power(limits: PowerLimits, previous: Power, readings: Iterable[Reading], now_s: float) -> Power:
    """The state at `now_s`, from the state before and the latest reading of each source.

    Each fresh level asks for a mode; the worst counts, so that another reading never makes things better. Where no
    fresh reading tells a level, the battery asks for nothing; so does heat that nobody measures any more.
    """
    fresh = [reading for reading in readings if _is_fresh(reading, limits, now_s)]
    levels = _levels(fresh)
    battery = _worst(_battery_mode(limits, previous.battery, level, reading) for level, reading in levels)
    celsius = max(_temperatures(fresh), default=None)
    hot = _is_hot(limits, previous, celsius) or any(reading.throttled is True for reading in fresh)
    level, lowest = min(levels, key=lambda pair: pair[0], default=(None, None))
    return Power(
        mode=_worst((battery, PowerMode.SAVE)) if hot else battery,
        level=level,
        hot=hot,
        source=lowest.source if lowest else "none",
        battery=battery,
        charging=lowest.charging if lowest else None,
        celsius=celsius,
    )


def _is_fresh(reading: Reading, limits: PowerLimits, now_s: float) -> bool:
    return 0 <= now_s - reading.taken_at_s <= limits.max_age_s


def _levels(fresh: list[Reading]) -> list[tuple[float, Reading]]:
    """The credible levels; only the request's own, if it brought one."""
    told = [(reading.level, reading) for reading in fresh if reading.level is not None and 0 <= reading.level <= 1]
    return [(level, reading) for level, reading in told if reading.source == REQUEST] or told


def _battery_mode(limits: PowerLimits, previous: PowerMode, level: float, reading: Reading) -> PowerMode:
    """What one level asks for. Power from outside lifts SAVE, but not CRITICAL: a plug can be pulled."""
    leave_critical = limits.fallback_below + limits.hysteresis
    if level < limits.fallback_below or (previous is PowerMode.CRITICAL and level <= leave_critical):
        return PowerMode.CRITICAL
    leave_save = limits.downscale_below + limits.hysteresis
    low = level < limits.downscale_below or (previous is not PowerMode.NORMAL and level <= leave_save)
    return PowerMode.SAVE if low and reading.charging is not True else PowerMode.NORMAL


def _temperatures(fresh: list[Reading]) -> list[float]:
    told = [reading.celsius for reading in fresh if reading.celsius is not None]
    return [celsius for celsius in told if _CREDIBLE_C[0] < celsius < _CREDIBLE_C[1]]


def _is_hot(limits: PowerLimits, previous: Power, celsius: float | None) -> bool:
    if celsius is None:
        return False
    return celsius >= (limits.cool_below_c if previous.hot else limits.hot_above_c)


def _worst(modes: Iterable[PowerMode]) -> PowerMode:
    return max(modes, key=_ORDER.index, default=PowerMode.NORMAL)
