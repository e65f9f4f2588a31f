"""Nodes, links and layers as matrices, so that the searches need to know nothing of either.

N nodes, K classes of nodes that can be told apart by nothing, T teams (who runs a stage: one node, or as many as there
are replicas), L layers. A matrix (L+1, L+1) holds at [a, b] what layers a … b-1 cost; what cannot be is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from scaler.placement.values import Node, Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tables:
    """What single nodes cost for one request of the workload.

    `compute` (N, L+1, L+1); `hop` (N, N): a request's messages there and its tokens back; `hop_busy` (N, N): how long
    they occupy the link; `pinned`: the nodes of each pinned layer.
    """

    compute: Floats
    hop: Floats
    hop_busy: Floats
    pinned: dict[int, frozenset[int]]


@dataclass(frozen=True)
class Teams:
    """Who can run a stage, and at what cost.

    `limits` (K,): nodes of each class; `members` (T, K): how many of each class are in a team; `nodes` (K): the nodes
    of each class by number; `latency`, `busy` (T, L+1, L+1), `hop`, `hop_busy` (T, T).
    """

    limits: Ints
    members: Ints
    nodes: Sequence[Sequence[int]]
    latency: Floats
    busy: Floats
    hop: Floats
    hop_busy: Floats

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.latency.shape[1]) - 1


def tables(problem: Problem) -> Tables:
    """Cost all ranges on all nodes."""
    numbers = {node.name: n for n, node in enumerate(problem.nodes)}
    compute = np.stack([_compute(problem, node) for node in problem.nodes])
    for rule in problem.exclusions:
        compute[numbers[rule.node]][touching(rule.layers, problem.model.n_layers)] = np.inf
    hop, busy = (np.full((len(numbers),) * 2, np.inf) for _ in range(2))
    work, hidden = problem.workload, problem.model.hidden_bytes
    for (sender, receiver), link in problem.links.items():
        back = problem.links.get((receiver, sender))
        if back is not None and sender != receiver:
            place = numbers[sender], numbers[receiver]
            busy[place] = link.busy_ms(hidden * (work.prompt_tokens + work.answer_tokens - 1))
            hop[place] = busy[place] + work.answer_tokens * (link.latency_ms + back.latency_ms)
    pinned: dict[int, frozenset[int]] = {}
    for rule in problem.pins:
        pinned |= {layer: pinned.get(layer, frozenset()) | {numbers[rule.node]} for layer in rule.layers}
    return Tables(compute, hop, busy, pinned)


def touching(layers: range, n_layers: int) -> NDArray[np.bool_]:
    """Mark the ranges [a, b) that hold one of the layers."""
    at = np.arange(n_layers + 1)
    found: NDArray[np.bool_] = (at[:, None] < layers.stop) & (at[None, :] > layers.start)
    return found


def memory_bytes(problem: Problem) -> Floats:
    """What each range takes in memory, (L+1, L+1)."""
    model, work = problem.model, problem.workload
    kv_bytes = model.kv_bytes * work.context * work.sessions
    ends = np.concatenate([[0.0], np.cumsum([layer.size_bytes + kv_bytes for layer in model.layers])])
    sizes: Floats = ends[None, :] - ends[:, None]
    sizes[0] += model.first_bytes
    sizes[:, -1] += model.last_bytes
    sizes[0, -1] -= model.shared_bytes
    return sizes


def _compute(problem: Problem, node: Node) -> Floats:
    """One request's time on a node, range by range; infinite where its memory does not do."""
    work = problem.workload
    a_layer = work.prompt_tokens * node.prefill_ms + (work.answer_tokens - 1) * node.decode_ms
    ends = np.concatenate([[0.0], np.cumsum([layer.work for layer in problem.model.layers])])
    found: Floats = (ends[None, :] - ends[:, None]) * a_layer
    found[:, -1] += work.answer_tokens * node.head_ms
    at = np.arange(len(ends))
    found[(memory_bytes(problem) > node.memory_bytes) | (at[:, None] >= at[None, :])] = np.inf
    return found


def classes(problem: Problem, found: Tables) -> list[list[int]]:
    """Group nodes that can be swapped without any cost changing."""
    groups: list[list[int]] = []
    pinned = frozenset().union(*found.pinned.values())
    for n in range(len(problem.nodes)):
        group = next((g for g in groups if pinned.isdisjoint((g[0], n)) and _alike(found, g[0], n)), None)
        if group is None:
            groups.append([n])
        else:
            group.append(n)
    return groups


def _alike(found: Tables, one: int, other: int) -> bool:
    swapped = np.arange(len(found.hop))
    swapped[[one, other]] = other, one
    return bool(
        np.array_equal(found.compute[one], found.compute[other])
        and all(np.array_equal(m, m[np.ix_(swapped, swapped)]) for m in (found.hop, found.hop_busy))
    )


def cells(problem: Problem, groups: Sequence[Sequence[int]]) -> int:
    """What an exact search takes in memory, and so in time: states of use x teams x layers."""
    n_states = math.prod(len(group) + 1 for group in groups)
    n_teams = math.comb(len(groups) + problem.replicas - 1, problem.replicas)
    return n_states * n_teams * (problem.model.n_layers + 1)


def all_teams(problem: Problem, found: Tables, groups: Sequence[Sequence[int]]) -> Teams:
    """Every team that classes can make up."""
    limits = np.asarray([len(group) for group in groups])
    chosen = combinations_with_replacement(range(len(groups)), problem.replicas)
    members = np.asarray([np.bincount(team, minlength=len(groups)) for team in chosen])
    members = members[(members <= limits).all(1)] if len(members) else members.reshape(0, len(groups))
    # A team of two of a class stands for its first two; a second team of that class for the next two.
    teams = [[group[i] for group, n in zip(groups, row, strict=True) for i in range(n)] for row in members]
    later = [[group[-1 - i] for group, n in zip(groups, row, strict=True) for i in range(n)] for row in members]
    return _teams(problem, found, teams, later, limits, members, groups)


def fixed_teams(problem: Problem, found: Tables, teams: Sequence[Sequence[int]]) -> Teams:
    """Teams that share no node, each a class of its own."""
    ones = np.ones(len(teams), np.int64)
    return _teams(problem, found, teams, teams, ones, np.diag(ones), teams)


def _teams(
    problem: Problem,
    found: Tables,
    teams: Sequence[Sequence[int]],
    later: Sequence[Sequence[int]],
    limits: Ints,
    members: Ints,
    nodes: Sequence[Sequence[int]],
) -> Teams:
    n_layers, n_teams = problem.model.n_layers, len(teams)
    latency = np.full((n_teams, n_layers + 1, n_layers + 1), np.inf)
    hop, hop_busy = (np.full((n_teams, n_teams), np.inf) for _ in range(2))
    for t, team in enumerate(teams):
        latency[t] = found.compute[team].max(0)
        for layer, wanted in found.pinned.items():
            if not wanted <= set(team):
                latency[t][touching(range(layer, layer + 1), n_layers)] = np.inf
        for u, other in enumerate(later):
            pairs = np.ix_(team, other)
            hop[t, u], hop_busy[t, u] = found.hop[pairs].max(), found.hop_busy[pairs].max()
    return Teams(limits, members, nodes, latency, latency / problem.replicas, hop, hop_busy / problem.replicas)
