"""How much power there is to spend, as routing sees it. Pure: readings and time come in as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class PowerMode(StrEnum):
    """What the battery and the heat allow."""

    NORMAL = "normal"
    SAVE = "save"
    """Under `battery.downscale_below`, or hot: smaller work, no hedging."""
    CRITICAL = "critical"
    """Under `battery.fallback_below`: no model at all."""


@dataclass(frozen=True)
class Power:
    """The state that a decision is made in. `level` is a share, 0…1, None where nothing tells it."""

    mode: PowerMode = PowerMode.NORMAL
    level: float | None = None
    hot: bool = False
    source: str = "none"
