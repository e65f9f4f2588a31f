"""The state of the power: what is believed, and that a mode is left more reluctantly than it is entered."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from routing.power import REQUEST, Power, PowerLimits, PowerMode, Reading, next_power

LIMITS = PowerLimits(
    downscale_below=0.2, fallback_below=0.05, hysteresis=0.03, hot_above_c=80, cool_below_c=70, max_age_s=60
)
NORMAL, SAVE, CRITICAL = PowerMode
ORDER = list(PowerMode)
NOW = 1000.0


def reading(level: float | None = None, source: str = "battery", age_s: float = 0.0, **more: Any) -> Reading:
    return Reading(source, NOW - age_s, level, **more)


def after(*readings: Reading, previous: Power | None = None) -> Power:
    return next_power(LIMITS, previous or Power(), readings, NOW)


def through(*levels: float) -> list[PowerMode]:
    """The modes that a row of levels leads through."""
    power, modes = Power(), []
    for level in levels:
        power = after(reading(level), previous=power)
        modes.append(power.mode)
    return modes


def test_nothing_known_is_normal() -> None:
    assert after() == Power(NORMAL, None, hot=False, source="none")


def test_modes_are_entered_at_their_limits_and_left_above_them() -> None:
    assert through(0.2, 0.199, 0.21, 0.23, 0.231, 0.2) == [NORMAL, SAVE, SAVE, SAVE, NORMAL, NORMAL]
    assert through(0.05, 0.049, 0.08, 0.081, 0.22, 0.24) == [SAVE, CRITICAL, CRITICAL, SAVE, SAVE, NORMAL]
    assert through(0.01, 0.9) == [CRITICAL, NORMAL]
    assert through(0.01, 0.22) == [CRITICAL, SAVE]


def test_the_lowest_level_counts_and_is_named() -> None:
    power = after(reading(0.9, "a"), reading(0.1, "b", charging=False), reading(None, "c"))
    assert (power.mode, power.level, power.source, power.charging) == (SAVE, 0.1, "b", False)


def test_a_requests_level_outranks_sensors_both_ways() -> None:
    assert after(reading(0.9), reading(0.01, REQUEST)).mode is CRITICAL
    better = after(reading(0.01), reading(0.9, REQUEST))
    assert (better.mode, better.level, better.source) == (NORMAL, 0.9, REQUEST)


@pytest.mark.parametrize("level", [math.nan, math.inf, -0.01, 1.01, 55])
def test_an_impossible_level_is_not_believed(level: float) -> None:
    assert after(reading(level)) == Power()
    assert after(reading(level, REQUEST), reading(0.1)).level == 0.1


def test_old_readings_and_readings_of_the_future_do_not_count() -> None:
    assert after(reading(0.01, age_s=60)).mode is CRITICAL
    assert after(reading(0.01, celsius=99.0, age_s=60.1)) == Power()
    assert after(reading(0.01, celsius=99.0, age_s=-1)) == Power()
    assert after(reading(0.01, age_s=61), reading(0.9, "b")).level == 0.9


def test_power_from_outside_lifts_save_but_not_critical() -> None:
    assert after(reading(0.1, charging=True)).mode is NORMAL
    assert after(reading(0.1, charging=True), reading(0.12, "b", charging=False)).mode is SAVE
    assert after(reading(0.01, charging=True)).mode is CRITICAL
    critical = Power(CRITICAL, 0.01, battery=CRITICAL)
    assert after(reading(0.07, charging=True), previous=critical).mode is CRITICAL
    assert after(reading(0.09, charging=True), previous=critical).mode is NORMAL


def test_heat_saves_until_it_is_cool_again() -> None:
    hot = after(reading(celsius=80.0))
    assert (hot.mode, hot.hot, hot.celsius, hot.battery) == (SAVE, True, 80.0, NORMAL)
    still = after(reading(celsius=70.0), previous=hot)
    assert still.hot
    assert after(reading(celsius=69.9), previous=still) == Power(celsius=69.9)
    assert not after(reading(celsius=79.9)).hot


def test_heat_does_not_hold_the_battery_in_save() -> None:
    """0.22 is inside the battery's width: it stays in SAVE only if the battery had asked for it."""
    hot = after(reading(0.22, celsius=90.0))
    assert after(reading(0.22, celsius=20.0), previous=hot).mode is NORMAL


def test_throttling_is_heat_and_critical_outranks_it() -> None:
    assert after(reading(throttled=True)).mode is SAVE
    assert after(reading(0.01, throttled=True)).mode is CRITICAL
    throttled = after(reading(celsius=75.0, throttled=True))
    assert after(reading(celsius=75.0, throttled=False), previous=throttled).hot


@pytest.mark.parametrize("celsius", [math.nan, math.inf, -math.inf, -127.0, -273.15, 250.0, 65535.0])
def test_a_broken_thermometer_is_not_believed(celsius: float) -> None:
    assert after(reading(celsius=celsius)) == Power()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("downscale_below", value) for value in (-0.1, 1.0, math.nan)],
        *[("fallback_below", value) for value in (-0.1, 0.3, math.nan)],
        *[("hysteresis", value) for value in (-0.1, 0.8, math.nan)],
        *[("cool_below_c", value) for value in (81.0, -300.0, math.nan)],
        ("hot_above_c", 500.0),
        *[("max_age_s", value) for value in (0.0, -1.0, math.inf, math.nan)],
    ],
)
def test_limits_that_make_no_sense_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(LIMITS, **{field: value})


