"""`bench autoscale`: what it sends, and what it makes of what came."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from bench.autoscale import SETTLED_S, WAKE_S, Figures, Plan, describe, figures, measure
from bench.flood import Answer
from bench.queries import Query
from bench.recording import Look, read_record
from tests.fakes import served

PLAN = Plan(low=0.5, high=4.0, seconds=60.0, after_s=30.0, slo_s=1.0)
LOOKS = [Look(0, 0, 0, 0), Look(5, 1, 1, 1), Look(60, 4, 3, 5), Look(150, 1, 1, 0)]


def answers(latency_s=0.5, status=200):
    return [Answer(t, t, t + latency_s, status) for t in PLAN.arrivals()]


def test_the_plan_is_one_request_then_low_high_low():
    times, (begins_s, ends_s) = PLAN.arrivals(), PLAN.step_s
    assert times == sorted(times)
    assert times[0] == WAKE_S
    assert 2.0 < sum(begins_s <= t < ends_s for t in times) / PLAN.seconds < 6.0
    assert sum(t >= ends_s for t in times) / PLAN.after_s < 1.5


def test_a_run_that_holds_passes():
    found = figures(PLAN, answers(), LOOKS)
    assert found.passed
    assert (found.failed, found.ready_before, found.ready_most, found.ready_after) == (0, 1, 3, 1)
    assert found.settled_p95_ms == pytest.approx(500)
    assert found.settled_requests == sum(PLAN.step_s[0] + SETTLED_S <= t < PLAN.step_s[1] for t in PLAN.arrivals())
    assert "0 failed" in describe(found)
    assert describe(found).endswith("passed")


@pytest.mark.parametrize(
    ("given", "looks"),
    [
        (answers(latency_s=2.0), LOOKS),
        ([*answers()[:-1], replace(answers()[-1], status=429)], LOOKS),
        ([*answers()[:-1], replace(answers()[-1], status=0)], LOOKS),
        (answers(), [*LOOKS[:-1], Look(150, 2, 2, 0)]),
        (answers(), [Look(0, 1, 1, 0), *LOOKS[1:]]),
        (answers(), [look for look in LOOKS if look.ready < 2]),
    ],
    ids=["late", "refused", "unanswered", "never back to one", "not from none", "never more than one"],
)
def test_a_run_that_does_not_hold_fails(given, looks):
    found = figures(PLAN, given, looks)
    assert not found.passed
    assert describe(found).endswith("FAILED")


def test_the_whole_bench_on_a_bundle_that_does_not_scale(tmp_path, capsys):
    asked = []

    def app(environ, start_response):
        asked.append(environ["PATH_INFO"])
        body = b"{}"
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    @contextmanager
    def autoscaled(variants, scaling):
        assert variants["device"].environment["SLOWDOWN"] == "20"
        line = {"time_s": 7.0, "wanted": 1, "ready": 1, "in_flight": None}
        scaling.record.write_text("".join(json.dumps({**line, "time_s": 7.0 + t}) + "\n" for t in range(3)))
        with served(app) as url:
            yield url

    plan = Plan(low=5.0, high=20.0, seconds=0.5, after_s=0.5)
    plot, record = tmp_path / "plot.png", tmp_path / "record.jsonl"
    queries = [Query("assistant", "wake me at six", "alarm", {})]
    measure(autoscaled, queries, plan, record, plot, as_json=True)
    found = Figures(**json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found.failed == 0
    assert found.requests == len(plan.arrivals()) == len(asked)
    assert set(asked) == {"/function/device/v1/chat/completions"}
    assert not found.passed, "nothing was scaled"
    assert plot.stat().st_size > 1000
    assert [look.at_s for look in read_record(record)] == [0.0, 1.0, 2.0]
