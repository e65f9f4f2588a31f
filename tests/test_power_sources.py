"""The sources of power readings: one contract for all, and what each reads out of its own medium."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.dispatcher.power import message
from functions.dispatcher.power.gauge import CoulombCount, Gauge, VoltageCurve
from functions.dispatcher.power.greengrass import GreengrassSource
from functions.dispatcher.power.heat import HeatSource
from functions.dispatcher.power.ina219 import InaBusSource, InaDriverSource, Meter, open_bus
from functions.dispatcher.power.power_supply import PowerSupplySource
from functions.dispatcher.power.psutil_source import PsutilSource
from routing.power import Power, PowerLimits, Reading, next_power
from tests.power_rigs import CURVE, RIGS, BusRig, Clock, DriverRig, FakeClient, GreengrassRig, PsutilRig, write

GARBAGE = ["", "   ", "banana", "nan", "-7", "1e999", "{", '{"level": "full"}', '{"levle": 0.5}', "null", "[]", "\x00"]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=RIGS, ids=lambda rig: rig.__name__)
def rig(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Any:
    return request.param(tmp_path, clock)


def told(rig: Any) -> float | None:
    reading = rig.source.read()
    return None if reading is None else getattr(reading, rig.tells)


# --- the contract ---


def test_where_nothing_is_nothing_is_told(rig: Any) -> None:
    assert rig.source.read() is None


def test_a_reading_has_the_sources_name_and_the_clocks_time(rig: Any, clock: Clock) -> None:
    clock.now = 1234.5
    rig.say(0.5)
    reading = rig.source.read()
    assert (reading.source, reading.taken_at_s) == (rig.source.name, 1234.5)
    assert getattr(reading, rig.tells) == pytest.approx(0.5, abs=0.005)


def test_each_read_looks_anew(rig: Any) -> None:
    for value in (0.9, 0.2, 0.6):
        rig.say(value)
        assert told(rig) == pytest.approx(value, abs=0.005)


@pytest.mark.parametrize("text", GARBAGE)
def test_what_makes_no_sense_is_not_believed(rig: Any, clock: Clock, text: str) -> None:
    rig.garble(text)
    reading = rig.source.read()
    power = next_power(PowerLimits(), Power(), [reading] if reading else [], clock.now)
    assert (power.level, power.hot) == (None, False)


def test_what_vanishes_is_not_told_as_new(rig: Any, clock: Clock) -> None:
    rig.say(0.5)
    rig.source.read()
    rig.vanish()
    clock.now += 100
    reading = rig.source.read()
    assert reading is None or reading.taken_at_s <= 1000


def test_what_comes_back_is_told_again(rig: Any, clock: Clock) -> None:
    rig.say(0.5)
    rig.source.read()
    rig.vanish()
    rig.source.read()
    if isinstance(rig, GreengrassRig):
        rig.nucleus.up = True
    clock.now += 100
    rig.say(0.4)
    assert told(rig) == pytest.approx(0.4, abs=0.005)


def test_closing_twice_is_fine(rig: Any) -> None:
    rig.say(0.5)
    rig.source.read()
    rig.source.close()
    rig.source.close()


# --- power_supply ---


def supply(root: Path, name: str, **files: Any) -> None:
    write(root / "class" / "power_supply" / name, **files)


def read_supply(root: Path) -> Reading | None:
    return PowerSupplySource(root, Clock()).read()


def test_energy_is_finer_than_percents_and_charge_comes_second(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity=41, charge_now=417_000, charge_full=1_000_000)
    reading = read_supply(tmp_path)
    assert reading is not None
    assert reading.level == pytest.approx(0.417)
    supply(tmp_path, "BAT0", energy_now=12_340_000, energy_full=40_000_000)
    reading = read_supply(tmp_path)
    assert reading is not None
    assert reading.level == pytest.approx(0.3085)


def test_percents_where_the_driver_has_no_more(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", scope="System", capacity=7)
    reading = read_supply(tmp_path)
    assert reading is not None
    assert (reading.level, reading.charging, reading.watts) == (0.07, None, None)


@pytest.mark.parametrize(
    "files",
    [
        {"type": "Battery", "scope": "Device", "capacity": 3},
        {"type": "Battery", "present": 0, "capacity": 3},
        {"type": "Mains", "online": 1},
        {"type": "USB", "online": 0, "capacity": 3},
        {"capacity": 3},
    ],
)
def test_what_does_not_feed_this_machine_is_left_out(tmp_path: Path, files: dict[str, Any]) -> None:
    supply(tmp_path, "hidpp_battery_0", **files)
    assert read_supply(tmp_path) is None


def test_two_batteries_are_one_by_what_they_hold(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", energy_now=0, energy_full=10_000_000, status="Not charging")
    supply(tmp_path, "BAT1", type="Battery", energy_now=30_000_000, energy_full=30_000_000, status="Discharging")
    reading = read_supply(tmp_path)
    assert reading is not None
    assert (reading.level, reading.charging) == (pytest.approx(0.75), False)
    supply(tmp_path, "BAT1", type="Battery", energy_now="", capacity=60)
    reading = read_supply(tmp_path)
    assert reading is not None
    assert reading.level == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("status", "charging"),
    [("Charging", True), ("Full", True), ("Not charging", True), ("Discharging", False), ("Unknown", None)],
)
def test_status(tmp_path: Path, status: str, charging: bool | None) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity=50, status=status, power_now=4_500_000)
    reading = read_supply(tmp_path)
    assert reading is not None
    assert reading.charging is charging
    assert reading.watts == (-4.5 if charging else 4.5)


def test_a_plug_tells_where_the_battery_does_not_but_not_against_it(tmp_path: Path) -> None:
    supply(tmp_path, "AC", type="Mains", online=1)
    supply(tmp_path, "BAT0", type="Battery", capacity=50, status="Unknown")
    reading = read_supply(tmp_path)
    assert reading is not None
    assert reading.charging is True
    supply(tmp_path, "BAT0", status="Discharging")
    reading = read_supply(tmp_path)
    assert reading is not None
    assert reading.charging is False


def test_current_and_voltage_make_watts_and_the_sign_is_the_status(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity=50, status="Discharging", temp=312)
    supply(tmp_path, "BAT0", current_now=-1_500_000, voltage_now=8_000_000)
    reading = read_supply(tmp_path)
    assert reading is not None
    assert (reading.watts, reading.celsius) == (pytest.approx(12.0), 31.2)


def test_a_gauge_that_learns_may_say_more_than_full(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", energy_now=50_500_000, energy_full=50_000_000)
    reading = read_supply(tmp_path)
    assert reading is not None
    assert reading.level == 1.0


def test_a_full_that_is_nothing_falls_back_to_percents(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", energy_now=5, energy_full=0, capacity=33)
    reading = read_supply(tmp_path)
    assert reading is not None
    assert reading.level == 0.33


# --- the INA219, both ways, and its gauge ---


def driver(root: Path, meter: Meter, **files: Any) -> Reading | None:
    write(root / "class" / "hwmon" / "hwmon1", name="cpu_thermal", temp1_input=45000)
    write(root / "class" / "hwmon" / "hwmon2", name="ina219", **files)
    return InaDriverSource(meter, root, Clock()).read()


def test_the_driver_tells_watts_and_the_curve_the_level(tmp_path: Path) -> None:
    reading = driver(tmp_path, Meter(Gauge(CURVE)), in1_input=3700, curr1_input=512, power1_input=1_894_000)
    assert reading is not None
    assert (reading.level, reading.watts, reading.charging) == (pytest.approx(0.7), 1.894, None)


def test_without_curve_and_capacity_there_are_watts_but_no_level(tmp_path: Path) -> None:
    reading = driver(tmp_path, Meter(Gauge()), in1_input=3700, curr1_input=500)
    assert reading is not None
    assert (reading.level, reading.watts) == (None, pytest.approx(1.85))


@pytest.mark.parametrize(
    ("sign", "milliamperes", "charging", "watts"),
    [
        (1, 500, True, -1.85),
        (1, -500, False, 1.85),
        (-1, -500, True, -1.85),
        (-1, 500, False, 1.85),
        (1, 4, False, 0.0148),
    ],
)
def test_the_sign_of_the_current_tells_of_charging(
    tmp_path: Path, sign: int, milliamperes: int, charging: bool, watts: float
) -> None:
    reading = driver(tmp_path, Meter(Gauge(CURVE), sign), in1_input=3700, curr1_input=milliamperes)
    assert reading is not None
    assert (reading.charging, reading.watts) == (charging, pytest.approx(watts))


def test_a_load_takes_however_its_wires_are_put(tmp_path: Path) -> None:
    """One ampere for six minutes out of 2 Ah is 5 %, and nothing comes back."""
    meter = Meter(Gauge(CURVE, CoulombCount(2.0, gap_s=400)))
    levels = [meter.reading("a", at_s, 3.8, -1.0, None).level for at_s in (0.0, 360.0)]
    assert levels == [pytest.approx(0.8), pytest.approx(0.75)]


def test_the_driver_and_the_bus_agree(tmp_path: Path, clock: Clock) -> None:
    """The same battery at 3.7 V and 0.5 A over 0.1 Ω: 50 mV are 5000 steps; 3.7 V are 925 steps of 4 mV."""
    over_bus = BusRig(tmp_path, clock)
    over_bus.bus.registers = {0x01: 5000, 0x02: 925 << 3 | 0x2}
    a, b = over_bus.source.read(), driver(tmp_path, Meter(Gauge(CURVE)), in1_input=3700, curr1_input=500)
    assert a is not None
    assert b is not None
    assert (a.level, a.watts) == (pytest.approx(b.level), pytest.approx(b.watts))


def test_a_current_below_zero_is_read_as_such(clock: Clock, tmp_path: Path) -> None:
    over_bus = BusRig(tmp_path, clock)
    over_bus.bus.registers = {0x01: (1 << 16) - 5000, 0x02: 925 << 3}
    source = InaBusSource(Meter(Gauge(CURVE), -1), clock=clock, open_bus=over_bus.bus.open)
    reading = source.read()
    assert reading is not None
    assert (reading.charging, reading.watts) == (True, pytest.approx(-1.85))


@pytest.mark.parametrize("steps", [32_000, (1 << 16) - 32_000])
def test_a_current_beyond_the_scale_is_not_known(clock: Clock, tmp_path: Path, steps: int) -> None:
    rig = BusRig(tmp_path, clock)
    rig.bus.registers = {0x01: steps, 0x02: 925 << 3}
    reading = rig.source.read()
    assert reading is not None
    assert (reading.level, reading.watts) == (pytest.approx(0.7), None)


def test_the_bus_is_opened_by_the_first_read_and_again_after_a_failure(clock: Clock, tmp_path: Path) -> None:
    rig = BusRig(tmp_path, clock)
    assert rig.bus.opened == 0
    rig.say(0.5)
    rig.source.read()
    rig.source.read()
    assert (rig.bus.opened, rig.bus.closed) == (1, 0)
    rig.vanish()
    assert rig.source.read() is None
    rig.say(0.5)
    assert rig.source.read() is not None
    assert (rig.bus.opened, rig.bus.closed) == (2, 1)


def test_the_bus_is_smbus2s() -> None:
    """What we call is there under those names; on a machine without a bus it says so as the source expects."""
    smbus2 = pytest.importorskip("smbus2", reason="smbus2 is not installed (extra power)")
    assert list(inspect.signature(smbus2.SMBus.read_i2c_block_data).parameters)[1:4] == [
        "i2c_addr",
        "register",
        "length",
    ]
    with pytest.raises(OSError, match="i2c-250"):
        open_bus(250)


def test_charge_is_counted_from_where_the_curve_begins() -> None:
    """2 Ah, one ampere for six minutes: 0.1 Ah or 5 %; the sagging voltage changes nothing any more."""
    gauge = Gauge(CURVE, CoulombCount(2.0, gap_s=400))
    assert gauge.level(3.8, 1.0, 0.0) == pytest.approx(0.8)
    assert gauge.level(3.1, 1.0, 360.0) == pytest.approx(0.75)
    assert gauge.level(3.1, -1.0, 360.0) == pytest.approx(0.75)
    assert gauge.level(3.1, -1.0, 720.0) == pytest.approx(0.8)


def test_after_a_gap_the_count_begins_again() -> None:
    gauge = Gauge(CURVE, CoulombCount(2.0, gap_s=60))
    gauge.level(3.8, 1.0, 0.0)
    assert gauge.level(3.6, 1.0, 61.0) == pytest.approx(0.6)


def test_a_start_level_holds_once() -> None:
    gauge = Gauge(None, CoulombCount(1.0, gap_s=60), start_level=0.9)
    assert gauge.level(3.8, 0.0, 0.0) == 0.9
    assert gauge.level(3.8, 0.0, 30.0) == 0.9
    assert gauge.level(3.8, 0.0, 300.0) is None
    assert gauge.level(3.8, 0.0, 310.0) is None


def test_a_count_stays_a_share() -> None:
    gauge = Gauge(None, CoulombCount(0.001), start_level=0.5)
    gauge.level(3.8, 100.0, 0.0)
    assert gauge.level(3.8, 100.0, 30.0) == 0.0
    assert gauge.level(3.8, -1000.0, 60.0) == 1.0


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((3.0, 0.5),),
        ((4.0, 0.0), (3.0, 1.0)),
        ((3.0, 0.0), (3.0, 1.0)),
        ((3.0, 1.0), (4.0, 0.0)),
        ((3.0, 0.0), (4.0, 1.5)),
        ((math.nan, 0.0), (4.0, 1.0)),
        ((3.0, math.nan), (4.0, 1.0)),
        ((0.0, 0.0), (4.0, 1.0)),
    ],
)
def test_what_is_no_curve_is_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="needs"):
        VoltageCurve(points)


def test_outside_of_the_curve_its_ends_hold_until_there_is_no_battery() -> None:
    assert [CURVE.level(volts) for volts in (1.6, 2.9, 4.3, 7.9)] == [0.0, 0.0, 1.0, 1.0]
    assert [CURVE.level(volts) for volts in (-3.7, 0.0, 1.4, 8.1, math.nan)] == [None] * 5


@given(st.floats(1.5, 8.4), st.floats(1.5, 8.4))
def test_a_curve_never_falls(one: float, other: float) -> None:
    curve = VoltageCurve(((3.0, 0.05), (3.5, 0.2), (3.6, 0.7), (4.2, 1.0)))
    low, high = sorted((one, other))
    levels = [curve.level(low), curve.level(high)]
    assert None not in levels
    assert 0.05 <= levels[0] <= levels[1] <= 1


# --- psutil ---


def test_psutil_tells_the_plug_and_the_hottest_place(tmp_path: Path, clock: Clock) -> None:
    rig = PsutilRig(tmp_path, clock)
    rig.battery = SimpleNamespace(percent=55.0, secsleft=-2, power_plugged=True)
    rig.temperatures = {
        "coretemp": [SimpleNamespace(current=51.0), SimpleNamespace(current=63.0)],
        "nvme": [SimpleNamespace(current=None)],
    }
    reading = rig.source.read()
    assert reading is not None
    assert (reading.level, reading.charging, reading.celsius) == (0.55, True, 63.0)


def test_psutil_without_a_function_for_this_system(clock: Clock) -> None:
    """On macOS there is no `sensors_temperatures`, and some containers no /sys."""

    def fails() -> None:
        raise FileNotFoundError("/sys/class/power_supply")

    assert PsutilSource(lambda: SimpleNamespace(sensors_battery=fails), clock).read() is None


def test_psutil_itself_can_be_asked(clock: Clock) -> None:
    pytest.importorskip("psutil", reason="psutil is not installed (extra power)")
    reading = PsutilSource(clock=clock).read()
    assert reading is None or reading.source == "psutil"


# --- Greengrass ---


def test_the_first_read_subscribes_and_messages_are_heard(tmp_path: Path, clock: Clock) -> None:
    heard: list[float] = []
    rig = GreengrassRig(tmp_path, clock)
    source = GreengrassSource(
        "edgecascade/battery", lambda: heard.append(clock.now), connect=rig.nucleus.connect, clock=clock
    )
    assert not rig.nucleus.clients
    assert source.read() is None
    (client,) = rig.nucleus.clients
    assert client.topic == "edgecascade/battery"
    rig.nucleus.publish(b"0.31")
    rig.nucleus.publish(b"no number")
    assert heard == [1000.0]
    rig.nucleus.publish({"level": 0.3, "charging": True, "celsius": 44})
    clock.now += 5
    assert source.read() == Reading("greengrass", 1000.0, 0.3, charging=True, celsius=44.0)


def test_a_nucleus_that_is_away_is_asked_again_but_not_at_once(tmp_path: Path, clock: Clock) -> None:
    rig = GreengrassRig(tmp_path, clock)
    rig.nucleus.up = False
    assert rig.source.read() is None
    rig.nucleus.up = True
    rig.source.read()
    assert not rig.nucleus.clients
    clock.now += 30
    rig.source.read()
    assert len(rig.nucleus.clients) == 1


def test_a_late_word_of_an_old_connection_does_not_end_the_new_one(tmp_path: Path, clock: Clock) -> None:
    rig = GreengrassRig(tmp_path, clock)
    rig.source.read()
    rig.nucleus.clients[0].on_closed()
    clock.now += 30
    rig.source.read()
    rig.nucleus.clients[0].on_closed()
    rig.source.read()
    assert [client.closed for client in rig.nucleus.clients] == [True, False]


def test_the_fake_nucleus_is_like_the_library() -> None:
    client = pytest.importorskip("awsiot.greengrasscoreipc.clientv2", reason="awsiotsdk is not installed")
    model = pytest.importorskip("awsiot.greengrasscoreipc.model")
    for name in ("subscribe_to_topic", "close"):
        real = inspect.signature(getattr(client.GreengrassCoreIPCClientV2, name)).parameters
        assert set(inspect.signature(getattr(FakeClient, name)).parameters) <= set(real)
    source = GreengrassSource("t", connect=FakeClient, clock=Clock())
    event = model.SubscriptionResponseMessage
    source._event(event(binary_message=model.BinaryMessage(message=b'{"level": 0.25}')))
    assert source._last == Reading("greengrass", 1000.0, 0.25)
    source._event(event(json_message=model.JsonMessage(message={"level": 0.5})))
    assert source._last == Reading("greengrass", 1000.0, 0.5)


def test_without_a_nucleus_the_library_fails_and_the_source_does_not(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("awsiot", reason="awsiotsdk is not installed (extra greengrass)")
    for key in ("AWS_GG_NUCLEUS_DOMAIN_SOCKET_FILEPATH_FOR_COMPONENT", "SVCUID"):
        monkeypatch.delenv(key, raising=False)
    assert GreengrassSource("t", clock=clock).read() is None


# --- a file, and the words it shares with a topic ---


@pytest.mark.parametrize("text", ["0.42", " 0.42\n", '{"level": 0.42}', "4.2e-1"])
def test_a_level_alone_or_as_an_object(text: str) -> None:
    assert message.parse(text, "file", 1.0) == Reading("file", 1.0, 0.42)


def test_all_fields_of_a_message() -> None:
    text = '{"level": 1, "charging": true, "watts": -5.5, "celsius": 71, "throttled": false}'
    assert message.parse(text, "file", 1.0) == Reading(
        "file", 1.0, 1.0, charging=True, watts=-5.5, celsius=71.0, throttled=False
    )


@pytest.mark.parametrize(
    "text", [*GARBAGE, "42", "42%", "0.4 0.5", '0.4, "charging": true', "{}", '{"charging": 1}', "0" * 5000, "inf"]
)
def test_no_message(text: str) -> None:
    assert message.parse(text, "file", 1.0) is None


@given(st.binary(max_size=200))
def test_no_bytes_break_it(content: bytes) -> None:
    reading = message.parse(content, "file", 1.0)
    assert reading is None or reading.source == "file"


# --- heat and throttling ---


def cpufreq(root: Path, policy: int, now: int, most: int = 2_400_000) -> None:
    write(root / f"devices/system/cpu/cpufreq/policy{policy}", scaling_max_freq=now, cpuinfo_max_freq=most)


def test_the_hottest_zone_counts_or_the_hottest_of_those_named(tmp_path: Path) -> None:
    for number, (kind, temp) in enumerate([("cpu-thermal", 61_000), ("gpu-thermal", 55_500), ("iwlwifi_1", 99_000)]):
        write(tmp_path / f"class/thermal/thermal_zone{number}", type=kind, temp=temp)
    write(tmp_path / "class/thermal/cooling_device0", type="Processor", cur_state=0)
    reading = HeatSource(tmp_path).read()
    assert reading is not None
    assert reading.celsius == 99.0
    reading = HeatSource(tmp_path, ("cpu-thermal", "gpu-thermal")).read()
    assert reading is not None
    assert (reading.celsius, reading.throttled) == (61.0, None)


def test_a_cap_on_the_frequency_is_throttling(tmp_path: Path) -> None:
    source = HeatSource(tmp_path)
    seen = []
    for caps in ((2_400_000, 2_400_000), (2_400_000, 1_800_000), (2_400_000, 2_400_000)):
        for policy, cap in enumerate(caps):
            cpufreq(tmp_path, policy, cap)
        reading = source.read()
        seen.append(reading.throttled if reading else None)
    assert seen == [False, True, False]


def test_an_operators_cap_is_not_until_it_was_lifted(tmp_path: Path) -> None:
    source = HeatSource(tmp_path)
    seen = []
    for cap in (1_200_000, 1_200_000, 1_000_000, 2_400_000, 1_200_000):
        cpufreq(tmp_path, 0, cap)
        reading = source.read()
        seen.append(reading.throttled if reading else None)
    assert seen == [False, False, True, False, True]


def test_a_counter_that_rises_is_throttling(tmp_path: Path) -> None:
    source = HeatSource(tmp_path)
    seen = []
    for count in (7, 7, 9, 9):
        write(
            tmp_path / "devices/system/cpu/cpu0/thermal_throttle", core_throttle_count=0, package_throttle_count=count
        )
        reading = source.read()
        seen.append(reading.throttled if reading else None)
    assert seen == [False, False, True, False]


@pytest.mark.parametrize(
    ("bits", "throttled"), [("0", False), ("50005", True), ("50000", False), ("1", False), ("8", True), ("xyz", None)]
)
def test_a_raspberry_pis_firmware_tells_what_cpufreq_does_not(
    tmp_path: Path, bits: str, throttled: bool | None
) -> None:
    """Bit 0 is the supply's voltage, not heat; bits from 16 on are of the past."""
    write(tmp_path / "devices/platform/soc/soc:firmware", get_throttled=bits)
    reading = HeatSource(tmp_path).read()
    assert (reading.throttled if reading else None) is throttled


def test_this_machine_can_be_read_whatever_it_has() -> None:
    for source in (PowerSupplySource(), HeatSource(), InaDriverSource(Meter(Gauge(CURVE)))):
        assert source.read() is None or source.name


def test_a_chip_of_another_kind_is_none(tmp_path: Path, clock: Clock) -> None:
    rig = DriverRig(tmp_path, clock)
    rig.say(0.5)
    write(rig.chip, name="ina3221")
    assert rig.source.read() is None
