"""How warm the machine is, and whether its processor is held back: `/sys/class/thermal`, cpufreq, counters.

Documentation/driver-api/thermal/sysfs-api.rst: a zone's `temp` in thousandths of a degree Celsius. Throttling shows

- in cpufreq, as `scaling_max_freq` below `cpuinfo_max_freq` (Documentation/admin-guide/pm/cpufreq.rst). An operator
  caps the same way; so a cap that was there at the first look counts only after the processor was seen above it;
- on x86 in the counters under `cpu*/thermal_throttle`, which rise;
- on a Raspberry Pi in its firmware's `get_throttled`, hexadecimal: bit 1 frequency capped, 2 throttled, 3 soft limit
  (raspberrypi/linux, pull request 2397).
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from functions.dispatcher.power import sysfs
from functions.dispatcher.power.source import Clock
from routing.power import Reading

_PI_THROTTLED = 0b1110
_PI_FILE = "devices/platform/soc/soc:firmware/get_throttled"
_COUNTERS = ("core_throttle_count", "package_throttle_count")


@dataclass
class HeatSource:
    """The hottest zone, of all or of those whose `type` is in `zones`; and throttling."""

    sysfs: Path = Path("/sys")
    zones: Collection[str] = ()
    clock: Clock = time.monotonic
    name: str = "thermal"
    _caps: dict[str, float] = field(default_factory=dict, init=False)
    _counts: dict[str, float] = field(default_factory=dict, init=False)

    def read(self) -> Reading | None:
        """None where no file tells anything."""
        celsius = self._hottest()
        told = [self._is_capped(), self._was_throttled(), self._is_throttled_by_firmware()]
        known = [one for one in told if one is not None]
        if celsius is None and not known:
            return None
        return Reading(self.name, self.clock(), celsius=celsius, throttled=any(known) if known else None)

    def close(self) -> None:
        """Nothing is held open."""

    def _hottest(self) -> float | None:
        folders = sysfs.children(self.sysfs / "class" / "thermal", "thermal_zone*")
        wanted = [folder for folder in folders if not self.zones or sysfs.text(folder / "type") in self.zones]
        found = [sysfs.number(folder / "temp") for folder in wanted]
        return max((value / 1e3 for value in found if value is not None), default=None)

    def _is_capped(self) -> bool | None:
        """Whether a processor may not go as fast as it once might, or could."""
        capped = None
        for folder in sysfs.children(self.sysfs / "devices/system/cpu/cpufreq", "policy*"):
            now, most = (sysfs.number(folder / name) for name in ("scaling_max_freq", "cpuinfo_max_freq"))
            if now is None or most is None:
                continue
            usual = min(most, max(self._caps.get(folder.name, now), now))
            self._caps[folder.name] = usual
            capped = bool(capped) or now < usual
        return capped

    def _was_throttled(self) -> bool | None:
        """Whether a counter rose since the last look."""
        rose = None
        for folder in sysfs.children(self.sysfs / "devices/system/cpu", "cpu[0-9]*/thermal_throttle"):
            for name in _COUNTERS:
                now = sysfs.number(folder / name)
                if now is not None:
                    key = f"{folder.parent.name}/{name}"
                    rose = bool(rose) or now > self._counts.get(key, now)
                    self._counts[key] = now
        return rose

    def _is_throttled_by_firmware(self) -> bool | None:
        content = sysfs.text(self.sysfs / _PI_FILE)
        try:
            return bool(int(content, 16) & _PI_THROTTLED) if content else None
        except ValueError:
            return None
