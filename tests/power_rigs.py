"""Stand-ins for what power sources read: a sysfs tree laid out as the kernel's ABI documents say, a bus, a broker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from functions.dispatcher.power.file import FileSource
from functions.dispatcher.power.gauge import Gauge, VoltageCurve
from functions.dispatcher.power.greengrass import GreengrassSource
from functions.dispatcher.power.heat import HeatSource
from functions.dispatcher.power.ina219 import InaBusSource, InaDriverSource, Meter
from functions.dispatcher.power.power_supply import PowerSupplySource
from functions.dispatcher.power.psutil_source import PsutilSource
from functions.dispatcher.power.source import PowerSource

CURVE = VoltageCurve(((3.0, 0.0), (4.0, 1.0)))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def write(folder: Path, **files: Any) -> Path:
    """One file a value, with the line's end that the kernel gives it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    return folder


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


class SupplyRig:
    tells = "level"

    def __init__(self, root: Path, clock: Clock) -> None:
        self.battery = root / "class" / "power_supply" / "BAT0"
        self.source: PowerSource = PowerSupplySource(root, clock)

    def say(self, value: float) -> None:
        write(self.battery, type="Battery", status="Discharging", energy_now=int(value * 5e7), energy_full=50_000_000)

    def garble(self, text: str) -> None:
        write(self.battery, type="Battery", capacity=text, energy_now=text, energy_full=text)

    def vanish(self) -> None:
        remove(self.battery)


class DriverRig:
    tells = "level"

    def __init__(self, root: Path, clock: Clock) -> None:
        self.chip = root / "class" / "hwmon" / "hwmon3"
        self.source: PowerSource = InaDriverSource(Meter(Gauge(CURVE)), root, clock)

    def say(self, value: float) -> None:
        write(self.chip, name="ina219", in1_input=round(3000 + 1000 * value), curr1_input=500, power1_input=1_800_000)

    def garble(self, text: str) -> None:
        write(self.chip, name="ina219", in1_input=text)

    def vanish(self) -> None:
        remove(self.chip)


class FakeBus:
    """An INA219 on a bus as smbus2 shows it; without registers nobody answers."""

    def __init__(self) -> None:
        self.registers: dict[int, int] = {}
        self.opened = 0
        self.closed = 0

    def open(self, number: int) -> FakeBus:
        self.opened += 1
        return self

    def read_i2c_block_data(self, i2c_addr: int, register: int, length: int) -> list[int]:
        if register not in self.registers:
            raise OSError(121, "Remote I/O error")
        return list(self.registers[register].to_bytes(length, "big"))

    def close(self) -> None:
        self.closed += 1


class BusRig:
    tells = "level"

    def __init__(self, root: Path, clock: Clock) -> None:
        self.bus = FakeBus()
        self.source: PowerSource = InaBusSource(Meter(Gauge(CURVE)), clock=clock, open_bus=self.bus.open)

    def say(self, value: float) -> None:
        volts = 3 + value
        self.bus.registers = {0x01: 5000, 0x02: round(volts / 4e-3) << 3}

    def garble(self, text: str) -> None:
        self.bus.registers = {0x01: 0xFFFF, 0x02: 0xFFFF}  # a bus whose lines float

    def vanish(self) -> None:
        self.bus.registers = {}


class PsutilRig:
    tells = "level"

    def __init__(self, root: Path, clock: Clock) -> None:
        self.battery: Any = None
        self.temperatures: dict[str, list[Any]] = {}
        sensors = SimpleNamespace(sensors_battery=lambda: self.battery, sensors_temperatures=lambda: self.temperatures)
        self.source: PowerSource = PsutilSource(lambda: sensors, clock)

    def say(self, value: float) -> None:
        self.battery = SimpleNamespace(percent=100 * value, secsleft=-1, power_plugged=False)

    def garble(self, text: str) -> None:
        self.battery = SimpleNamespace(percent=float("nan"), secsleft=-1, power_plugged=None)

    def vanish(self) -> None:
        self.battery = None


class FakeNucleus:
    """Greengrass' IPC as its client shows it: hand `connect` to a source, then `publish`."""

    def __init__(self) -> None:
        self.clients: list[FakeClient] = []
        self.up = True

    def connect(self) -> FakeClient:
        if not self.up:
            raise ConnectionRefusedError
        self.clients.append(FakeClient())
        return self.clients[-1]

    def publish(self, content: dict[str, Any] | bytes) -> None:
        message = SimpleNamespace(message=content)
        as_json = isinstance(content, dict)
        event = SimpleNamespace(json_message=message if as_json else None, binary_message=None if as_json else message)
        for client in self.clients:
            if not client.closed and client.on_event is not None:
                client.on_event(event)


class FakeClient:
    def __init__(self) -> None:
        self.topic = ""
        self.on_event: Callable[[Any], None] | None = None
        self.on_closed: Callable[[], None] = lambda: None
        self.closed = False

    def subscribe_to_topic(
        self,
        *,
        topic: str,
        on_stream_event: Callable[[Any], None],
        on_stream_error: Callable[[Exception], bool],
        on_stream_closed: Callable[[], None],
    ) -> tuple[Any, Any]:
        self.topic, self.on_event, self.on_closed = topic, on_stream_event, on_stream_closed
        return None, None

    def close(self, *, executor_wait: bool = True) -> None:
        self.closed = True
        self.on_closed()


class GreengrassRig:
    tells = "level"

    def __init__(self, root: Path, clock: Clock) -> None:
        self.nucleus = FakeNucleus()
        self.source: PowerSource = GreengrassSource("battery", connect=self.nucleus.connect, clock=clock)

    def say(self, value: float) -> None:
        self.source.read()
        self.nucleus.publish({"level": value})

    def garble(self, text: str) -> None:
        self.source.read()
        self.nucleus.publish(text.encode())
        self.nucleus.publish({"level": text})

    def vanish(self) -> None:
        self.nucleus.up = False
        for client in self.nucleus.clients:
            client.on_closed()


class FileRig:
    tells = "level"

    def __init__(self, root: Path, clock: Clock) -> None:
        self.path = root / "battery"
        self.source: PowerSource = FileSource(self.path, clock)

    def say(self, value: float) -> None:
        self.path.write_text(f"{value}\n")

    def garble(self, text: str) -> None:
        self.path.write_text(text)

    def vanish(self) -> None:
        self.path.unlink()


class HeatRig:
    tells = "celsius"

    def __init__(self, root: Path, clock: Clock) -> None:
        self.zone = root / "class" / "thermal" / "thermal_zone0"
        self.source: PowerSource = HeatSource(root, clock=clock)

    def say(self, value: float) -> None:
        write(self.zone, type="cpu-thermal", temp=round(value * 1000))

    def garble(self, text: str) -> None:
        write(self.zone, type="cpu-thermal", temp=text)

    def vanish(self) -> None:
        remove(self.zone)


RIGS = [SupplyRig, DriverRig, BusRig, PsutilRig, GreengrassRig, FileRig, HeatRig]
