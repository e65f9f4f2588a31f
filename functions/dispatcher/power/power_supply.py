"""Batteries and mains as the kernel lists them: `/sys/class/power_supply`.

Documentation/ABI/testing/sysfs-class-power: `capacity` in percent; `energy_*` in µWh, `charge_*` in µAh, `power_now`
in µW, `current_now` in µA, `voltage_now` in µV, `temp` in tenths of a degree; `scope` "Device" is the battery of a
mouse or a headset, and not of this machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from functions.dispatcher.power import sysfs
from functions.dispatcher.power.source import Clock
from routing.power import Reading

_BATTERIES = frozenset({"Battery", "UPS"})
_PLUGS = frozenset({"Mains", "USB", "Wireless"})
_STATUS = {"Charging": True, "Full": True, "Not charging": True, "Discharging": False}


@dataclass(frozen=True)
class PowerSupplySource:
    """All batteries of the machine as one, weighted by what they hold, and whether power comes from outside."""

    sysfs: Path = Path("/sys")
    clock: Clock = time.monotonic
    name: str = "power_supply"

    def read(self) -> Reading | None:
        """None on a machine without battery."""
        supplies = sysfs.children(self.sysfs / "class" / "power_supply")
        batteries = [found for found in map(_battery, supplies) if found is not None]
        if not batteries:
            return None
        watts = [battery.watts for battery in batteries if battery.watts is not None]
        heat = [battery.celsius for battery in batteries if battery.celsius is not None]
        return Reading(
            self.name,
            self.clock(),
            level=_together(batteries),
            charging=_from_outside(batteries, supplies),
            watts=sum(watts) if watts else None,
            celsius=max(heat, default=None),
        )

    def close(self) -> None:
        """Nothing is held open."""


@dataclass(frozen=True)
class _Battery:
    """`full` is in the unit that its files are in (µWh or µAh), None if they do not say."""

    level: float | None
    unit: str
    full: float | None
    charging: bool | None
    watts: float | None
    celsius: float | None


def _battery(folder: Path) -> _Battery | None:
    """A battery that is in the machine, or None."""
    if sysfs.text(folder / "type") not in _BATTERIES or sysfs.text(folder / "scope") == "Device":
        return None
    if sysfs.text(folder / "present") == "0":
        return None
    level, unit, full = _level(folder)
    charging = _STATUS.get(sysfs.text(folder / "status") or "")
    tenths = sysfs.number(folder / "temp")
    return _Battery(level, unit, full, charging, _watts(folder, charging), None if tenths is None else tenths / 10)


def _level(folder: Path) -> tuple[float | None, str, float | None]:
    """Now over full, finer than whole percents; else the driver's own percents."""
    for unit in ("energy", "charge"):
        now, full = (sysfs.number(folder / f"{unit}_{part}") for part in ("now", "full"))
        if now is not None and full is not None and full > 0 and now >= 0:
            # A new battery may hold a little more than its gauge has learned yet.
            return min(1.0, now / full), unit, full
    percent = sysfs.number(folder / "capacity")
    known = percent is not None and 0 <= percent <= 100  # noqa: PLR2004  # percents
    return (percent / 100 if known and percent is not None else None), "", None


def _watts(folder: Path, charging: bool | None) -> float | None:
    """Drawn from the battery, below 0 while it charges; drivers disagree on the sign, so the status decides."""
    microwatts = sysfs.number(folder / "power_now")
    if microwatts is None:
        current, voltage = (sysfs.number(folder / f"{name}_now") for name in ("current", "voltage"))
        microwatts = None if current is None or voltage is None else current * voltage / 1e6
    if microwatts is None:
        return None
    return (-1 if charging else 1) * abs(microwatts) / 1e6


def _together(batteries: list[_Battery]) -> float | None:
    """One level for all: weighted where all say in one unit what they hold, else their mean."""
    told = [(battery.level, battery.full, battery.unit) for battery in batteries if battery.level is not None]
    if not told:
        return None
    weighted = len({unit for *_, unit in told}) == 1 and all(full for _, full, _ in told)
    weights = [full if weighted and full else 1.0 for _, full, _ in told]
    return sum(level * weight for (level, *_), weight in zip(told, weights, strict=True)) / sum(weights)


def _from_outside(batteries: list[_Battery], supplies: list[Path]) -> bool | None:
    """Whether power comes from outside. A battery that discharges with a plug in has a charger that is too weak."""
    told = [battery.charging for battery in batteries if battery.charging is not None]
    if told:
        return all(told)
    online = [sysfs.number(folder / "online") for folder in supplies if sysfs.text(folder / "type") in _PLUGS]
    known = [value for value in online if value is not None]
    return any(known) if known else None
