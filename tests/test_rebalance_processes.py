"""The whole story with real processes and a tiny tier: a node under load gets slow, or dies; nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import pytest

import edgecascade
from bench.bundle import Placed, Placing
from bench.profile import model
from bench.rebalance import Load, ask
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from scaler.placement.rebalance import Action, Decision, Policy, Reason
from scaler.placement.values import Link, Node, Problem, Workload
from tests.fakes import wait_until
from tests.tiny_models import SHAPE, quiet, write_gguf

POLICY = Policy(silent_s=1.0, slow_factor=4.0, interval_s=5.0, least_link_ms=1e6, least_gain=0.3)
# Far slower than a tiny tier is here, so that what else this machine does is not taken for a slow node; a throttled one
# is slower than that by far.
NODE_MS, THROTTLED = 2.0, 400.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tier")
    build(GgufSource(write_gguf(folder / "tiny.gguf")), folder / "tier", "int4", None, quiet)
    return folder / "tier"


def problem(path: Path, replicas: int = 1) -> Problem:
    """Nodes alike, each with room for two of the three layers; one more set than is needed."""
    tier = model(path)
    size = 2 * max(layer.size_bytes for layer in tier.layers) + tier.first_bytes + tier.last_bytes
    names = [f"n{number}" for number in range(3 * replicas)]
    nodes = [Node(name, size + 2 * tier.kv_bytes * 64, NODE_MS, NODE_MS / 10) for name in names]
    links = dict.fromkeys(permutations(names, 2), Link(1.0, 10_000))
    return Problem(nodes, links, tier, Workload(8, 16, context=64, sessions=1), replicas=replicas)


@contextmanager
def placed(path: Path, told: list[Decision], moved: threading.Event, replicas: int = 1) -> Iterator[Placed]:
    def note(decision: Decision) -> None:
        told.append(decision)
        if decision.action is Action.MOVE:
            moved.set()

    environment = {"MODEL_PATH": str(path), "THREADS": "1"}
    given = problem(path, replicas)
    with edgecascade._placed(Placing(given, POLICY, {}, environment, note)) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "reason"), [("throttle", Reason.NODE_SLOW), ("kill", Reason.NODE_SILENT)])
def test_a_node_in_trouble_is_left_and_no_request_is_lost(path: Path, fault: str, reason: Reason) -> None:
    told: list[Decision] = []
    moved = threading.Event()
    with placed(path, told, moved) as running:
        victim = running.plan.stages[-1].nodes[0]
        load = Load(lambda: ask(running.url, 16), rate=1.0)
        with load:
            wait_for_answers(running.url, 3)
            running.kill(victim) if fault == "kill" else running.throttle(victim, THROTTLED)
            assert moved.wait(120)
            wait_until_left(running, victim)
            wait_for_answers(running.url, 3)
        decision = next(d for d in told if d.action is Action.MOVE)
        assert decision.reason is reason
        assert [layer for s in running.plan.stages for layer in range(s.first, s.stop)] == list(range(SHAPE.n_layers))
    assert all(answer.answered for answer in load.answers)
    if fault == "throttle":
        errors = [error for answer in load.answers for error in answer.errors]
        assert errors == [], "the second chain was ready before the first went"


@pytest.mark.slow
def test_with_two_nodes_for_each_range_a_killed_one_fails_no_request(path: Path) -> None:
    told: list[Decision] = []
    moved = threading.Event()
    with placed(path, told, moved, replicas=2) as running:
        victim = running.plan.stages[-1].nodes[0]
        load = Load(lambda: ask(running.url, 16), rate=1.0)
        with load:
            wait_for_answers(running.url, 3)
            running.kill(victim)
            assert moved.wait(120)
            wait_until_left(running, victim)
            wait_for_answers(running.url, 3)
        assert all(len(stage.nodes) == 2 for stage in running.plan.stages)
    assert load.answers
    assert all(answer.answered and not answer.failures for answer in load.answers)


def wait_for_answers(url: str, count: int) -> None:
    assert all(ask(url, 16).answered for _ in range(count))


def wait_until_left(running: Placed, node: str) -> None:

    wait_until(lambda: node not in running.plan.by_node, timeout_s=120)
