"""The benches of placement: what they count, predict and call lost; the runs themselves are in `make test-slow`."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import placed, rebalance
from bench.errors import BenchError, ServiceError
from bench.placed import Counts, Effects, Row, Timing, evenly, figures, problem
from bench.profile import Times
from bench.rebalance import Answered, Move, Run, Trial, as_dict
from scaler.placement.plan import place
from scaler.placement.predict import predict
from scaler.placement.rebalance import Action, Decision, Reason
from scaler.placement.values import Goal, Layer, Link, Model, Workload

MIB = 2**20
TIER = Model([Layer(MIB)] * 12, 0, 0, 0, 0, 0)
WORK = Workload(8, 16, context=64, sessions=1)


def test_the_planned_cut_fills_quick_nodes_and_keeps_the_head_off_the_slow_one_and_the_even_one_knows_nothing():
    given = problem([Times(s, s / 10, s) for s in (1.0, 3.0, 9.0)], TIER, WORK, Link(0.1, 10_000), room=5)
    stages = place(given, Goal.LATENCY).stages
    assert [(s.nodes[0], s.layers) for s in stages] == [("node-0", "0-4"), ("node-2", "5-6"), ("node-1", "7-11")]
    assert [(s.nodes[0], s.layers) for s in evenly(given)] == [
        ("node-0", "0-3"), ("node-1", "4-7"), ("node-2", "8-11"),
    ]  # fmt: skip


def shards_that_keep_their_word(monkeypatch: pytest.MonkeyPatch, noise: Iterator[float]) -> list[list[str]]:
    """Nodes and cuts that take exactly what the arithmetic says, times `noise`, the same for all of one round."""
    asked: list[list[str]] = []
    round_of = {"noise": 1.0}

    @contextmanager
    def nodes(what):
        def look():
            round_of["noise"] = next(noise)
            return [Times(*(f * round_of["noise"] * ms for ms in (1.0, 0.1, 2.0))) for f in what.factors]

        yield look

    @contextmanager
    def running(_start, what, stages):
        asked.append([s.layers for s in stages])

        def ask():
            times = [Times(*(f * round_of["noise"] * ms for ms in (1.0, 0.1, 2.0))) for f in what.factors]
            given = problem(times, TIER, Workload(20, what.tokens, context=512, sessions=1), Link(0.4, 10_000), 12)
            says = predict(given, stages)
            return Timing(says.prompt_ms + 0.5, says.token_ms + 0.5, [0.8] * (len(stages) - 1), 0.5, 20)

        yield ask

    for name, fake in (("nodes", nodes), ("running", running), ("model", lambda _path: TIER)):
        monkeypatch.setattr(placed, name, fake)
    return asked


def test_predictions_of_shards_that_keep_their_word_are_right_whatever_the_machine_does(monkeypatch):
    asked = shards_that_keep_their_word(monkeypatch, itertools.cycle([1.0, 1.0, 2.0, 1.3, 5.0]))
    rows = placed.measure(None, Effects(Path("tier"), (1.0, 3.0), room=9, rounds=5, tokens=16), lambda *_: None)
    assert asked == [["0-8", "9-11"], ["0-5", "6-11"]]
    found = figures(rows)
    assert abs(found["prediction_error"]) < 1e-9
    assert found["planned_ms"] < found["even_ms"]
    assert found["ratio"] == found["even_ms"] / found["planned_ms"]
    assert found["planned"]["layers"] == {"node-0": "0-8", "node-1": "9-11"}


def test_the_largest_error_is_the_verdict_whatever_its_sign(capsys):
    stages = evenly(problem([Times(1, 1, 1)] * 2, TIER, WORK, Link(0.1, 1), room=9))
    good, late = (Row(stages, [Timing(100.0, 10.0, [1.0])] * 3) for _ in range(2))
    good.predicted, late.predicted = [(10.5, 100.0)] * 3, [(8.0, 110.0)] * 3
    found = figures({"planned": good, "even": late})
    assert found["prediction_error"] == pytest.approx(-0.2)
    placed.report(found, as_json=False)
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == found
    assert "planned: 0-5 on node-0, 6-11 on node-1" in out


def test_a_shards_page_is_read_as_far_as_it_is_of_use(monkeypatch):
    page = """
