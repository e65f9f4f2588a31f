"""Capacity: the invariants that hold whatever is read, and what it does on readings that say something."""

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaler.capacity import Capacity, Tuning
from scaler.forecast import Forecast, Smoothing
from scaler.queueing import Load, Service, chance_to_wait, share_late
from scaler.rehearsal import Habit, Past, Terms, cheapest, play
from scaler.values import Reading, Target

TARGET = Target(slo_s=10.0, percentile=0.95, minimum=1, maximum=60)


def reading(at_s=0.0, rate=4.0, **changes):
    calm = Reading(
        at_s=at_s,
        arrivals_per_s=rate,
        arrivals_scv=1.0,
        in_flight=0.0,
        queued=0.0,
        queue_wait_s=0.0,
        service_s=2.0,
        service_scv=0.8,
        latency_s=4.0,
        tokens_per_request=100.0,
        ready=10,
        starting=0,
    )
    return replace(calm, **changes)


targets = st.builds(
    Target,
    slo_s=st.floats(0.05, 60),
    percentile=st.floats(0.5, 0.999),
    minimum=st.integers(0, 3),
    maximum=st.integers(3, 80),
    cold_start_s=st.floats(0, 60),
    slots=st.integers(1, 4),
)
maybe = st.none() | st.floats(0.001, 50)
readings = st.builds(
    Reading,
    at_s=st.floats(0, 1e6),
    arrivals_per_s=st.floats(0, 500),
    arrivals_scv=maybe,
    in_flight=st.floats(0, 1000),
    queued=st.floats(0, 1000),
    queue_wait_s=maybe,
    service_s=maybe,
    service_scv=maybe,
    latency_s=maybe,
    tokens_per_request=maybe,
    ready=st.integers(0, 60),
    starting=st.integers(0, 20),
    power_ceiling=st.none() | st.integers(0, 100),
    arrived=st.none() | st.floats(0, 5000),
)


@given(targets, st.lists(readings, min_size=1, max_size=8))
@settings(deadline=None)
def test_any_history_is_answered_within_the_bounds_and_with_a_sentence(target, history):
    capacity = Capacity(target)
    for look in sorted(history, key=lambda r: r.at_s):
        decision = capacity.decide(look)
        assert target.minimum <= decision.replicas <= target.maximum
        assert decision.reason
        if look.power_ceiling is not None and look.power_ceiling >= target.minimum:
            assert decision.replicas <= look.power_ceiling


@given(targets, readings, st.floats(1, 5))
@settings(deadline=None)
def test_more_arrivals_never_want_fewer_replicas(target, look, factor):
    look = replace(look, arrived=None, service_s=look.service_s or 1.0)
    more = replace(look, arrivals_per_s=look.arrivals_per_s * factor)
    assert Capacity(target).decide(more).replicas >= Capacity(target).decide(look).replicas


@given(targets, readings, st.floats(1, 10))
@settings(deadline=None)
def test_a_looser_slo_never_wants_more_replicas(target, look, factor):
    look = replace(look, service_s=look.service_s or 1.0)
    looser = replace(target, slo_s=target.slo_s * factor)
    assert Capacity(looser).decide(look).replicas <= Capacity(target).decide(look).replicas


@given(readings, st.integers(1, 30))
@settings(deadline=None)
def test_nothing_is_scaled_down_while_answers_are_late(look, ready):
    target = replace(TARGET, slo_s=30.0)
    late = replace(look, ready=ready, starting=0, latency_s=1e6, service_s=0.5, in_flight=1.0, power_ceiling=None)
    assert Capacity(target).decide(late).replicas >= min(ready, target.maximum)


def test_a_decision_costs_milliseconds_even_for_thousands_of_replicas():
    capacity = Capacity(replace(TARGET, maximum=5000))
    looks = [reading(5.0 * i, 900.0 + i % 7, ready=2000, in_flight=1900.0) for i in range(80)]
    before = time.process_time()
    for look in looks:
        capacity.decide(look)
    assert time.process_time() - before < 80 * 0.25  # processor time; some hundred times what it takes


def test_the_reason_names_what_it_goes_by():
    said = Capacity(TARGET).decide(reading(queued=20.0, ready=4)).reason
    assert "4.00 requests/s of 2.00 s" in said
    assert "the 20 that wait" in said
    assert "95 % within 10.00 s" in said


def test_a_service_that_misses_the_slo_alone_says_so_and_is_not_answered_with_all_there_is():
    decision = Capacity(replace(TARGET, slo_s=1.0)).decide(reading(ready=9))
    assert "service alone misses 1 s" in decision.reason
    assert decision.replicas < TARGET.maximum


@pytest.mark.parametrize("percentile", [0.5, 0.7, 0.8, 0.9, 0.95, 0.99])
def test_a_slow_service_is_not_answered_with_all_there_is_at_any_percentile(percentile):
    slow = reading(rate=0.2, service_s=9.0, service_scv=0.94, ready=4)
    assert Capacity(replace(TARGET, percentile=percentile)).decide(slow).replicas < 20


def test_a_queue_asks_for_more_and_power_caps_it():
    waiting = reading(queued=50.0, in_flight=60.0)
    assert Capacity(TARGET).decide(waiting).replicas > Capacity(TARGET).decide(reading()).replicas
    capped = Capacity(TARGET).decide(replace(waiting, power_ceiling=12))
    assert capped.replicas == 12
    assert "power allows 12" in capped.reason


