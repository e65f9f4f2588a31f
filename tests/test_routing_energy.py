"""The energy model: sums, what is unknown, and the choice. All figures here are made up."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.energy import (
    DEVICE,
    EDGE,
    FEWER_THREADS,
    IDLE,
    RADIO,
    Draw,
    Figures,
    Forecast,
    Option,
    Radio,
    Saving,
    Shortcut,
    Traffic,
    cheapest,
    cost,
    options,
)

SOURCE = "made up"
RADIO_FIGURES = Radio(1e-6, 2e-6, SOURCE, tail_joules=0.5, tail_s=10)
ALL = Figures(
    {
        DEVICE: Draw(6, SOURCE),
        FEWER_THREADS: Draw(2, SOURCE),
        IDLE: Draw(1, SOURCE),
        EDGE: Draw(25, SOURCE, on_battery=False),
    },
    RADIO_FIGURES,
)
FORECAST = Forecast(
    device_s=0.04,
    edge_s=0.08,
    network_s=0.02,
    traffic=Traffic(1000, 500),
    p_escalate=0.3,
    device_p_right=0.8,
    edge_p_right=0.95,
    early_exit=Shortcut(0.5, 0.7),
    shorter_answer=Shortcut(0.25),
    fewer_threads=1.5,
)


def by_saving(forecast: Forecast = FORECAST) -> dict[Saving, Option]:
    return {option.saving: option for option in options(forecast)}


def test_a_device_answer_costs_its_watts_times_its_seconds() -> None:
    found = cost(by_saving()[Saving.DEVICE_ONLY], ALL)
    assert (found.battery_joules, found.total_joules) == (pytest.approx(6 * 0.04), pytest.approx(6 * 0.04))


def test_an_edge_answer_costs_the_battery_the_wait_and_the_radio() -> None:
    found = cost(by_saving()[Saving.EDGE], ALL)
    battery = 1 * (0.02 + 0.08) + 1000e-6 + 500 * 2e-6 + 0.5
    assert found.battery_joules == pytest.approx(battery)
    assert found.total_joules == pytest.approx(battery + 25 * 0.08)


def test_device_then_edge_costs_the_edge_as_often_as_it_is_asked() -> None:
    found = by_saving()
    both = found[Saving.NO_HEDGING]
    assert both.finish_s == pytest.approx(0.04 + 0.02 + 0.08)
    device, edge = (cost(found[name], ALL).battery_joules for name in (Saving.DEVICE_ONLY, Saving.EDGE))
    assert device is not None
    assert edge is not None
    assert cost(both, ALL).battery_joules == pytest.approx(device + 0.3 * edge)


@pytest.mark.parametrize(("since_last_s", "tail"), [(math.inf, 0.5), (20, 0.5), (10, 0.5), (5, 0.25), (0, 0.0)])
def test_a_radio_that_is_still_awake_pays_the_tail_in_part(since_last_s: float, tail: float) -> None:
    assert RADIO_FIGURES.joules(Traffic(0, 0, since_last_s)) == pytest.approx(tail)


def test_without_figures_nothing_is_known_and_the_model_says_so() -> None:
    choice = cheapest(options(FORECAST), 1.0, Figures())
    assert choice.option is None
    assert choice.reason == "no option's cost is known"
    assert set(choice.unknown) == {DEVICE, FEWER_THREADS, IDLE, RADIO}
    assert set(choice.undecided) == set(Saving)
    assert cost(by_saving()[Saving.EDGE], Figures()).battery_joules is None


def test_without_the_edges_watts_the_battery_is_known_and_the_total_is_not() -> None:
    figures = Figures({DEVICE: Draw(6, SOURCE), IDLE: Draw(1, SOURCE)}, RADIO_FIGURES)
    found = cost(by_saving()[Saving.EDGE], figures)
    assert found.battery_joules is not None
    assert (found.total_joules, found.unknown) == (None, (EDGE,))


def test_an_option_with_a_missing_figure_is_named_where_it_could_have_won() -> None:
    figures = Figures({DEVICE: Draw(6, SOURCE), IDLE: Draw(1, SOURCE)})
    fast_device = cheapest(options(Forecast(device_s=0.01, edge_s=0.1)), 1.0, figures)
    assert fast_device.option is not None
    assert fast_device.option.saving is Saving.DEVICE_ONLY
    # Waiting alone costs more (0.1 J) than the device (0.06 J): whatever the radio needs, the edge cannot win.
    assert fast_device.undecided == ()
    slow_device = cheapest(options(Forecast(device_s=1.0, edge_s=0.1)), 2.0, figures)
    assert slow_device.option is not None
    assert slow_device.option.saving is Saving.DEVICE_ONLY
    assert (slow_device.undecided, slow_device.unknown) == ((Saving.EDGE,), (RADIO,))


def test_the_cheapest_in_time_is_chosen() -> None:
    assert cheapest(options(FORECAST), 1.0, ALL).option == by_saving()[Saving.SHORTER_ANSWER]
    long = Forecast(device_s=2.0, edge_s=0.1, network_s=0.05, traffic=Traffic(1000, 500), p_escalate=0.1)
    late = cheapest(options(long), 1.0, ALL)
    assert late.option is not None
    assert late.option.saving is Saving.EDGE


def test_fewer_threads_win_where_they_draw_less_than_they_delay() -> None:
    slow = Forecast(device_s=0.04, fewer_threads=2.0)
    choice = cheapest(options(slow), 1.0, ALL)
    assert choice.option is not None
    assert choice.option.saving is Saving.FEWER_THREADS
    hurried = cheapest(options(slow), 0.05, ALL)
    assert hurried.option is not None
    assert hurried.option.saving is Saving.DEVICE_ONLY


def test_an_answer_that_is_not_right_often_enough_is_not_chosen() -> None:
    choice = cheapest(options(FORECAST), 1.0, ALL, least_p_right=0.75)
    assert choice.option is not None
    assert choice.option.saving is Saving.FEWER_THREADS
    assert cheapest(options(FORECAST), 1.0, ALL, least_p_right=0.99).reason.startswith("no option is known to be right")


def test_nothing_in_time_and_nothing_open() -> None:
    assert cheapest(options(FORECAST), 0.001, ALL).reason == "no option is in time"
    assert cheapest(options(FORECAST), math.nan, ALL).option is None
    assert cheapest(options(Forecast()), 1.0, ALL).option is None


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_figure_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="watts"):
        Draw(value, SOURCE)
    with pytest.raises(ValueError, match="tail_s"):
        Radio(0, 0, SOURCE, tail_s=value)
    with pytest.raises(ValueError, match="device"):
        Option(Saving.DEVICE_ONLY, 1.0, {DEVICE: value})


def test_a_figure_without_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match="source"):
        Draw(6.0, " ")
    with pytest.raises(ValueError, match="source"):
        Radio(0, 0, "")


seconds = st.floats(0, 10)
probability = st.floats(0, 1)
shortcuts = st.none() | st.builds(Shortcut, st.floats(0, 1), st.none() | probability)
forecasts = st.builds(
    Forecast,
    device_s=st.none() | seconds,
    edge_s=st.none() | seconds,
    network_s=seconds,
    traffic=st.builds(Traffic, st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 100) | st.just(math.inf)),
    p_escalate=probability,
    device_p_right=st.none() | probability,
    edge_p_right=st.none() | probability,
    early_exit=shortcuts,
    shorter_answer=shortcuts,
    fewer_threads=st.none() | st.floats(1, 8),
)
draws = st.builds(Draw, st.floats(0, 100), st.just(SOURCE))
radios = st.builds(
    Radio,
    st.floats(0, 1e-3),
    st.floats(0, 1e-3),
    st.just(SOURCE),
    tail_joules=st.floats(0, 20),
    tail_s=st.floats(0, 20),
)
figures_ = st.builds(
    Figures,
    st.dictionaries(st.sampled_from([DEVICE, FEWER_THREADS, IDLE]), draws),
    st.none() | radios,
)


@given(forecasts, figures_, seconds, probability)
def test_the_choice_is_in_time_right_often_enough_and_none_known_is_cheaper(
    forecast: Forecast, figures: Figures, deadline_s: float, least_p_right: float
) -> None:
    choice = cheapest(options(forecast), deadline_s, figures, least_p_right)
    if choice.option is None:
        return
    assert choice.option.finish_s <= deadline_s
    assert least_p_right == 0 or (choice.option.p_right or 0) >= least_p_right
    assert choice.cost is not None
    assert choice.cost.battery_joules is not None
    for other in options(forecast):
        spent = cost(other, figures).battery_joules
        in_time = other.finish_s <= deadline_s
        if in_time and spent is not None and (least_p_right == 0 or (other.p_right or 0) >= least_p_right):
            assert choice.cost.battery_joules <= spent


@given(forecasts, figures_, seconds, seconds)
def test_more_time_never_costs_more(forecast: Forecast, figures: Figures, one: float, other: float) -> None:
    short, long = (cheapest(options(forecast), deadline_s, figures) for deadline_s in sorted((one, other)))
    if short.cost is not None:
        assert short.cost.battery_joules is not None
        assert long.cost is not None
        assert long.cost.battery_joules is not None
        assert long.cost.battery_joules <= short.cost.battery_joules
