"""What the operator wants: the policy, frozen. `docs/policy.md` documents each key; a test holds it to that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from routing.latency import LatencyLimits
from routing.power import PowerLimits

_MAX_MS = 3_600_000.0
BACK_BELOW = 0.8
"""Share of the latency ceiling under which answers must come before models are asked by all again."""


def _within(key: str, value: float, low: float, high: float) -> None:
    if math.isnan(value) or not low <= value <= high:
        raise ValueError(f"{key} is {value}; it must be a number from {low:g} to {high:g}")


class OnEscalation(StrEnum):
    """How a stream whose tier may change is sent."""

    HOLD = "hold"
    """Nothing before it is clear which tier answers."""
    EVENT = "event"
    """The device's pieces at once; should another tier answer, an event says so and the answer begins again."""


# pydantic reads this where a file is checked (functions/dispatcher/policy_file.py); nothing here imports it.
_CHECKED = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class Battery:
    """Shares of a full battery, see `PowerLimits`."""

    __pydantic_config__ = _CHECKED

    downscale_below: float = PowerLimits.downscale_below
    fallback_below: float = PowerLimits.fallback_below
    hysteresis: float = PowerLimits.hysteresis


@dataclass(frozen=True)
class Heat:
    """Degrees Celsius, see `PowerLimits`."""

    __pydantic_config__ = _CHECKED

    hot_above_c: float = PowerLimits.hot_above_c
    cool_below_c: float = PowerLimits.cool_below_c


@dataclass(frozen=True)
class Latency:
    """`canned_above_ms`: while answers of models take longer, rules or canned messages answer; None: never."""

    __pydantic_config__ = _CHECKED

    canned_above_ms: float | None = None

    def __post_init__(self) -> None:
        """Refuse a ceiling that no answer could stay under."""
        if self.canned_above_ms is not None:
            _within("canned_above_ms", self.canned_above_ms, 1, _MAX_MS)

    @property
    def limits(self) -> LatencyLimits | None:
        """What the latency gate goes by; None where there is no ceiling."""
        if self.canned_above_ms is None:
            return None
        return LatencyLimits(self.canned_above_ms, BACK_BELOW * self.canned_above_ms)


@dataclass(frozen=True)
class Edge:
    """When the edge is asked although the device may yet answer.

    `hedge`: at most this share of requests is put to the edge because the device is slower than usual. `early`: where
    device and edge one after the other would miss the deadline, both are asked at once. `least_ms`: with less time
    left the edge is not asked. `draft`: an escalated request takes the device's answer along, where that saves time.
    """

    __pydantic_config__ = _CHECKED

    hedge: float = 0.05
    early: bool = True
    least_ms: float = 10.0
    draft: bool = True

    def __post_init__(self) -> None:
        """Refuse shares and times out of range."""
        _within("hedge", self.hedge, 0, 1)
        _within("least_ms", self.least_ms, 0, _MAX_MS)


@dataclass(frozen=True)
class Save:
    """What is made smaller while power is short: `max_tokens` is the longest answer."""

    __pydantic_config__ = _CHECKED

    max_tokens: int = 64

    def __post_init__(self) -> None:
        """Refuse an answer of no length."""
        _within("max_tokens", self.max_tokens, 1, 1 << 20)


@dataclass(frozen=True)
class Stream:
    """`on_escalation`: how a stream whose tier may change is sent."""

    __pydantic_config__ = _CHECKED

    on_escalation: OnEscalation = OnEscalation.HOLD


DEADLINES_MS: Mapping[str, float] = MappingProxyType({"voice": 80.0, "control": 30.0, "kiosk": 200.0})


@dataclass(frozen=True)
class Policy:
    """The whole; every part has a default. Raises `ValueError` naming the key.

    `confidence_threshold`: from which a device answer stays local; None takes the device's calibrated one.
    `deadline_ms`: by class, as a request names it. `retry_budget`: retries allowed, as a share of requests.
    `local_only_skills`: requests of these skills never leave the device site.
    """

    __pydantic_config__ = _CHECKED

    confidence_threshold: float | None = None
    battery: Battery = Battery()
    heat: Heat = Heat()
    deadline_ms: dict[str, float] = field(default_factory=lambda: dict(DEADLINES_MS))
    latency: Latency = Latency()
    edge: Edge = Edge()
    retry_budget: float = 0.1
    local_only_skills: frozenset[str] = frozenset()
    save: Save = Save()
    stream: Stream = Stream()

    def __post_init__(self) -> None:
        """Refuse values out of range, and limits that contradict each other."""
        if self.confidence_threshold is not None:
            _within("confidence_threshold", self.confidence_threshold, 0, 1)
        for name, value in self.deadline_ms.items():
            _within(f"deadline_ms.{name}", value, 1, _MAX_MS)
        _within("retry_budget", self.retry_budget, 0, 1)
        _ = self.power_limits

    @property
    def power_limits(self) -> PowerLimits:
        """What the power watch goes by; raises `ValueError` naming the key."""
        battery, heat = self.battery, self.heat
        try:
            return PowerLimits(
                downscale_below=battery.downscale_below,
                fallback_below=battery.fallback_below,
                hysteresis=battery.hysteresis,
                hot_above_c=heat.hot_above_c,
                cool_below_c=heat.cool_below_c,
            )
        except ValueError as error:
            part = "heat" if str(error).startswith("cool_below_c") else "battery"
            raise ValueError(f"{part}.{error}") from None
