"""Where power is read from, out of the environment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from functions.dispatcher.power import figures
from functions.dispatcher.power.file import FileSource
from functions.dispatcher.power.gauge import CoulombCount, Gauge, VoltageCurve
from functions.dispatcher.power.greengrass import GreengrassSource
from functions.dispatcher.power.heat import HeatSource
from functions.dispatcher.power.ina219 import InaBusSource, InaDriverSource, Meter
from functions.dispatcher.power.power_supply import PowerSupplySource
from functions.dispatcher.power.psutil_source import PsutilSource
from functions.dispatcher.power.source import Clock, PowerSource
from functions.dispatcher.power.watch import PowerWatch
from functions.serving.settings import ConfigError, Environment
from routing.energy import Figures
from routing.power import PowerLimits

SOURCES = ("power_supply", "ina219", "ina219-i2c", "psutil", "greengrass", "file", "thermal")
_NONE = "none"
# What a source imports once it is asked for: the module, and the extra that brings it.
_MODULES = {"psutil": ("psutil", "power"), "ina219-i2c": ("smbus2", "power"), "greengrass": ("awsiot", "greengrass")}
_SIGNS = {"unknown": 0, "positive": 1, "negative": -1}


@dataclass(frozen=True)
class MeterConfig:
    """How a battery hangs on an INA219. `curve` and `capacity_mah` say how its level is told; without: not at all."""

    curve: VoltageCurve | None = None
    capacity_mah: float | None = None
    start_level: float | None = None
    charging_sign: int = 0
    bus: int = 1
    address: int = 0x40
    shunt_ohms: float = 0.1

    @classmethod
    def read(cls, environment: Environment) -> Self:
        """Read the settings; raises `ConfigError` naming the key."""
        config = cls(
            curve=_curve(environment, "POWER_INA219_CURVE"),
            capacity_mah=_number(environment, "POWER_INA219_CAPACITY_MAH", 1, 1e7),
            start_level=_number(environment, "POWER_INA219_START_LEVEL", 0, 1),
            charging_sign=_SIGNS[_word(environment, "POWER_INA219_CHARGING_CURRENT", "unknown", _SIGNS)],
            bus=environment.integer("POWER_INA219_BUS", cls.bus, 0, 255),
            address=_address(environment, "POWER_INA219_ADDRESS", cls.address),
            shunt_ohms=environment.number("POWER_INA219_SHUNT_OHMS", cls.shunt_ohms, 1e-4, 100),
        )
        if config.capacity_mah is not None and config.curve is None and config.start_level is None:
            raise ConfigError(
                "POWER_INA219_CAPACITY_MAH counts from a level; set POWER_INA219_CURVE or POWER_INA219_START_LEVEL too"
            )
        return config

    def meter(self, gap_s: float) -> Meter:
        """A meter of its own, with its own count, which is lost over a gap of `gap_s`."""
        count = CoulombCount(self.capacity_mah / 1e3, gap_s) if self.capacity_mah else None
        return Meter(Gauge(self.curve, count, self.start_level), self.charging_sign)


@dataclass(frozen=True)
class PowerConfig:
    """Which sources are asked, how often, and what they need. No sources: power is taken to be there."""

    sources: tuple[str, ...] = ()
    interval_s: float = 1.0
    sysfs: Path = Path("/sys")
    zones: tuple[str, ...] = ()
    file: Path | None = None
    topic: str = ""
    meter: MeterConfig = MeterConfig()
    figures: Figures = field(default_factory=Figures)

    @classmethod
    def from_environment(cls, values: Mapping[str, str]) -> Self:
        """Read `values`; raises `ConfigError` naming the key."""
        environment = Environment(values)
        environment.check_names()
        sources = _sources(environment)
        file, energy = environment.text("POWER_FILE", ""), environment.text("POWER_ENERGY_FILE", "")
        topic = environment.text("POWER_TOPIC", "")
        for source, key, value in (("file", "POWER_FILE", file), ("greengrass", "POWER_TOPIC", topic)):
            if source in sources and not value:
                raise ConfigError(f"{key} is not set; the power source '{source}' needs it")
        zones = environment.text("POWER_THERMAL_ZONES", "")
        return cls(
            sources=sources,
            interval_s=environment.number("POWER_INTERVAL_MS", cls.interval_s * 1e3, 50, 600_000) / 1e3,
            sysfs=Path(environment.text("POWER_SYSFS", "/sys")),
            zones=tuple(zone.strip() for zone in zones.split(",") if zone.strip()),
            file=Path(file) if file else None,
            topic=topic,
            meter=MeterConfig.read(environment),
            figures=figures.load(Path(energy), "POWER_ENERGY_FILE") if energy else Figures(),
        )

    def open(self, wake: threading.Event, clock: Clock = time.monotonic) -> list[PowerSource]:
        """Make the sources; they do nothing yet. `wake` is set when one of them hears something by itself."""
        gap_s = max(60.0, 3 * self.interval_s)
        makers: dict[str, Callable[[], PowerSource]] = {
            "power_supply": lambda: PowerSupplySource(self.sysfs, clock),
            "ina219": lambda: InaDriverSource(self.meter.meter(gap_s), self.sysfs, clock),
            "ina219-i2c": lambda: InaBusSource(
                self.meter.meter(gap_s), self.meter.bus, self.meter.address, self.meter.shunt_ohms, clock
            ),
            "psutil": lambda: PsutilSource(clock=clock),
            "greengrass": lambda: GreengrassSource(self.topic, heard=wake.set, clock=clock),
            "file": lambda: FileSource(self.file or Path(), clock),
            "thermal": lambda: HeatSource(self.sysfs, self.zones, clock),
        }
        return [makers[name]() for name in self.sources]

    def watch(self, limits: Callable[[], PowerLimits]) -> PowerWatch:
        """A watch over these sources, not yet started; `limits` gives the policy's limits as they are then."""
        wake = threading.Event()
        return PowerWatch(self.open(wake), limits, self.interval_s, wake=wake)


