"""The simulator: closed forms, the HPA's rules, traces, tuning, fleets."""

import csv
import json
import math
import random
import statistics
from itertools import accumulate

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench.errors import BenchError, TraceFileError
from bench.simulate import arrivals
from bench.simulate.arrivals import Arrival, Trace
from bench.simulate.fleet import Fleet, Plan
from bench.simulate.hpa import Hpa
from bench.simulate.policies import Fixed
from bench.simulate.pool import Job, Pool
from bench.simulate.report import traces
from bench.simulate.scale import Machine, Setting, Site, run
from bench.simulate.tier import Requests, Tier
from bench.simulate.tune import cost_at, grids, hull, late_at, tuned, verdict
from edgecascade import app
from scaler.queueing import chance_to_wait
from scaler.values import Target


def pool_waits(servers, rate, service, rng, count):
    """Waits of `count` Poisson arrivals on simpy's clock; `service` draws from a random generator."""
    env = simpy.Environment()
    pool = Pool(env, 1, 0.0)
    pool.start(servers, warm=True)
    waits = []

    def arrive(_):
        if len(waits) < count:
            pool.submit(Job(env.now, service(rng), then=lambda job: waits.append(job.begun_s - job.at_s)))
            env.timeout(rng.expovariate(rate)).callbacks.append(arrive)

    env.timeout(0).callbacks.append(arrive)
    env.run()
    return waits


def tier_waits(servers, rate, service, rng, count):
    """The same without a calendar."""
    at_s = list(accumulate(rng.expovariate(rate) for _ in range(count)))
    requests = Requests(at_s, [service(rng) for _ in range(count)], [0] * count)
    tier = Tier(requests, 1, 0.0)
    tier.start(servers, warm=True)
    tier.run(math.inf)
    rows = zip(at_s, requests.service_s, tier.done_s, strict=True)
    return [done_s - taken_s - came_s for came_s, taken_s, done_s in rows]


def mean_wait(waits, count, servers, rate, service, seeds):
    return statistics.fmean(
        statistics.fmean(waits(servers, rate, service, random.Random(seed), count)) for seed in range(seeds)
    )


@pytest.mark.parametrize(("waits", "count"), [(pool_waits, 60_000), (tier_waits, 240_000)])
def test_an_m_m_c_queue_waits_as_erlang_says(waits, count):
    servers, rate = 4, 2.8
    expected = chance_to_wait(servers, rate) / (servers - rate)
    found = mean_wait(waits, count, servers, rate, lambda r: r.expovariate(1.0), 8)
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("waits", "count"), [(pool_waits, 60_000), (tier_waits, 240_000)])
def test_an_m_d_1_queue_waits_as_pollaczek_and_khinchine_say(waits, count):
    expected = 0.6 / (2 * (1 - 0.6))
    assert mean_wait(waits, count, 1, 0.6, lambda _: 1.0, 5) == pytest.approx(expected, rel=0.02)


@given(
    st.lists(st.tuples(st.floats(0.01, 3.0), st.floats(0.01, 20.0)), max_size=60),
    st.lists(st.integers(-4, 4), min_size=1, max_size=15),
    st.integers(1, 3),
)
@settings(deadline=None)
def test_a_tier_is_a_pool_without_a_calendar(gaps, changes, slots):
    """Polls every 10 s start and stop replicas: both serve each request at the same time, at the same cost."""
    at_s = list(accumulate(gap_s + 1e-4 for gap_s, _ in gaps))
    service_s = [seconds for _, seconds in gaps]
    env = simpy.Environment()
    pool, tier = Pool(env, slots, 7.3), Tier(Requests(at_s, service_s, [0] * len(at_s)), slots, 7.3)
    jobs = [Job(*one) for one in zip(at_s, service_s, strict=True)]
    for job in jobs:
        env.timeout(job.at_s, job).callbacks.append(lambda event: pool.submit(event.value))
    pool.start(1, warm=True)
    tier.start(1, warm=True)
    for number, change in enumerate(changes, 1):
        env.run(10.0 * number)
        tier.run(10.0 * number)
        pool.count()
        assert (tier.queued, tier.running, tier.ready) == (len(pool.queue), pool.running, pool.ready)
        assert (tier.replica_s, tier.busy_s) == pytest.approx((pool.replica_s, pool.busy_s))
        for side in (pool, tier):
            if change > 0:
                side.start(change)
            else:
                side.stop(min(-change, len(side.replicas) - 1))
    env.run()
    tier.run(1e6)
    assert tier.done_s == pytest.approx([job.done_s for job in jobs])


def test_replicas_start_late_stop_softly_and_die_hard():
    env = simpy.Environment()
    pool = Pool(env, 1, 10.0)
    pool.start(1, warm=True)
    pool.start(1)
    jobs = [Job(0.0, 20.0) for _ in range(3)]
    for job in jobs:
        pool.submit(job)
    env.run(11.0)
    assert [job.begun_s for job in jobs] == [0.0, 10.0, -1.0]
    pool.stop(1)
    assert len(pool.replicas) == 1
    env.run(31.0)
    assert jobs[1].done_s == 30.0
    assert jobs[2].begun_s == 20.0
    pool.count()
    assert pool.replica_s == pytest.approx(31 + 30)
    assert pool.lose(0) == [jobs[2]]
    assert pool.in_flight == 0


