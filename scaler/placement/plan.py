"""Place a model: choose the search that fits, and name the nodes of what it finds."""

from __future__ import annotations

import math
from dataclasses import replace

from scaler.placement import bounded, exact, reasons
from scaler.placement.costs import Tables, Teams, all_teams, cells, classes, fixed_teams, tables
from scaler.placement.errors import InfeasibleError
from scaler.placement.exact import Chain
from scaler.placement.predict import predict
from scaler.placement.values import Goal, Plan, Problem, Stage


def place(problem: Problem, goal: Goal) -> Plan:
    """The best plan found, proven best where it says 'exact'; raises `InfeasibleError`, which says what is missing.

    `latency` minimises one request's time when nothing else runs (its prompt in one pass); `throughput` what a request
    occupies the busiest node or link, and, among the plans as good as that, one request's time.
    """
    if len(problem.nodes) < problem.replicas:
        raise InfeasibleError(f"{problem.replicas} replicas need as many nodes, and there are {len(problem.nodes)}")
    found = tables(problem)
    groups = classes(problem, found)
    if cells(problem, groups) <= exact.MOST_CELLS:
        teams = all_teams(problem, found, groups)
        cost, chain = _exactly(teams, goal)
        bound, method = cost, "exact" if len(groups) == len(problem.nodes) else f"exact, {len(groups)} classes of nodes"
    else:
        teams = fixed_teams(problem, found, _fixed(problem))
        cost, chain, bound = _bounded(problem, found, teams, goal)
        method = "bounded"
    if not chain:
        raise InfeasibleError(reasons.missing(problem, proven=not math.isfinite(bound)))
    stages = _stages(problem, teams, chain)
    return Plan(goal, stages, predict(problem, stages), cost, bound, method, tuple(reasons.why(problem, stages, goal)))


def _exactly(teams: Teams, goal: Goal) -> tuple[float, Chain]:
    if goal is Goal.LATENCY:
        return exact.shortest(teams)
    cost, _ = exact.widest(teams)
    return cost, exact.shortest(teams, cost)[1] if math.isfinite(cost) else []


def _bounded(problem: Problem, found: Tables, teams: Teams, goal: Goal) -> tuple[float, Chain, float]:
    nodes = teams if problem.replicas == 1 else _single(problem, found)
    if goal is Goal.THROUGHPUT:
        return *bounded.widest(teams), bounded.least_bottleneck(nodes, problem.replicas)
    cost, chain, bound = bounded.shortest(teams)
    return cost, chain, bound if nodes is teams else bounded.shortest(nodes)[2]


def _single(problem: Problem, found: Tables) -> Teams:
    """Every node as if it could run a stage by itself: what replicas add is left out, pins too."""
    free = replace(problem, pins=())
    return fixed_teams(free, replace(found, pinned={}), [[n] for n in range(len(problem.nodes))])


def _fixed(problem: Problem) -> list[list[int]]:
    """Nodes joined to teams with those that are most like them; some may be left over."""
    size, nodes = problem.replicas, problem.nodes
    order = sorted(range(len(nodes)), key=lambda n: (nodes[n].decode_ms, nodes[n].memory_bytes))
    return [order[at : at + size] for at in range(0, len(order) - size + 1, size)]


def _stages(problem: Problem, teams: Teams, chain: Chain) -> tuple[Stage, ...]:
    """Name the nodes: of each class those that are still free, in the order given."""
    free = [list(group) for group in teams.nodes]
    stages = []
    for team, first, stop in chain:
        numbers = [free[k].pop(0) for k, n in enumerate(teams.members[team]) for _ in range(_taken(teams, k, int(n)))]
        stages.append(Stage(tuple(problem.nodes[n].name for n in sorted(numbers)), first, stop))
    return tuple(stages)


def _taken(teams: Teams, kind: int, count: int) -> int:
    """A fixed team's nodes go together; of a class as many as the team has."""
    return count * (len(teams.nodes[kind]) if teams.limits[kind] == 1 else 1)
