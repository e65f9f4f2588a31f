"""Sentences on a plan: what decided it, or what is missing where there is none. Each can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from scaler.placement.costs import memory_bytes, tables
from scaler.placement.predict import fault, mib, nodes_of, predict
from scaler.placement.values import Goal, Link, Prediction, Problem, Stage


def why(problem: Problem, stages: Sequence[Stage], goal: Goal) -> list[str]:
    """Sentences on what decided: each can be checked by hand."""
    plan, sizes = predict(problem, stages), memory_bytes(problem)
    found = []
    for stage in stages:
        for node in nodes_of(problem, stage):
            stop = min(stage.stop + 1, problem.model.n_layers)
            more = sizes[stage.first, stop] if stop > stage.stop else sizes[max(stage.first - 1, 0), stop]
            if len(stages) > 1 and more > node.memory_bytes:
                share = sizes[stage.first, stage.stop] / node.memory_bytes
                found.append(f"{node.name} is full: {100 * share:.0f} % of its memory, and no room for another layer")
    used = {name for stage in stages for name in stage.nodes}
    costs = tables(problem).compute
    for n, node in enumerate(problem.nodes):
        if node.name not in used:
            able = bool(np.isfinite(costs[n]).any())
            found.append(
                f"{node.name} is left out: {'no use of it is better' if able else 'it may or can run no layer'}"
            )
    if goal is Goal.THROUGHPUT:
        found.append(f"{plan.bottleneck} is the busiest: {plan.bottleneck_ms:.1f} ms a request")
    for name, other in _alternatives(problem, stages).items():
        found.append(_against(problem, plan, other, name, goal))
    return found


def _alternatives(problem: Problem, stages: Sequence[Stage]) -> dict[str, list[Stage]]:
    """The even cut over the same nodes, and the quickest node alone."""
    n_layers = problem.model.n_layers
    others: dict[str, list[Stage]] = {}
    if len(stages) > 1:
        edges = [round(i * n_layers / len(stages)) for i in range(len(stages) + 1)]
        others["the even cut over these nodes"] = [
            Stage(s.nodes, a, b) for s, (a, b) in zip(stages, pairwise(edges), strict=True)
        ]
    if problem.replicas == 1 and len(problem.nodes) > 1:
        quickest = min(problem.nodes, key=lambda node: node.decode_ms)
        if (quickest.name,) != stages[0].nodes or len(stages) > 1:
            others[f"{quickest.name} alone"] = [Stage((quickest.name,), 0, n_layers)]
    return others


def _against(problem: Problem, plan: Prediction, other: Sequence[Stage], name: str, goal: Goal) -> str:
    if broken := fault(problem, other):
        return f"{name} cannot be: {broken}"
    theirs = predict(problem, other)
    if goal is Goal.LATENCY:
        return f"{name} would take {theirs.request_ms:.1f} ms a request, this plan {plan.request_ms:.1f}"
    return f"{name} would do {theirs.requests_per_s:.2f} requests a second, this plan {plan.requests_per_s:.2f}"


def missing(problem: Problem, *, proven: bool) -> str:
    """One sentence on why there is no plan."""
    return _contradiction(problem) or _too_little(problem) or _in_pieces(problem, proven=proven)


def _contradiction(problem: Problem) -> str:
    """Rules that rule everything out."""
    pinned: dict[int, set[str]] = {}
    for rule in problem.pins:
        for layer in rule.layers:
            pinned.setdefault(layer, set()).add(rule.node)
    for layer, names in pinned.items():
        if len(names) > problem.replicas:
            return f"layer {layer} is pinned to {' and '.join(sorted(names))}; leave one of the pins out"
        for rule in problem.exclusions:
            if rule.node in names and layer in rule.layers:
                return f"layer {layer} is both pinned to '{rule.node}' and excluded from it; leave one of the two out"
    return ""


def _too_little(problem: Problem) -> str:
    """Memory that does not do even in sum, or a layer that is too large for every node."""
    found, sizes = tables(problem).compute, memory_bytes(problem)
    able = [n for n in range(len(problem.nodes)) if np.isfinite(found[n]).any()]
    needed = float(sizes[0, -1]) * problem.replicas
    there = float(sum(problem.nodes[n].memory_bytes for n in able))
    if needed > there:
        parts = f"weights and key-value memory of {problem.workload.sessions} sessions"
        times = f" {problem.replicas} times" if problem.replicas > 1 else ""
        return (
            f"the model needs {mib(needed)} ({parts}{times}), and the nodes that may and can run layers have "
            f"{mib(there)}: {mib(needed - there)} are missing; add a node, or lower sessions or context"
        )
    for layer in range(problem.model.n_layers):
        able_here = sum(bool(np.isfinite(found[n, : layer + 1, layer + 1 :]).any()) for n in able)
        if able_here < problem.replicas:
            needed = float(sizes[layer, layer + 1])
            return (
                f"layer {layer} takes {mib(needed)} and {able_here} of the nodes may and can run it, where "
                f"{problem.replicas} must; give a node more memory, or exclude less"
            )
    return ""


def _in_pieces(problem: Problem, *, proven: bool) -> str:
    """Enough in sum, and still no plan."""
    joined = replace(problem, links=_all_joined(problem))
    links = "" if problem.links == joined.links else ", or links between nodes that have none"
    kept = " while the pins hold" if problem.pins else ""
    verdict = "there is no plan" if proven else "no plan was found (one may exist: there are too many nodes to try all)"
    return (
        f"{verdict}: memory would do in sum, but not cut into one run of layers a node{kept}; what is missing is a "
        f"node with more memory{links}"
    )


def _all_joined(problem: Problem) -> dict[tuple[str, str], Link]:
    names = [node.name for node in problem.nodes]
    return {(a, b): problem.links.get((a, b), Link(0, 1)) for a in names for b in names if a != b}
