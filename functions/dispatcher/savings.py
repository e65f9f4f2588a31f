"""What costs the battery least under SAVE, from the operator's figures and from how the tiers did lately."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from routing.energy import Figures, Forecast, Saving, Traffic, cheapest, options

_NEW = 0.1
"""The weight of the latest exchange."""


@dataclass(frozen=True)
class _Skill:
    """Of one skill: how often its answers were escalated, and the bytes of an exchange with the edge."""

    answered: int = 0
    escalated: int = 0
    sent_bytes: float = 0.0
    received_bytes: float = 0.0

    @property
    def p_escalate(self) -> float:
        """By Laplace's rule of succession; one half before anything is known."""
        return (self.escalated + 1) / (self.answered + 2)


class Savings:
    """One site's, over all requests. Without figures there is no choice: the device first, then the edge."""

    def __init__(self, figures: Figures, clock: Callable[[], float]) -> None:
        self._figures = figures
        self._clock = clock
        self._lock = threading.Lock()
        self._skills: dict[str, _Skill] = {}
        self._last = -math.inf  # when the edge was asked last

    def choice(self, skill: str, device_s: float | None, edge_s: float | None, remaining_s: float) -> Saving | None:
        """The cheapest way to answer in time; None where a missing figure leaves that open. Seconds as they may be."""
        known = self._skills.get(skill, _Skill())
        if not self._figures.draws or device_s is None or edge_s is None or not known.sent_bytes:
            return None
        traffic = Traffic(known.sent_bytes, known.received_bytes, self._clock() - self._last)
        forecast = Forecast(device_s=device_s, edge_s=edge_s, traffic=traffic, p_escalate=known.p_escalate)
        found = cheapest(options(forecast), remaining_s, self._figures)
        return None if found.option is None or found.undecided else found.option.saving

    def device_answered(self, skill: str) -> None:
        """The device answered a request first."""
        with self._lock:
            known = self._skills.get(skill, _Skill())
            self._skills[skill] = replace(known, answered=known.answered + 1)

    def edge_answered(self, skill: str, sent_bytes: int, received_bytes: int, *, escalated: bool) -> None:
        """The edge answered, after the device if `escalated`."""
        with self._lock:
            self._last = self._clock()
            known = self._skills.get(skill, _Skill())
            self._skills[skill] = replace(
                known,
                escalated=known.escalated + escalated,
                sent_bytes=_mean(known.sent_bytes, sent_bytes),
                received_bytes=_mean(known.received_bytes, received_bytes),
            )


def _mean(known: float, new: int) -> float:
    return known + _NEW * (new - known) if known else float(new)
