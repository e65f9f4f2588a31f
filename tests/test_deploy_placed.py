"""Shards as processes where a plan has them: the second chain is ready before the first one goes."""

import json
import signal
from dataclasses import dataclass, field

import pytest

from deploy.errors import StackError
from deploy.local import placed
from deploy.local.placed import Chain, Limits, factors
from scaler.placement.errors import ApplyError
from scaler.placement.plan import place
from scaler.placement.values import Goal, Plan, Stage
from tests.test_placement_watch import problem

PREDICTION = place(problem(), Goal.LATENCY).prediction


def plan(*stages):
    made = tuple(Stage(nodes.split("+"), first, stop) for nodes, first, stop in stages)
    made = tuple(Stage(tuple(stage.nodes), stage.first, stage.stop) for stage in made)
    return Plan(Goal.LATENCY, made, PREDICTION, 1.0, 1.0, "by hand")


@dataclass
class FakeProcess:
    """A process in name; what is done to it is written down."""

    name: str
    diary: list
    pid: int = 0
    exit_code: int | None = None

    def ask_to_stop(self):
        self.diary.append(("stop", self.name))

    def wait(self, _timeout_s):
        self.exit_code = 0


@dataclass
class Rig:
    """A chain of such processes; `broken` are nodes whose processes end before they are ready."""

    folder: object
    diary: list = field(default_factory=list)
    told: dict = field(default_factory=dict)
    broken: set = field(default_factory=set)

    def __post_init__(self):
        ports = iter(range(7001, 7100))
        self.chain = Chain("edge", self.spawn, lambda: next(ports), self.folder / "replicas.json", Limits(5.0, 1.0))

    def spawn(self, name, environment):
        self.diary.append(("start", name))
        self.told[name] = environment
        process = FakeProcess(name, self.diary, exit_code=1 if environment["NODE_ID"] in self.broken else None)
        return process, f"http://{name}"

    def heads(self):
        return [r["address"] for r in json.loads((self.folder / "replicas.json").read_text())["edge"]["replicas"]]


@pytest.fixture
def rig(tmp_path, monkeypatch):
    monkeypatch.setattr(placed, "SETTLE_S", 0.0)
    made = Rig(tmp_path)

    def ready(_client, running):
        made.diary.append(("ready", running.process.name))
        return running.process.exit_code is None

    monkeypatch.setattr(placed, "_is_ready", ready)
    return made


def events(rig, kind):
    return [name for what, name in rig.diary if what == kind]


def test_shards_start_from_the_last_and_know_the_next(rig):
    rig.chain.apply(plan(("a", 0, 5), ("b+c", 5, 12)))
    assert events(rig, "start") == ["edge-b-1", "edge-c-2", "edge-a-3"]
    head, b = rig.told["edge-a-3"], rig.told["edge-b-1"]
    assert (head["SHARD_LAYERS"], head["NODE_ID"], "SHARD_LISTEN" in head) == ("0-4", "a", False)
    assert head["SHARD_NEXT"] == "127.0.0.1:7001,127.0.0.1:7002"
    assert (b["SHARD_LAYERS"], b["SHARD_LISTEN"], "SHARD_NEXT" in b) == ("5-11", "7001", False)
    assert b["SLOWDOWN_FILE"] == str(rig.chain.slowdown_file("b"))
    assert rig.heads() == ["http://edge-a-3"]
    assert [(p.node, p.address) for p in rig.chain.shards()] == [
        ("b", "http://edge-b-1"), ("c", "http://edge-c-2"), ("a", "http://edge-a-3"),
    ]  # fmt: skip


def test_the_new_chain_is_ready_before_the_old_head_stops_and_the_old_shards_go_last(rig):
    first, then = plan(("a", 0, 5), ("b", 5, 12)), plan(("a", 0, 8), ("c", 8, 12))
    rig.chain.apply(first)
    rig.diary.clear()
    rig.chain.apply(then)
    assert rig.diary == [
        ("start", "edge-c-3"), ("start", "edge-a-4"),
        ("ready", "edge-c-3"), ("ready", "edge-a-4"),
        ("stop", "edge-a-2"), ("stop", "edge-b-1"),
    ]  # fmt: skip
    assert rig.heads() == ["http://edge-a-4"]
    assert not rig.chain.drifted(then)
    assert rig.chain.drifted(first)


def test_what_both_plans_have_alike_goes_on(rig):
    rig.chain.apply(plan(("a", 0, 5), ("b", 5, 12)))
    rig.diary.clear()
    rig.chain.apply(plan(("c", 0, 5), ("b", 5, 12)))
    assert events(rig, "start") == ["edge-c-3"]
    assert events(rig, "stop") == ["edge-a-2"]
    rig.diary.clear()
    rig.chain.apply(plan(("c", 0, 5), ("b", 5, 12)))
    assert events(rig, "start") == events(rig, "stop") == []


def test_a_process_that_died_is_started_anew(rig):
    same = plan(("a", 0, 5), ("b", 5, 12))
    rig.chain.apply(same)
    next(r for r in rig.chain._running if r.part.node == "b").process.exit_code = -9
    rig.chain.apply(same)
    assert events(rig, "start") == ["edge-b-1", "edge-a-2", "edge-b-3", "edge-a-4"]


def test_where_a_shard_does_not_start_the_old_chain_goes_on(rig):
    first = plan(("a", 0, 5), ("b", 5, 12))
    rig.chain.apply(first)
    rig.diary.clear()
    rig.broken = {"c"}
    with pytest.raises(ApplyError, match="edge-c-3 ended before it was ready"):
        rig.chain.apply(plan(("a", 0, 8), ("c", 8, 12)))
    assert set(events(rig, "stop")) == {"edge-c-3", "edge-a-4"}
    assert rig.heads() == ["http://edge-a-2"]
    assert not rig.chain.drifted(first)


def test_a_plan_of_one_node_runs_the_tier_as_it_is(rig):
    rig.chain.apply(plan(("a", 0, 12)))
    assert set(rig.told["edge-a-1"]) == {"NODE_ID", "SLOWDOWN_FILE"}
    rig.chain.stop()
    assert events(rig, "stop") == ["edge-a-1"]
    assert rig.chain.shards() == []


def test_a_node_is_killed_with_all_it_runs(rig, monkeypatch):
    killed = []
    monkeypatch.setattr("os.killpg", lambda group, number: killed.append((group, number)))
    rig.chain.apply(plan(("a", 0, 5), ("b", 5, 12)))
    for number, running in enumerate(rig.chain._running):
        running.process.pid = 100 + number
    assert rig.chain.kill("b") == 1
    assert killed == [(100, signal.SIGKILL)]
    assert rig.chain.kill("z") == 0


def test_how_slow_nodes_are_is_read_strictly():
    assert factors(["a=3", "b=1.5"], ["a", "b"]) == {"a": 3.0, "b": 1.5}
    for text in ("c=3", "a=0.5", "a=x", "a", "a=-2"):
        with pytest.raises(StackError, match="is not a node and a factor"):
            factors([text], ["a", "b"])