share = st.floats(0, 1)
any_float = st.floats(allow_nan=True, allow_infinity=True)
times = st.floats(NOW - 200, NOW + 10)
believable = st.builds(
    Reading,
    source=st.sampled_from(["a", "b", "c"]),
    taken_at_s=times,
    level=st.none() | share,
    charging=st.none() | st.booleans(),
    celsius=st.none() | st.floats(-40, 150),
    throttled=st.none() | st.booleans(),
)
wild = st.builds(
    Reading,
    source=st.sampled_from(["a", REQUEST]),
    taken_at_s=any_float,
    level=st.none() | any_float,
    charging=st.none() | st.booleans(),
    watts=st.none() | any_float,
    celsius=st.none() | any_float,
    throttled=st.none() | st.booleans(),
)
states = st.builds(
    Power,
    mode=st.sampled_from(PowerMode),
    level=st.none() | share,
    hot=st.booleans(),
    battery=st.sampled_from(PowerMode),
)


@st.composite
def limits_(draw: st.DrawFn) -> PowerLimits:
    downscale = draw(st.floats(0, 0.9))
    cool = draw(st.floats(-20, 100))
    return PowerLimits(
        downscale_below=downscale,
        fallback_below=draw(st.floats(0, downscale)),
        hysteresis=draw(st.floats(0, 0.09)),
        hot_above_c=draw(st.floats(cool, 120)),
        cool_below_c=cool,
    )


@given(limits_(), states, st.lists(wild, max_size=4), any_float)
def test_no_floats_break_it(limits: PowerLimits, previous: Power, readings: list[Reading], now_s: float) -> None:
    power = next_power(limits, previous, readings, now_s)
    assert power.level is None or 0 <= power.level <= 1
    assert power.celsius is None or math.isfinite(power.celsius)
    assert ORDER.index(power.mode) >= ORDER.index(power.battery)
    assert power.mode is not NORMAL or not power.hot


@given(limits_(), states, st.lists(believable, max_size=4))
def test_what_is_aged_out_changes_nothing(limits: PowerLimits, previous: Power, readings: list[Reading]) -> None:
    fresh = [one for one in readings if 0 <= NOW - one.taken_at_s <= limits.max_age_s]
    assert next_power(limits, previous, readings, NOW) == next_power(limits, previous, fresh, NOW)


@given(limits_(), states, st.lists(believable, min_size=1, max_size=3), share, share)
def test_a_fuller_battery_never_asks_for_more_saving(
    limits: PowerLimits, previous: Power, readings: list[Reading], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    modes = [
        next_power(limits, previous, [replace(readings[0], level=level), *readings[1:]], NOW).mode
        for level in (low, high)
    ]
    assert ORDER.index(modes[0]) >= ORDER.index(modes[1])


@given(limits_(), states, st.lists(believable, max_size=3), believable)
def test_another_sensor_never_makes_things_better(
    limits: PowerLimits, previous: Power, readings: list[Reading], more: Reading
) -> None:
    modes = [next_power(limits, previous, seen, NOW).mode for seen in (readings, [*readings, more])]
    assert ORDER.index(modes[0]) <= ORDER.index(modes[1])


@given(limits_(), st.lists(share, min_size=2, max_size=40), st.sampled_from(["downscale_below", "fallback_below"]))
def test_never_flaps_within_the_width(limits: PowerLimits, noise: list[float], field: str) -> None:
    """However a level trembles between a limit and limit + width: at most one change of the mode, and never back."""
    low = getattr(limits, field)
    assume(limits.hysteresis > 0)
    # With limits closer to each other than the width the level crosses the other one too.
    assume(limits.downscale_below - limits.fallback_below > limits.hysteresis or field == "downscale_below")
    power, modes = Power(), []
    for part in noise:
        level = min(low + part * limits.hysteresis, low + limits.hysteresis)
        power = next_power(limits, power, [Reading("a", NOW, level)], NOW)
        modes.append(power.mode)
    assert len(set(modes)) == 1


@given(limits_(), st.lists(share, min_size=1, max_size=40), st.booleans())
def test_heat_never_flaps_between_its_limits(limits: PowerLimits, noise: list[float], hot: bool) -> None:
    """From `cool_below_c` to below `hot_above_c` whoever was hot stays hot, and nobody else becomes so."""
    width = limits.hot_above_c - limits.cool_below_c
    assume(width > 0)
    power = Power(hot=hot)
    for part in noise:
        celsius = min(limits.cool_below_c + part * width, math.nextafter(limits.hot_above_c, -math.inf))
        power = next_power(limits, power, [Reading("a", NOW, celsius=celsius)], NOW)
        assert power.hot is hot


@given(limits_(), states, st.floats(-40, 150), st.floats(-40, 150))
def test_warmer_is_never_better(limits: PowerLimits, previous: Power, one: float, other: float) -> None:
    cold, warm = (
        next_power(limits, previous, [Reading("a", NOW, 0.5, celsius=celsius)], NOW) for celsius in sorted((one, other))
    )
    assert cold.hot <= warm.hot
    assert ORDER.index(cold.mode) <= ORDER.index(warm.mode)


@given(limits_(), states, st.lists(share, min_size=1, max_size=30))
def test_each_change_of_mode_crossed_a_limit(limits: PowerLimits, power: Power, levels: list[float]) -> None:
    for level in levels:
        before = power.battery
        power = next_power(limits, power, [Reading("a", NOW, level)], NOW)
        worse, better = ORDER.index(power.mode) > ORDER.index(before), ORDER.index(power.mode) < ORDER.index(before)
        assert not worse or level < limits.downscale_below
        assert not better or level > limits.fallback_below + limits.hysteresis


@given(limits_(), st.floats(-40, 150))
def test_the_same_reading_again_changes_nothing(limits: PowerLimits, celsius: float) -> None:
    seen = [Reading("a", NOW, 0.5, celsius=celsius)]
    once = next_power(limits, Power(), seen, NOW)
    assert next_power(limits, once, seen, NOW) == once
