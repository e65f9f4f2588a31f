"""Placement against brute force, and what it says where there is no plan."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scaler.placement import bounded
from scaler.placement.costs import fixed_teams, tables
from scaler.placement.errors import InfeasibleError, NodesFileError
from scaler.placement.plan import place
from scaler.placement.predict import fault, predict
from scaler.placement.values import Goal, Layer, Link, Model, Node, Problem, Rule, Stage, Workload

WORK = Workload(prompt_tokens=6, answer_tokens=5, context=4, sessions=2)
KV = 2 * 4  # tokens held of each layer


def problem(nodes, n_layers=6, links=None, **rest):
    model = Model([Layer(100)] * n_layers, 50, 70, 30, 1, 64)
    joined = {(a.name, b.name): Link(1.0, 1.0) for a in nodes for b in nodes if a != b} if links is None else links
    return Problem(nodes, joined, rest.pop("model", model), rest.pop("workload", WORK), **rest)


def node(name, memory=10_000, speed=1.0, **rest):
    return Node(name, memory, 1.0 / speed, 0.25 / speed, 0.5 / speed, **rest)


@st.composite
def problems(draw, replicas=1):
    """Up to five nodes, some alike, up to six layers, links that may be missing, pins and exclusions."""
    kinds = draw(st.lists(st.tuples(st.integers(100, 700), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=3))
    n_nodes = draw(st.integers(1, 4 if replicas > 1 else 5))
    chosen = [draw(st.sampled_from(kinds)) for _ in range(n_nodes)]
    nodes = [node(f"n{i}", *kind) for i, kind in enumerate(chosen)]
    some = st.sampled_from([Link(1.0, 1.0), Link(0.1, 0.2), Link(5.0, 10.0), None])
    uniform = draw(some) if draw(st.booleans()) else False
    links = {}
    for a, b in itertools.permutations(nodes, 2):
        link = draw(some) if uniform is False else uniform
        if link:
            links[a.name, b.name] = link
    layers = draw(
        st.lists(st.builds(Layer, st.integers(20, 120), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=6)
    )
    rule = st.builds(
        lambda name, a, n: Rule(name, range(a, min(a + n, len(layers)))),
        st.sampled_from([n.name for n in nodes]),
        st.integers(0, len(layers) - 1),
        st.integers(1, 2),
    )
    return Problem(
        nodes, links, Model(layers, 40, 60, 30, 1, 64), WORK,
        pins=draw(st.lists(rule, max_size=2)) if draw(st.booleans()) else (),
        exclusions=draw(st.lists(rule, max_size=2)) if draw(st.booleans()) else (),
        replicas=replicas,
    )  # fmt: skip


def every_plan(given_problem):
    """All assignments that hold; shares nothing with the searches."""
    names, n_layers = [n.name for n in given_problem.nodes], given_problem.model.n_layers
    size = given_problem.replicas
    for n_stages in range(1, min(len(names) // size, n_layers) + 1):
        for cuts in itertools.combinations(range(1, n_layers), n_stages - 1):
            edges = [0, *cuts, n_layers]
            for teams in teams_of(names, size, n_stages):
                stages = [Stage(t, a, b) for t, a, b in zip(teams, edges, edges[1:], strict=False)]
                if holds(given_problem, stages):
                    yield stages


def teams_of(names, size, n_stages):
    if not n_stages:
        yield ()
        return
    for team in itertools.combinations(names, size):
        for rest in teams_of([name for name in names if name not in team], size, n_stages - 1):
            yield (team, *rest)


def holds(p, stages):
    by_name, on = {n.name: n for n in p.nodes}, {}
    for s in stages:
        for name in s.nodes:
            needed = sum(layer.size_bytes + KV for layer in p.model.layers[s.first : s.stop])
            needed += 40 * (s.first == 0) + 60 * (s.stop == p.model.n_layers) - 30 * (len(stages) == 1)
            if needed > by_name[name].memory_bytes:
                return False
            on |= {(layer, name): True for layer in range(s.first, s.stop)}
    for one, other in itertools.pairwise(stages):
        if any((a, b) not in p.links or (b, a) not in p.links for a in one.nodes for b in other.nodes):
            return False
    if any((layer, r.node) not in on for r in p.pins for layer in r.layers):
        return False
    return not any((layer, r.node) in on for r in p.exclusions for layer in r.layers)


def parts(p, stages):
    """One request: milliseconds on each stage and hop, and how long each is busy."""
    by_name, answers, passes = {n.name: n for n in p.nodes}, WORK.answer_tokens, WORK.answer_tokens - 1
    for s in stages:
        work = sum(layer.work for layer in p.model.layers[s.first : s.stop])
        times = []
        for name in s.nodes:
            n = by_name[name]
            time = work * (WORK.prompt_tokens * n.prefill_ms + passes * n.decode_ms)
            times.append(time + (answers * n.head_ms if s.stop == p.model.n_layers else 0))
        yield max(times), max(times) / p.replicas
    for one, other in itertools.pairwise(stages):
        pairs = [(p.links[a, b], p.links[b, a]) for a in one.nodes for b in other.nodes]
        busy = [(WORK.prompt_tokens + passes) * 64 * 8 / (there.mbit_per_s * 1000) for there, _ in pairs]
        waits = [
            b + answers * (there.latency_ms + back.latency_ms) for b, (there, back) in zip(busy, pairs, strict=True)
        ]
        yield max(waits), max(busy) / p.replicas


def best_of(p, goal):
    costs = [list(zip(*parts(p, stages), strict=True)) for stages in every_plan(p)]
    if goal is Goal.LATENCY:
        return min((sum(latencies) for latencies, _ in costs), default=math.inf)
    return min((max(busy) for _, busy in costs), default=math.inf)


def cost_of(p, goal, stages):
    latencies, busy = zip(*parts(p, stages), strict=True)
    return sum(latencies) if goal is Goal.LATENCY else max(busy)


@given(problems(), st.sampled_from(Goal))
@settings(max_examples=300)
def test_a_plan_is_as_good_as_any(p, goal):
    check_against_brute_force(p, goal)


@given(problems(replicas=2), st.sampled_from(Goal))
@settings(max_examples=100)
def test_a_plan_with_replicas_is_as_good_as_any(p, goal):
    check_against_brute_force(p, goal)


def check_against_brute_force(p, goal):
    wanted = best_of(p, goal)
    if wanted == math.inf:
        with pytest.raises(InfeasibleError):
            place(p, goal)
        return
    plan = place(p, goal)
    assert plan.cost_ms == pytest.approx(wanted)
    assert plan.gap == 0
    assert plan.method.startswith("exact")
    assert holds(p, plan.stages)
    assert not fault(p, plan.stages)
    assert cost_of(p, goal, plan.stages) == pytest.approx(wanted)


@given(problems())
@settings(max_examples=100)
def test_of_plans_with_the_best_throughput_the_quickest_is_chosen(p):
    plans = list(every_plan(p))
    assume(plans)
    least = min(cost_of(p, Goal.THROUGHPUT, stages) for stages in plans)
    good = [s for s in plans if cost_of(p, Goal.THROUGHPUT, s) <= least * (1 + 1e-9)]
    chosen = place(p, Goal.THROUGHPUT).stages
    assert cost_of(p, Goal.LATENCY, chosen) == pytest.approx(min(cost_of(p, Goal.LATENCY, s) for s in good))


@given(problems(), st.sampled_from(Goal))
@settings(max_examples=150)
def test_the_bounded_search_keeps_its_word(p, goal):
    """Its plans hold, none is better than the best, and its bound is not above it."""
    teams = fixed_teams(p, tables(p), [[n] for n in range(len(p.nodes))])
    wanted = best_of(p, goal)
    if goal is Goal.LATENCY:
        cost, chain, bound = bounded.shortest(teams)
    else:
        (cost, chain), bound = bounded.widest(teams), bounded.least_bottleneck(teams)
    assert bound <= wanted * (1 + 1e-9)
    assert cost >= wanted * (1 - 1e-9)
    if chain:
        stages = [Stage((p.nodes[t].name,), a, b) for t, a, b in chain]
        assert holds(p, stages)
        assert cost_of(p, goal, stages) == pytest.approx(cost)


@given(problems())
@settings(max_examples=100)
def test_a_prediction_adds_up(p):
    stages = next(iter(every_plan(p)), None)
    assume(stages)
    found = predict(p, stages)
    assert found.request_ms == pytest.approx(cost_of(p, Goal.LATENCY, stages))
    assert found.request_ms == pytest.approx(found.prompt_ms + (WORK.answer_tokens - 1) * found.token_ms)
    assert found.bottleneck_ms == pytest.approx(cost_of(p, Goal.THROUGHPUT, stages))


def test_pieces_of_a_long_prompt_overlap():
    nodes = [node("a", 500), node("b", 500)]
    whole = problem(nodes, workload=replace(WORK, prompt_tokens=100, chunk_tokens=100))
    pieces = replace(whole, workload=replace(whole.workload, chunk_tokens=10))
    stages = [Stage(("a",), 0, 3), Stage(("b",), 3, 6)]
    assert predict(pieces, stages).prompt_ms < predict(whole, stages).prompt_ms
    a_piece = 10 * 3 * 0.25
    link_ms = 10 * 64 * 8 / 1000
    assert predict(pieces, stages).prompt_ms == pytest.approx(2 * a_piece + link_ms + 2.0 + 0.5 + 9 * a_piece)


def test_alike_nodes_are_one_class_and_make_large_fleets_exact():
    nodes = [node(f"n{i}", 700, 1.0 + i % 2) for i in range(40)]
    plan = place(problem(nodes, 60), Goal.THROUGHPUT)
    assert plan.method == "exact, 2 classes of nodes"
    assert len({name for stage in plan.stages for name in stage.nodes}) == len(plan.stages)


def test_sixty_four_different_nodes_and_eighty_layers():
    draws = random.Random(3)
    nodes = [Node(f"n{i}", draws.randint(300, 1500), draws.uniform(0.1, 0.6), 0.02, 0.5) for i in range(64)]
    links = {
        pair: Link(draws.uniform(0.2, 5), draws.uniform(1, 50))
        for pair in itertools.permutations((n.name for n in nodes), 2)
    }
    p = problem(nodes, 80, links)
    for goal in Goal:
        plan = place(p, goal)
        assert plan.method == "bounded"
        assert not fault(p, plan.stages)
        assert 0 <= plan.gap < 0.25
        assert plan.cost_ms == pytest.approx(
            plan.prediction.request_ms if goal is Goal.LATENCY else plan.prediction.bottleneck_ms
        )


def test_replicas_beyond_the_exact_search():
    draws = random.Random(4)
    nodes = [Node(f"n{i}", draws.randint(900, 1500), draws.uniform(0.1, 0.6), 0.02, 0.5) for i in range(31)]
    p = problem(nodes, 20, replicas=2)
    for goal in Goal:
        plan = place(p, goal)
        assert plan.method == "bounded"
        assert all(len(stage.nodes) == 2 for stage in plan.stages)
        assert not fault(p, plan.stages)
        assert plan.gap < 1


def test_pins_and_exclusions_hold():
    nodes = [node("a"), node("b", speed=0.1), node("c")]
    pinned = place(problem(nodes, pins=[Rule("b", range(2, 4))]), Goal.LATENCY)
    assert pinned.by_node["b"] == range(2, 4)
    assert "a" not in place(problem(nodes, exclusions=[Rule("a", range(6)), Rule("b", range(6))]), Goal.LATENCY).by_node


def test_the_plan_says_why():
    nodes = [node("small", 360, speed=4.0), node("large", 10_000, speed=0.2), node("tiny", 10)]
    plan = place(problem(nodes), Goal.LATENCY)
    said = "\n".join(plan.why)
    assert "tiny is left out: it may or can run no layer" in said
    assert "small is full" in said
    assert "the even cut over these nodes" in said
    assert "small alone cannot be" in said


@pytest.mark.parametrize(
    ("nodes", "rest", "says"),
    [
        ([node("a", 300), node("b", 300)], {}, "MiB are missing; add a node, or lower sessions or context"),
        ([node(f"n{i}", 120) for i in range(9)], {}, "layer 0 takes .* and 0 of the nodes"),
        ([node("a", 400), node("b", 400)], {"links": {}}, "not cut into one run"),
        ([node("a", 340), node("b", 340), node("c", 150)], {}, "there is no plan: memory would do in sum"),
        ([node("a"), node("b")], {"pins": [Rule("a", range(1)), Rule("b", range(1))]}, "layer 0 is pinned to a and b"),
        (
            [node("a"), node("b")],
            {"pins": [Rule("a", range(1))], "exclusions": [Rule("a", range(3))]},
            "both pinned to 'a' and excluded",
        ),
        ([node("a")], {"replicas": 2}, "2 replicas need as many nodes, and there are 1"),
        ([node("a"), node("b", 10)], {"replicas": 2}, "1 of the nodes may and can run it, where 2 must"),
    ],
)
def test_what_is_missing_is_said(nodes, rest, says):
    for goal in Goal:
        with pytest.raises(InfeasibleError, match=says):
            place(problem(nodes, **rest), goal)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"nodes": [node("a"), node("a")]}, "two nodes are called 'a'"),
        ({"links": {("a", "x"): Link(1, 1)}}, "a link names the node 'x'"),
        ({"pins": [Rule("x", range(1))]}, "a pin names the node 'x'"),
        ({"exclusions": [Rule("a", range(5, 9))]}, "layers 5-8 of 'a' are not some of the layers 0-5"),
    ],
)
def test_parts_that_do_not_fit_are_refused(values, says):
    values = {"nodes": [node("a"), node("b")], **values}
    with pytest.raises(NodesFileError, match=says):
        problem(**values)


def test_a_plan_that_cannot_be_is_not_predicted():
    p = problem([node("a", 400), node("b", 400)])
    for stages, says in [
        ([Stage(("a",), 0, 5)], "do not make up layers 0-5"),
        ([Stage(("a",), 0, 3), Stage(("a",), 3, 6)], "has two ranges"),
        ([Stage(("a",), 0, 3), Stage(("x",), 3, 6)], "the node 'x' is not there"),
        ([Stage(("a",), 0, 4), Stage(("b",), 4, 6)], "'a' has"),
    ]:
        with pytest.raises(InfeasibleError, match=says):
            predict(p, stages)


def test_energy_is_told_where_every_node_states_its_power():
    nodes = [node("a", 500, watts=5.0), node("b", 500, watts=2.0)]
    assert place(problem(nodes), Goal.LATENCY).prediction.joules_per_token == pytest.approx((3 * 5 + 3.5 * 2) / 1000)
    assert place(problem([nodes[0], node("b", 500)]), Goal.LATENCY).prediction.joules_per_token is None
