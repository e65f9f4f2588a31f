"""A battery behind a Texas Instruments INA219 (or a relative): through the kernel's driver, or over I²C.

The driver `ina2xx` shows `in1_input` (bus voltage, mV), `curr1_input` (mA) and `power1_input` (µW) under
`/sys/class/hwmon` (Documentation/hwmon/ina2xx.rst). Without it, `InaBusSource` reads the chip's registers (INA219
data sheet, SBOS448): shunt voltage in steps of 10 µV, bus voltage in steps of 4 mV from bit 3 up. It writes none: the
chip measures all by itself after its reset, and the current follows from the shunt's resistance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from functions.dispatcher.power import sysfs
from functions.dispatcher.power.gauge import Gauge
from functions.dispatcher.power.source import Clock
from routing.power import Reading

CHIPS = frozenset({"ina219", "ina220", "ina226", "ina230", "ina231", "ina260"})
_SHUNT_VOLTAGE, _BUS_VOLTAGE = 0x01, 0x02
_SHUNT_STEP_V, _BUS_STEP_V, _BUS_SHIFT = 10e-6, 4e-3, 3
_OFF_SCALE = 32_000  # steps of shunt voltage: the chip measures up to 320 mV
_IDLE_AMPERES = 0.01  # around zero a meter's sign is noise


@dataclass
class Meter:
    """What both ways to the chip share: from volts and amperes to a reading.

    `charging_sign`: the sign of the chip's current while the battery charges; 0 where the meter is wired so that it
    cannot tell, and sees the load alone.
    """

    gauge: Gauge
    charging_sign: int = 0

    def reading(self, source: str, at_s: float, volts: float, amperes: float | None, watts: float | None) -> Reading:
        """What the battery gives is positive, what it takes is not; a load only takes, however its wires are put."""
        charging = None
        if amperes is not None:
            amperes = -amperes * self.charging_sign if self.charging_sign else abs(amperes)
            charging = amperes < -_IDLE_AMPERES if self.charging_sign else None
            watts = abs(volts * amperes) if watts is None else watts
        return Reading(
            source,
            at_s,
            level=self.gauge.level(volts, amperes, at_s),
            charging=charging,
            watts=-watts if charging and watts is not None else watts,
        )


@dataclass(frozen=True)
class InaDriverSource:
    """The chip through the kernel's driver: the first that hwmon lists."""

    meter: Meter
    sysfs: Path = Path("/sys")
    clock: Clock = time.monotonic
    name: str = "ina219"

    def read(self) -> Reading | None:
        """None without such a chip or without its voltage."""
        for folder in sysfs.children(self.sysfs / "class" / "hwmon"):
            if sysfs.text(folder / "name") in CHIPS:
                values = (sysfs.number(folder / f"{name}_input") for name in ("in1", "curr1", "power1"))
                millivolts, milliamperes, microwatts = values
                if millivolts is not None:
                    amperes = None if milliamperes is None else milliamperes / 1e3
                    watts = None if microwatts is None else microwatts / 1e6
                    return self.meter.reading(self.name, self.clock(), millivolts / 1e3, amperes, watts)
        return None

    def close(self) -> None:
        """Nothing is held open."""


class Bus(Protocol):
    """What is used of `smbus2.SMBus`."""

    def read_i2c_block_data(self, i2c_addr: int, register: int, length: int) -> Sequence[int]:
        """The bytes of a register; raises `OSError`."""

    def close(self) -> None:
        """Let go of the bus."""


def open_bus(number: int) -> Bus:
    """`/dev/i2c-<number>` through smbus2; raises `OSError`."""
    smbus2: Any = import_module("smbus2")
    return cast("Bus", smbus2.SMBus(number))


@dataclass
class InaBusSource:
    """The chip over I²C; the bus is opened by the first read, and again after it failed."""

    meter: Meter
    bus: int = 1
    address: int = 0x40
    shunt_ohms: float = 0.1
    clock: Clock = time.monotonic
    open_bus: Callable[[int], Bus] = open_bus
    name: str = "ina219-i2c"
    _bus: Bus | None = field(default=None, init=False)

    def read(self) -> Reading | None:
        """None where the chip does not answer; a current beyond its scale is not known."""
        try:
            shunt, bus = self._register(_SHUNT_VOLTAGE), self._register(_BUS_VOLTAGE)
        except OSError:
            self.close()
            return None
        signed = shunt - (1 << 16) if shunt >= 1 << 15 else shunt
        amperes = signed * _SHUNT_STEP_V / self.shunt_ohms if abs(signed) < _OFF_SCALE else None
        return self.meter.reading(self.name, self.clock(), (bus >> _BUS_SHIFT) * _BUS_STEP_V, amperes, None)

    def close(self) -> None:
        """Let go of the bus."""
        bus, self._bus = self._bus, None
        if bus is not None:
            bus.close()

    def _register(self, register: int) -> int:
        """Sixteen bits, high byte first."""
        if self._bus is None:
            self._bus = self.open_bus(self.bus)
        high, low = self._bus.read_i2c_block_data(self.address, register, 2)
        return high << 8 | low
