"""What psutil knows of battery and temperatures: for machines without Linux's files, such as a laptop with macOS."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from functions.dispatcher.power.source import Clock
from routing.power import Reading


class Sensors(Protocol):
    """What is used of the module; some systems lack one or the other."""

    def sensors_battery(self) -> Any:
        """None, or `percent` and `power_plugged` (None: not known)."""

    def sensors_temperatures(self) -> Mapping[str, Sequence[Any]]:
        """By chip, entries with `current` in degrees Celsius."""


def load() -> Sensors:
    """The module itself."""
    return cast("Sensors", import_module("psutil"))


@dataclass
class PsutilSource:
    """psutil, imported by the first read."""

    load: Callable[[], Sensors] = load
    clock: Clock = time.monotonic
    name: str = "psutil"

    def read(self) -> Reading | None:
        """None where it finds neither a battery nor a thermometer."""
        sensors = self.load()
        battery = _asked(sensors, "sensors_battery")
        chips = _asked(sensors, "sensors_temperatures") or {}
        heat = [entry.current for chip in chips.values() for entry in chip if entry.current is not None]
        celsius = max(heat, default=None)
        if battery is None and celsius is None:
            return None
        return Reading(
            self.name,
            self.clock(),
            level=battery.percent / 100 if battery else None,
            charging=battery.power_plugged if battery else None,
            celsius=celsius,
        )

    def close(self) -> None:
        """Nothing is held open."""


def _asked(sensors: Sensors, name: str) -> Any:
    """What one of its functions says; None where this system has no such function, or the system itself fails."""
    try:
        return getattr(sensors, name)()
    except (AttributeError, NotImplementedError, OSError):
        return None