def test_replicas_are_let_go_only_after_a_while_and_to_none_when_nothing_comes():
    capacity = Capacity(replace(TARGET, minimum=0))
    assert capacity.decide(reading(0.0, 4.0, ready=10)).replicas >= 9
    quiet = [capacity.decide(reading(15.0 * i, 0.0, latency_s=None, ready=10)).replicas for i in range(1, 40)]
    assert quiet[0] >= 9
    assert quiet[-1] == 0
    assert quiet == sorted(quiet, reverse=True)


def test_what_starts_is_waited_for():
    capacity = Capacity(TARGET)
    decision = capacity.decide(reading(0.0, 0.5, ready=5, starting=5))
    assert decision.replicas == 10
    assert "while 5 of them start" in decision.reason


def test_without_a_measured_request_what_is_there_is_kept():
    unknown = reading(service_s=None, service_scv=None, latency_s=None, tokens_per_request=None, ready=3)
    assert Capacity(TARGET).decide(unknown).replicas == 3
    assert Capacity(replace(TARGET, minimum=0)).decide(replace(unknown, ready=0)).replicas == 1


def test_longer_answers_weigh_more():
    short, long = Capacity(TARGET), Capacity(TARGET)
    for capacity in (short, long):
        capacity.decide(reading(0.0))
    unmeasured = reading(600.0, service_s=None)
    more = long.decide(replace(unmeasured, tokens_per_request=300.0)).replicas
    assert more > short.decide(unmeasured).replicas


def test_late_answers_correct_the_model_within_bounds():
    capacity = Capacity(TARGET, Tuning(gain=0.2, review_s=math.inf))
    for i in range(40):
        capacity.decide(reading(15.0 * i, latency_s=30.0))
    assert capacity.correction == capacity.tuning.most_correction
    for i in range(40, 100):
        capacity.decide(reading(15.0 * i, latency_s=1.0))
    assert capacity.correction == pytest.approx(1.0, abs=0.01)


def test_bursts_that_are_over_before_an_order_serves_are_kept_for():
    """Every five minutes 60 requests of 2 s come at once: what serves 25 s later is too late."""
    capacity = Capacity(TARGET)
    decisions = []
    for i in range(360):
        burst = i % 60 < 2
        look = reading(5.0 * i, 6.0 if burst else 0.0, arrived=30.0 if burst else 0.0, ready=2, latency_s=None)
        decisions.append(capacity.decide(look))
    assert capacity.habit.floor >= 6
    assert any("bursts of late" in decision.reason for decision in decisions[200:])
    steady = Capacity(TARGET)
    for i in range(360):
        steady.decide(reading(5.0 * i, 0.2, arrived=1.0, ready=2))
    assert steady.habit.floor < 4


def test_one_step_in_a_short_past_is_not_taken_for_one_of_many():
    """A minute at 6 requests/s after nothing, then one in two seconds: the first rehearsals come in the quiet."""
    capacity = Capacity(Target(slo_s=1.5, percentile=0.95, minimum=0, maximum=6))
    wanted = []
    for i in range(80):
        arrived = 30.0 if 2 <= i < 14 else 2.5
        look = reading(5.0 * i, arrived / 5, arrived=arrived, ready=1, service_s=0.4, latency_s=0.6)
        wanted.append(capacity.decide(look).replicas)
    assert max(wanted[2:14]) >= 4
    assert max(wanted[50:]) <= 2


def test_the_estimate_agrees_with_erlang_and_with_one_server():
    # Erlang C for 5 servers and 4 erlangs, from tables: 0.5541.
    assert chance_to_wait(5, 4.0) == pytest.approx(0.5541, abs=5e-5)
    # M/D/1 at half load waits 0.25 s in the mean; the tail of that mean: P(W > 1) = 0.5 exp(-1 / 0.5).
    load = Load(0.5, 1.0, Service(1.0, 0.0))
    assert share_late(load, 1, 2.0) == pytest.approx(0.5 * math.exp(-2.0), rel=1e-3)


def test_the_limit_for_many_servers_continues_erlang():
    exact = chance_to_wait(4096, 4050.0)
    assert chance_to_wait(4097, 4050.99) == pytest.approx(exact, rel=0.02)


@given(st.floats(0.1, 50), st.integers(1, 60), st.floats(0, 30), st.floats(0, 200), st.floats(1, 100))
def test_lateness_falls_with_servers_and_with_the_limit(rate, servers, limit_s, backlog_s, after_s):
    load = Load(rate, 1.3, Service(1.5, 0.7))
    late = share_late(load, servers, limit_s, backlog_s, after_s)
    assert 0 <= late <= 1 + 1e-9
    assert share_late(load, servers + 1, limit_s, backlog_s, after_s) <= late + 1e-9
    assert share_late(load, servers, limit_s + 1, backlog_s, after_s) <= late + 1e-9


def test_a_forecast_follows_a_ramp_and_never_falls_below_zero():
    up = Forecast(Smoothing(level_s=10.0))
    for i in range(40):
        up = up.seen(10.0 * i, 1.0 * i)
    assert 39 < up.ahead(20.0).mean < 41.5
    down = up
    for i in range(40, 80):
        down = down.seen(10.0 * i, 79.0 - i)
    assert down.ahead(1000.0).mean == 0.0


def test_the_cheapest_habit_holds_what_it_was_played_for():
    service = Service(2.0, 0.5)
    past = [Past(5.0, n := 30.0 if i % 40 < 3 else 1.0, 2.0 * n, (2,)) for i in range(200)]
    terms = Terms(slo_s=10.0, allowed_late=0.05, maximum=50, slots=1, lead_s=17.5)
    habit = cheapest(past, [Habit(0, 15.0, 15.0), Habit(0, 60.0, 5.0)], service, terms)
    assert play(past, habit, service, terms).late <= 0.05
    assert play(past, replace(habit, floor=habit.floor - 1), service, terms).late > 0.05
