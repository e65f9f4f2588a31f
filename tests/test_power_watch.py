"""The watch over the sources, and its settings and gauges."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from functions.dispatcher.power import PowerConfig, PowerWatch, figures, message, series
from functions.dispatcher.power.config import SOURCES
from functions.dispatcher.power.file import FileSource
from functions.dispatcher.power.gauge import VoltageCurve
from functions.serving.metrics import Metrics
from functions.serving.settings import POWER_KEYS, ConfigError
from routing.energy import (
    DEVICE,
    EDGE,
    IDLE,
    RADIO,
    Cost,
    Draw,
    Figures,
    Forecast,
    Radio,
    Saving,
    Traffic,
    cheapest,
    options,
)
from routing.power import REQUEST, Power, PowerLimits, PowerMode, Reading
from tests.fakes import wait_until
from tests.power_rigs import Clock

LIMITS = PowerLimits(downscale_below=0.2, fallback_below=0.05, hysteresis=0.03, max_age_s=60)
NORMAL, SAVE, CRITICAL = PowerMode


class FakeSource:
    """Says what it is told to, and fails when told an error."""

    def __init__(self, name: str = "fake", clock: Clock | None = None) -> None:
        self.name = name
        self.clock = clock
        self.says: dict[str, Any] | Exception | None = None
        self.reads = 0
        self.closed = 0

    def read(self) -> Reading | None:
        self.reads += 1
        if isinstance(self.says, Exception):
            raise self.says
        now_s = self.clock() if self.clock else 0.0
        return None if self.says is None else Reading(self.name, now_s, **self.says)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def source(clock: Clock) -> FakeSource:
    return FakeSource(clock=clock)


@pytest.fixture
def watch(source: FakeSource, clock: Clock) -> PowerWatch:
    return PowerWatch([source], lambda: LIMITS, clock=clock)


def test_before_the_first_look_and_without_sources_power_is_normal(watch: PowerWatch) -> None:
    assert watch.power() == Power()
    assert PowerWatch([]).power() == Power()


def test_a_look_moves_the_state(watch: PowerWatch, source: FakeSource) -> None:
    modes = []
    for level in (0.5, 0.1, 0.21, 0.04, 0.07, 0.5):
        source.says = {"level": level}
        watch.poll()
        modes.append(watch.power().mode)
    assert modes == [NORMAL, SAVE, SAVE, CRITICAL, CRITICAL, NORMAL]


def test_a_requests_level_counts_for_that_request_alone(watch: PowerWatch, source: FakeSource) -> None:
    source.says = {"level": 0.5}
    watch.poll()
    mine = watch.power(0.01)
    assert (mine.mode, mine.level, mine.source) == (CRITICAL, 0.01, REQUEST)
    assert watch.power().mode is NORMAL
    assert watch.power(0.06).mode is SAVE
    assert watch.poll().mode is NORMAL


def test_a_requests_level_does_not_cool_anything(watch: PowerWatch, source: FakeSource) -> None:
    source.says = {"level": 0.01, "celsius": 95.0}
    watch.poll()
    assert (watch.power(0.9).mode, watch.power(0.9).hot) == (SAVE, True)


@pytest.mark.parametrize("level", [float("nan"), float("inf"), -1.0, 1.5, 80.0])
def test_an_impossible_level_of_a_request_changes_nothing(watch: PowerWatch, source: FakeSource, level: float) -> None:
    source.says = {"level": 0.1}
    watch.poll()
    assert watch.power(level) == watch.power()


def test_readings_age_even_if_the_thread_hangs(watch: PowerWatch, source: FakeSource, clock: Clock) -> None:
    source.says = {"level": 0.01, "celsius": 95.0}
    watch.poll()
    clock.now += 60
    assert watch.power().mode is CRITICAL
    clock.now += 1
    assert watch.power() == Power()


def test_what_a_source_said_holds_through_a_hiccup(watch: PowerWatch, source: FakeSource, clock: Clock) -> None:
    for hiccup in (None, OSError(5, "Input/output error"), {"celsius": 30.0}):
        source.says = {"level": 0.1, "celsius": 90.0}
        watch.poll()
        source.says = hiccup
        clock.now += 59
        assert watch.poll().level == 0.1
        clock.now += 2
        assert watch.poll().level is None


def test_heat_that_is_measured_anew_is_not_kept(watch: PowerWatch, source: FakeSource) -> None:
    source.says = {"level": 0.5, "celsius": 90.0}
    assert watch.poll().hot
    source.says = {"celsius": 30.0}
    assert watch.poll() == Power(NORMAL, 0.5, source="fake", celsius=30.0)


def test_one_source_that_fails_takes_nothing_from_the_others(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = FakeSource("bad", clock), FakeSource("good", clock)
    bad.says, good.says = RuntimeError("the secret path /x"), {"level": 0.1}
    watch = PowerWatch([bad, good], lambda: LIMITS, clock=clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert watch.poll().source == "good"
    (record,) = caplog.records
    assert record.message == "power source bad fails: RuntimeError"


def test_limits_may_change_while_it_runs(source: FakeSource, clock: Clock) -> None:
    limits = LIMITS
    watch = PowerWatch([source], lambda: limits, clock=clock)
    source.says = {"level": 0.3}
    assert watch.poll().mode is NORMAL
    limits = PowerLimits(downscale_below=0.5, fallback_below=0.4)
    assert watch.power().mode is CRITICAL


def test_listeners_hear_of_each_change_once(watch: PowerWatch, source: FakeSource) -> None:
    heard: list[PowerMode] = []

    def broken(power: Power) -> None:
        raise RuntimeError

    watch.listen(broken)
    forget = watch.listen(lambda power: heard.append(power.mode))
    for level in (0.5, 0.1, 0.1, 0.01, 0.01):
        source.says = {"level": level}
        watch.poll()
    assert heard == [SAVE, CRITICAL]
    forget()
    forget()
    source.says = {"level": 0.9}
    watch.poll()
    assert heard == [SAVE, CRITICAL]


def test_the_thread_polls_wakes_when_told_and_stops() -> None:
    source, wake = FakeSource(), threading.Event()
    watch = PowerWatch([source], interval_s=3600, wake=wake)
    assert source.reads == 0
    watch.start()
    watch.start()
    wait_until(lambda: source.reads == 1)
    wake.set()
    wait_until(lambda: source.reads == 2)
    watch.stop()
    watch.stop()
    assert source.closed == 2
    assert "power" not in {thread.name for thread in threading.enumerate()}


def test_a_running_answer_hears_of_the_battery_at_once(tmp_path: Path) -> None:
    """End to end: a file, the thread, and a listener as a running request would have one."""
    battery, stop = tmp_path / "battery", threading.Event()
    battery.write_text("0.5")
    watch = PowerWatch([FileSource(battery)], lambda: LIMITS, interval_s=0.01)
    watch.listen(lambda power: stop.set() if power.mode is CRITICAL else None)
    watch.start()
    try:
        wait_until(lambda: watch.power().level == 0.5)
        battery.write_text("0.01")
        assert stop.wait(10)
    finally:
        watch.stop()


# --- settings ---


def test_nothing_set_is_no_source() -> None:
    config = PowerConfig.from_environment({})
    assert config == PowerConfig()
    assert config.open(threading.Event()) == []


def test_everything_can_be_set(tmp_path: Path) -> None:
    config = PowerConfig.from_environment(
        {
            "POWER_SOURCES": ", ".join(SOURCES),
            "POWER_INTERVAL_MS": "250",
            "POWER_SYSFS": str(tmp_path),
            "POWER_THERMAL_ZONES": "cpu-thermal, gpu-thermal",
            "POWER_FILE": str(tmp_path / "battery"),
            "POWER_TOPIC": "edgecascade/battery",
            "POWER_INA219_CURVE": "3.3:0, 3.7:0.5, 4.1:1",
            "POWER_INA219_CAPACITY_MAH": "5000",
            "POWER_INA219_START_LEVEL": "0.9",
            "POWER_INA219_CHARGING_CURRENT": "negative",
            "POWER_INA219_BUS": "4",
            "POWER_INA219_ADDRESS": "0x43",
            "POWER_INA219_SHUNT_OHMS": "0.01",
        }
    )
    assert (config.sources, config.interval_s, config.sysfs) == (SOURCES, 0.25, tmp_path)
    assert (config.zones, config.topic) == (("cpu-thermal", "gpu-thermal"), "edgecascade/battery")
    meter = config.meter
    assert meter.curve == VoltageCurve(((3.3, 0.0), (3.7, 0.5), (4.1, 1.0)))
    assert (meter.capacity_mah, meter.start_level, meter.charging_sign) == (5000, 0.9, -1)
    assert (meter.bus, meter.address, meter.shunt_ohms) == (4, 0x43, 0.01)
    assert [source.name for source in config.open(threading.Event())] == list(SOURCES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("POWER_SOURCES", value) for value in ("battery", "file,thermal,", "thermal,thermal", "none,thermal")],
        *[("POWER_INTERVAL_MS", value) for value in ("0", "soon", "nan", "1e9")],
        *[("POWER_INA219_CURVE", value) for value in ("3.7", "3.7:0.5", "4:0,3:1", "3:0,4:2", "a:b,c:d", "3:0:1,4:1")],
        *[("POWER_INA219_CAPACITY_MAH", value) for value in ("0", "lots", "5000")],
        *[("POWER_INA219_START_LEVEL", value) for value in ("90", "nan")],
        ("POWER_INA219_CHARGING_CURRENT", "plus"),
        ("POWER_INA219_BUS", "-1"),
        *[("POWER_INA219_ADDRESS", value) for value in ("0x77", "forty", "64.0")],
        ("POWER_INA219_SHUNT_OHMS", "0"),
        ("POWER_ENERGY_FILE", "/nowhere/energy.json"),
        ("POWER_SOURCE", "file"),
        ("POWER_INA219_SHUNT", "1"),
    ],
)
def test_a_mistake_is_named(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PowerConfig.from_environment({key: value})


@pytest.mark.parametrize(("source", "key"), [("file", "POWER_FILE"), ("greengrass", "POWER_TOPIC")])
def test_what_a_source_needs_must_be_there(source: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PowerConfig.from_environment({"POWER_SOURCES": source})


@pytest.mark.parametrize(
    ("source", "extra"), [("psutil", "power"), ("ina219-i2c", "power"), ("greengrass", "greengrass")]
)
def test_a_library_that_is_missing_is_named_with_what_brings_it(
    source: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("functions.dispatcher.power.config.find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf"POWER_SOURCES names '{source}'.*edgecascade\[{extra}\]"):
        PowerConfig.from_environment({"POWER_SOURCES": source, "POWER_TOPIC": "t"})


def test_libraries_are_imported_only_when_asked(tmp_path: Path) -> None:
    before = {"smbus2", "awsiot"} & set(sys.modules)
    config = PowerConfig.from_environment({"POWER_SOURCES": "file,thermal", "POWER_FILE": str(tmp_path / "b")})
    config.watch(PowerLimits).poll()
    assert {"smbus2", "awsiot"} & set(sys.modules) == before


def test_a_message_of_a_source_wakes_the_watch() -> None:
    wake = threading.Event()
    (source,) = PowerConfig(sources=("greengrass",), topic="t").open(wake)
    assert not wake.is_set()
    source.heard()
    assert wake.is_set()


def test_the_watch_of_a_config_reads_its_sources(tmp_path: Path) -> None:
    (tmp_path / "battery").write_text("0.04")
    config = PowerConfig.from_environment({"POWER_SOURCES": "file", "POWER_FILE": str(tmp_path / "battery")})
    assert config.watch(lambda: LIMITS).poll().mode is CRITICAL


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "energy.md").read_text("utf-8")
    for key in POWER_KEYS:
        short = key.replace("POWER_INA219_", "…")
        assert f"| `{key}`" in text or f"`{short}`" in text, f"{key} is missing in docs/energy.md"
    for source in SOURCES:
        assert f"| `{source}` |" in text
    for field in PowerLimits.__dataclass_fields__:
        assert f"`{field}`" in text


def blocks(language: str) -> list[str]:
    """The fenced blocks of docs/energy.md in one language."""
    text = (Path(__file__).parents[1] / "docs" / "energy.md").read_text("utf-8")
    return [part.split("```", 1)[0] for part in text.split(f"```{language}\n")[1:]]


@pytest.mark.parametrize("block", blocks("ini"))
def test_the_examples_of_settings_hold(block: str) -> None:
    config = PowerConfig.from_environment(dict(line.split("=", 1) for line in block.splitlines()))
    assert config.sources
    assert len(config.open(threading.Event())) == len(config.sources)


def test_the_examples_in_json_hold(tmp_path: Path) -> None:
    said, energy = blocks("json")
    assert message.parse(said, "file", 0.0) == Reading(
        "file", 0.0, 0.15, charging=False, watts=4.2, celsius=61.0, throttled=False
    )
    (tmp_path / "energy.json").write_text(energy)
    found = figures.load(tmp_path / "energy.json", "POWER_ENERGY_FILE")
    assert len(found.draws) == 4
    assert found.radio is not None


# --- figures ---

ENERGY = """{
  "draws": {"device": {"watts": 3, "source": "a meter"}, "idle": {"watts": 1.5, "source": "a meter"},
            "edge": {"watts": 20, "source": "a sheet"}},
  "radio": {"joules_per_byte_sent": 1e-6, "joules_per_byte_received": 1e-6, "source": "a paper"}
}"""


def test_figures_come_out_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "energy.json"
    path.write_text(ENERGY)
    found = PowerConfig.from_environment({"POWER_ENERGY_FILE": str(path)}).figures
    assert found.draws[DEVICE] == Draw(3.0, "a meter")
    assert not found.draws[EDGE].on_battery
    assert found.radio == Radio(1e-6, 1e-6, "a paper")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"watts": 3,', '"watts": -3,', "draws.device.watts"),
        ('"watts": 3,', '"watts": NaN,', "draws.device.watts"),
        ('"watts": 3,', "", "draws.device.watts"),
        ('"a paper"', '""', "radio.source"),
        (', "source": "a sheet"', "", "draws.edge.source"),
        ('"edge"', '"egde"', "draws.egde"),
        ('"radio"', '"wifi"', "wifi"),
        ("}", "", "JSON"),
    ],
)
def test_a_bad_figure_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = tmp_path / "energy.json"
    path.write_text(ENERGY.replace(old, new, 1))
    with pytest.raises(ConfigError, match=f"POWER_ENERGY_FILE: .*{named}"):
        PowerConfig.from_environment({"POWER_ENERGY_FILE": str(path)})


def test_a_card_fills_in_what_the_operator_left_out() -> None:
    known = Figures({DEVICE: Draw(3.0, "a meter")})
    assert figures.with_card(known, DEVICE, 6.12, "a page") is known
    assert figures.with_card(known, EDGE, 25.0, "a sheet").draws[EDGE] == Draw(25.0, "a sheet", on_battery=False)
    assert figures.with_card(known, EDGE, None, "") is known
    assert figures.with_card(known, EDGE, 25.0, " ") is known


def test_with_the_shipped_card_alone_the_choice_says_what_it_does_not_know() -> None:
    manifest = json.loads((Path(__file__).parents[1] / "models" / "tiers" / "device" / "manifest.json").read_text())
    known = figures.with_card(Figures(), DEVICE, **{"watts": None, "source": "", **manifest["energy"]})
    choice = cheapest(options(Forecast(device_s=0.01, edge_s=0.08, traffic=Traffic(900, 600))), 0.2, known)
    assert choice.option is not None
    assert choice.option.saving is Saving.DEVICE_ONLY
    assert choice.cost == Cost(manifest["energy"]["watts"] * 0.01, manifest["energy"]["watts"] * 0.01)
    assert (choice.undecided, choice.unknown) == ((Saving.EDGE,), (IDLE, RADIO))


# --- gauges ---


def gauges(power: Power) -> dict[tuple[str, str], float]:
    metrics = Metrics("shop-3", "whole")
    metrics.add(series(lambda: power))
    text = metrics.exposition(inflight=0, waiting=0, limit=1, ready=True).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(sample.labels["node_id"] == "shop-3" for sample in samples)
    wanted = ("edgecascade_power", "edgecascade_battery", "edgecascade_temperature", "edgecascade_hot")
    return {
        (sample.name.removeprefix("edgecascade_"), mark_of(sample.labels)): sample.value
        for sample in samples
        if sample.name.startswith(wanted)
    }


def mark_of(labels: dict[str, str]) -> str:
    return labels.get("mode") or labels.get("source", "")


def test_the_state_in_gauges() -> None:
    found = gauges(Power(SAVE, 0.17, hot=True, source="power_supply", charging=False, celsius=81.5))
    assert found == {
        ("power_mode", "normal"): 0,
        ("power_mode", "save"): 1,
        ("power_mode", "critical"): 0,
        ("hot", ""): 1,
        ("battery_level_ratio", "power_supply"): 0.17,
        ("battery_charging", ""): 0,
        ("temperature_celsius", ""): 81.5,
    }


def test_what_nobody_measures_has_no_gauge() -> None:
    assert {name for name, _ in gauges(Power())} == {"power_mode", "hot"}