def _sources(environment: Environment) -> tuple[str, ...]:
    names = environment.choices("POWER_SOURCES", (_NONE,), (*SOURCES, _NONE))
    if names == (_NONE,):
        return ()
    if _NONE in names or len(set(names)) < len(names):
        raise ConfigError(f"POWER_SOURCES is '{','.join(names)}'; name each source once, or none alone")
    for name in names:
        module, extra = _MODULES.get(name, ("", ""))
        if module and find_spec(module) is None:
            raise ConfigError(f"POWER_SOURCES names '{name}', which needs {module}: pip install 'edgecascade[{extra}]'")
    return names


def _number(environment: Environment, key: str, low: float, high: float) -> float | None:
    """A number, or None where there is none."""
    return environment.number(key, low, low, high) if environment.text(key, "") else None


def _word(environment: Environment, key: str, default: str, known: Mapping[str, int]) -> str:
    word = environment.text(key, default)
    if word not in known:
        raise ConfigError(f"{key} is '{word}'; known are {', '.join(known)}")
    return word


def _address(environment: Environment, key: str, default: int) -> int:
    """An I²C address of an INA219: 0x40 to 0x4f."""
    text = environment.text(key, hex(default))
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0x40 <= value <= 0x4F:  # noqa: PLR2004
        raise ConfigError(f"{key} is '{text}'; it must be an address from 0x40 to 0x4f")
    return value


def _curve(environment: Environment, key: str) -> VoltageCurve | None:
    """`3.3:0, 3.7:0.5, 4.1:1`: volts and level."""
    text = environment.text(key, "")
    if not text:
        return None
    try:
        pairs = [tuple(float(part) for part in pair.split(":")) for pair in text.split(",")]
        return VoltageCurve(tuple((volts, level) for volts, level in pairs))
    except ValueError as error:
        reason = str(error) if str(error).startswith("needs") else "needs pairs like 3.3:0, 3.7:0.5, 4.1:1"
        raise ConfigError(f"{key} is '{text}'; it {reason} (volts:level)") from None