edgecascade_passes_total{node_id="a",shard_id="0-3"} 12.0
edgecascade_pass_seconds_total{node_id="a"} 0.5
edgecascade_link_steps_total{node_id="a"} 11.0
edgecascade_tokens_total{kind="completion",node_id="a"} 99.0
edgecascade_tokens_total{kind="prompt",node_id="a"} 7.0
"""
    monkeypatch.setattr(placed.httpx, "get", lambda *_args, **_rest: type("Page", (), {"text": page}))
    found = placed.counts("http://a")
    assert (found.passes, found.pass_s, found.links, found.prompt_tokens, found.steps) == (12.0, 0.5, 11.0, 7.0, 0.0)
    assert found.since(Counts(passes=2.0)).passes == 10.0


# ---- rebalance ----


def plan():
    return place(problem([Times(1, 0.1, 1)] * 3, TIER, WORK, Link(0.1, 1000), room=7), Goal.LATENCY)


def ran(latencies_ms, decided_at=3.0, slo_ms=1000.0):
    """Requests each second from 10 s before the fault on; latencies after it as given."""
    before, fault_s = [400.0] * 10, 110.0
    answers = [
        Answered(100.0 + n, 100.0 + n + ms / 1e3, answered=ms > 0) for n, ms in enumerate([*before, *latencies_ms])
    ]
    decision = Decision(Action.MOVE, Reason.NODE_SLOW, Reason.NODE_SLOW, "slow", plan())
    moves = [] if decided_at is None else [Move(fault_s + decided_at, decision)]
    return Run(Trial("throttle", Path("t")), "node-1", slo_ms, plan(), plan(), fault_s, moves, answers)


def test_recovery_is_several_answers_in_a_row_that_were_sent_after_the_decision():
    run = ran([3000, 3000, 500, 3000, 2000, *[600] * 8])
    assert (run.decided_s, run.recovered_s) == (3.0, pytest.approx(5.6))
    assert run.over_again == 0
    assert ran([3000] * 9).recovered_s is None
    assert ran([400] * 9, decided_at=None).recovered_s is None
    assert ran([3000, 3000, 3000, *[600] * 6, 1500, 600]).over_again == 1


def test_a_lost_request_is_one_without_an_answer():
    found = as_dict(ran([600, 0, *[600] * 9]))
    assert (found["sent"], found["answered"], found["lost"], found["failed"]) == (21, 20, 1, 0)
    assert found["reason"] == "node_slow"
    assert found["plan_before"] == {stage.nodes[0]: stage.layers for stage in plan().stages}


class FlakyClient:
    """Fails so often, then answers."""

    left = 0

    def __init__(self, url, timeout_s):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def stream(self, skill, messages, max_tokens):
        if FlakyClient.left:
            FlakyClient.left -= 1
            raise ServiceError("shards lost", 503)
        yield "text"
        yield placed_reply()


def placed_reply():
    from bench.client import reply

    return reply({"choices": [{"message": {"content": "text"}}]}, 1.0)


def test_who_gets_an_error_asks_again_until_its_deadline(monkeypatch):
    monkeypatch.setattr(rebalance, "Client", FlakyClient)
    monkeypatch.setattr(rebalance, "RETRY_S", 0.0)
    FlakyClient.left = 3
    found = rebalance.ask("http://x", 4)
    assert (found.answered, found.failures, set(found.errors)) == (True, 3, {"503"})
    FlakyClient.left = 99
    clock = itertools.count(0, 10)
    found = rebalance.ask("http://x", 4, clock=lambda: float(next(clock)))
    assert not found.answered
    assert found.failures > 1


def test_all_that_was_sent_is_waited_for():
    enough = threading.Event()
    numbers = itertools.count(1)

    def ask():
        if next(numbers) == 20:
            enough.set()
        return Answered(0.0, 1.0, answered=True)

    load = rebalance.Load(ask, rate=500.0)
    with load:
        assert enough.wait(60)
    assert len(load.answers) >= 20


def test_a_fault_is_named_rightly():
    assert [rebalance.check(name) for name in rebalance.FAULTS] == ["throttle", "kill"]
    with pytest.raises(BenchError, match="'flood' is unknown; use throttle or kill"):
        rebalance.check("flood")


def test_a_run_is_drawn(tmp_path):
    from bench.plot import rebalance as draw

    draw([ran([600] * 8), ran([900] * 8)], tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