def test_the_hpa_swallows_a_tenth_and_holds_what_it_had():
    hpa = Hpa(1, 50, 0.1, stabilisation_s=60.0)
    assert hpa.replicas(0.0, 13.0, 12) == 12
    assert hpa.replicas(30.0, 13.3, 12) == 14
    assert hpa.replicas(45.0, 3.0, 14) == 14
    assert hpa.replicas(80.0, 3.0, 14) == 14
    assert hpa.replicas(200.0, 3.0, 14) == 3
    assert hpa.replicas(215.0, 900.0, 3) == 50


def test_a_trace_is_read_scaled_and_refused(tmp_path):
    file = tmp_path / "t.csv"
    rows = [("2023-11-16 18:15:46.6805900", 374, 44), ("2023-11-16 18:15:48.6805900", 10, 5)]
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([arrivals.COLUMNS, *rows])
    trace = arrivals.read(file)
    assert trace.arrivals == [Arrival(0.0, 374, 44), Arrival(2.0, 10, 5)]
    assert len(arrivals.scaled(trace, 3).arrivals) == 6
    assert all(0 <= a.at_s < trace.length_s for a in arrivals.scaled(trace, 2.5).arrivals)
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,1,2\nsoon,3,4\n")
    with pytest.raises(TraceFileError, match="line 3"):
        arrivals.read(file)
    file.write_text("when,what\n")
    with pytest.raises(TraceFileError, match="no column TIMESTAMP"):
        arrivals.read(file)
    with pytest.raises(BenchError, match="neither a file nor one of"):
        traces(["tides"], [1.0], 1.0, 60.0, 0)


@pytest.mark.parametrize("name", arrivals.GENERATORS)
def test_generated_traces_are_ordered_and_repeat(name):
    trace = arrivals.GENERATORS[name](3.0, 900.0, 5)
    times = [a.at_s for a in trace.arrivals]
    assert times == sorted(times)
    assert trace == arrivals.GENERATORS[name](3.0, 900.0, 5)
    assert 900 < len(times) < 8000


def test_an_outcome_counts_requests_cost_and_joules():
    trace = Trace("three", [Arrival(t, 100, 0) for t in (1.0, 1.0, 1.0)], 100.0)
    site = Site(Target(1.5, 0.95, 1, 10), Machine(reads_per_s=100.0, idle_watts=2.0, busy_watts=5.0))
    outcome = run(trace, site, Setting("fixed", (), lambda _: Fixed(1)))
    assert (outcome.requests, outcome.late) == (3, 2)
    assert outcome.replica_s == pytest.approx(100.0)
    assert outcome.joules == pytest.approx(2.0 * 100 + 3.0 * 3)


def test_a_hull_is_read_both_ways():
    points = hull([(10, 0.5), (20, 0.1), (15, 0.5), (30, 0.0), (40, 0.2)])
    assert points == [(10, 0.5), (20, 0.1), (30, 0.0)]
    assert late_at(points, 15) == pytest.approx(0.3)
    assert late_at(points, 5) is None
    assert late_at(points, 99) == 0.0
    assert cost_at(points, 0.05) == pytest.approx(25)
    assert cost_at(points, 0.9) == 10
    assert cost_at([(10, 0.5), (20, 0.1)], 0.01) is None


def test_tuning_sees_the_first_half_alone():
    """The same settings are found when the second half is another one."""
    site = Site(Target(6.0, 0.95, 1, 40))
    trace = arrivals.bursts(2.0, 300.0, 3)
    half = trace.first_half()
    other = Trace("other", half.arrivals, 300.0)
    for name in ("fixed", "HPA on CPU"):
        one, two = tuned(name, trace, site), tuned(name, other, site)
        assert [s.setting for s in one.first] == [s.setting for s in two.first]
        assert one.chosen == two.chosen
        assert one.second != two.second


def test_all_policies_run_and_are_judged():
    site = Site(Target(6.0, 0.95, 1, 40))
    trace = arrivals.flash(1.0, 300.0, 4)
    found = {name: tuned(name, trace, site) for name in grids(trace, site)}
    judged = verdict(found)
    assert 0 <= judged.late <= 1
    assert judged.replica_s > 0
    oracle = found["oracle"].second[-1].outcome
    assert oracle.violations <= 0.25


def test_a_small_fleet_answers_every_request_and_survives_losses():
    plan = Plan(devices=60, sites=2, nodes=2, length_s=7200.0, requests_a_day=400.0, losses_a_day=24.0)
    figures = Fleet(plan).run()
    assert figures["requests"] > 200
    assert sum(figures["routes"].values()) == figures["requests"]
    assert figures["in_time"] == 1.0
    assert figures["nodes_lost"] > 0
    assert figures["edge_joules"] > 0
    assert figures == Fleet(plan).run() | {"cpu_s": figures["cpu_s"]}


def test_empty_batteries_stop_nodes_and_devices_fall_back():
    plan = Plan(
        devices=40,
        sites=1,
        nodes=2,
        length_s=7200.0,
        requests_a_day=600.0,
        on_battery=1.0,
        node_battery_j=3000.0,
        device_battery_j=2000.0,
        losses_a_day=0.0,
    )
    figures = Fleet(plan).run()
    assert figures["nodes_drained"] == 2
    assert figures["reasons"]["edge_unavailable"] > 0
    assert figures["reasons"]["battery"] > 0


def test_the_command_prints_json_and_draws(tmp_path):
    plot = tmp_path / "frontiers.svg"
    arguments = ["simulate", "steady", "--rate", "1", "--seconds", "120", "--slo", "6", "--max-replicas", "20"]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(plot), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["traces"][0]
    assert set(found["policies"]) == {
        "fixed",
        "HPA on CPU",
        "KEDA on p95",
        "concurrency",
        "KEDA on queue",
        "ours",
        "oracle",
    }
    assert plot.stat().st_size > 1000
