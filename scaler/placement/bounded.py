"""The bounded search, for more nodes than the exact one can take: good chains, and what no chain can be below.

The bound lets nodes be used again, which makes a shortest path of the problem, and charges for repeated use (Lagrange
multipliers, raised by subgradients): whatever the charges, the path's cost less all of them is a lower bound. For
throughput it is also the least pace at which the longest ranges that nodes can take sum up to all layers. Chains come
from the same path search with labels that remember which nodes they hold, under the same charges, and are improved a
few stages at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from scaler.placement import exact
from scaler.placement.costs import Floats, Teams
from scaler.placement.exact import Chain

ROUNDS = 24
"""Rounds of raising the charges."""
STEPS = 16
"""Halvings of the interval in which the best throughput lies."""
WINDOWS = (2, 3, 4, 6)
"""Stages in a row that are looked at together when a chain is improved."""
SWEEPS = 4
"""Times that all windows of a chain are looked at."""
ORDERS = 12
"""Random orders in which nodes are asked to take what they can."""
CLOSE = 1e-9


def shortest(teams: Teams) -> tuple[float, Chain, float]:
    """Cost and chain of a quick answer to one request, and the bound; ∞ and [] where no chain was found."""
    best: Chain = []
    cost, bound = np.inf, 0.0
    charges = np.zeros(len(teams.latency))
    for number in range(ROUNDS):
        charged = teams.latency + charges[:, None, None]
        relaxed, walk = _path(charged, teams.hop, np.add, simple=False)
        bound = max(bound, relaxed - charges.sum())
        if not np.isfinite(relaxed):
            return np.inf, [], np.inf
        _, chain = _path(charged, teams.hop, np.add, simple=True)
        found = _latency(teams, chain)
        if found < cost:
            cost, best = found, chain
        uses = np.bincount([team for team, _, _ in walk], minlength=len(charges))
        over = np.where((charges == 0) & (uses == 0), 0, uses - 1)
        if not over.any() or cost <= bound * (1 + CLOSE):
            break
        aim = cost if np.isfinite(cost) else 1.5 * bound
        step = (aim - relaxed + charges.sum()) / float(over @ over) / (1 + number / 8)
        charges = np.maximum(0, charges + step * over)
    best = _improved(teams.latency, teams.hop, best or _greedy(teams, np.inf))
    return _latency(teams, best), best, bound


def widest(teams: Teams) -> tuple[float, Chain]:
    """Bottleneck and chain of a high throughput; ∞ and [] where none was found."""
    best: Chain = []
    cost = np.inf
    for chain in (_capped(teams, np.inf), _path(teams.busy, teams.hop_busy, np.maximum, simple=True)[1]):
        cost, best = min((cost, best), (_bottleneck(teams, chain), chain), key=lambda found: found[0])
    below = least_bottleneck(teams)
    for _ in range(STEPS):
        if not np.isfinite(cost) or cost <= below * (1 + CLOSE):
            break
        cap = (below + cost) / 2
        chain = _capped(teams, cap) or _greedy(teams, cap)
        found = _bottleneck(teams, chain)
        if found <= cap * (1 + exact.ROUNDING):
            cost, best = found, chain
        else:
            below = cap  # which proves nothing: labels may have missed a chain
    under = _under(teams, cost)
    chains = [_improved(*under, chain) for chain in (best, _path(*under, np.add, simple=True)[1])]
    best = min(chains, key=lambda chain: _latency(teams, chain))
    return _bottleneck(teams, best), best


def least_bottleneck(nodes: Teams, replicas: int = 1) -> float:
    """What no chain's busiest part is below, if each range is run by so many of the nodes; ∞ where none can be."""
    relaxed, _ = _path(nodes.busy, nodes.hop_busy, np.maximum, simple=False)
    return max(relaxed, _pace(nodes.busy, replicas))


def _under(teams: Teams, cap_ms: float) -> tuple[Floats, Floats]:
    """Latencies of what is busy for no longer than the cap."""
    cap = cap_ms * (1 + exact.ROUNDING)
    return np.where(teams.busy <= cap, teams.latency, np.inf), np.where(teams.hop_busy <= cap, teams.hop, np.inf)


def _capped(teams: Teams, cap_ms: float) -> Chain:
    """A chain within a bottleneck that wastes little: a stage costs all the layers that its node could take."""
    ranges, hop = _under(teams, cap_ms)
    able = _longest(ranges)
    cost = np.where(np.isfinite(ranges), able[:, None, None], np.inf)
    tie = np.where(np.isfinite(hop), 0.0, np.inf)
    return _path(cost, tie, np.add, simple=True)[1]


def _greedy(teams: Teams, cap_ms: float) -> Chain:
    """A chain of which each stage takes all it can within a bottleneck; of several orders, the first that ends."""
    ranges, hop = _under(teams, cap_ms)
    joined = np.isfinite(hop)
    orders = [-joined.sum(0).astype(float), _longest(ranges), -_longest(ranges)]
    draws = np.random.default_rng(1)
    orders += [draws.random(len(ranges)) - joined.sum(0) * share for share in np.linspace(0, 1, ORDERS)]
    return next(filter(None, (_in_order(ranges, joined, order) for order in orders)), [])


def _in_order(ranges: Floats, joined: NDArray[np.bool_], order: Floats) -> Chain:
    """Let the team that comes first of those in reach take all it can, again and again; [] at a dead end."""
    n_layers, chain = ranges.shape[1] - 1, list[tuple[int, int, int]]()
    free, at, reachable = np.ones(len(ranges), bool), 0, np.ones(len(ranges), bool)
    while at < n_layers:
        able = np.isfinite(ranges[:, at]) & (free & reachable)[:, None]
        ending = able[:, n_layers]
        chosen = ending if ending.any() else able.any(1)
        if not chosen.any():
            return []
        team = int(np.where(chosen, order, -np.inf).argmax())
        stop = int(np.flatnonzero(able[team]).max())
        chain.append((team, at, stop))
        free[team], at, reachable = False, stop, joined[team]
    return chain


def _longest(ranges: Floats) -> Floats:
    """The most layers in a row that each team can take, (T,)."""
    at = np.arange(ranges.shape[1])
    lengths: Floats = np.where(np.isfinite(ranges), at[None, :] - at[:, None], 0.0).max((1, 2))
    return lengths


def _pace(busy: Floats, replicas: int) -> float:
    """The least time in which the longest ranges that nodes can take sum up to all layers, as often as they are run."""
    n_layers = busy.shape[1] - 1
    at = np.arange(n_layers + 1)
    # (N, L): the least time in which a node runs some m layers in a row, and so at most how many within a time.
    least = np.stack([busy[:, at[:-m], at[m:]].min(1) for m in range(1, n_layers + 1)], axis=1)
    least = np.minimum.accumulate(least[:, ::-1], axis=1)[:, ::-1]
    entries, needed = np.sort(least[np.isfinite(least)]), n_layers * replicas
    return float(entries[needed - 1]) if len(entries) >= needed else np.inf


def _improved(ranges: Floats, hop: Floats, chain: Chain) -> Chain:
    """Cut stages in a row anew, with the teams that are not in the chain, as long as that makes it quicker."""
    for _ in range(SWEEPS):
        before = chain
        for size in WINDOWS:
            for at in range(len(before)):
                chain = _recut(ranges, hop, chain, at, at + size)
        if chain is before:
            break
    return chain


def _recut(ranges: Floats, hop: Floats, chain: Chain, at: int, end: int) -> Chain:
    """The chain with its stages `at` … `end - 1` replaced by a quicker way through their layers, if there is one."""
    window = chain[at:end]
    if not window:
        return chain
    others = {team for team, _, _ in (*chain[:at], *chain[end:])}
    free = np.asarray([team for team in range(len(ranges)) if team not in others])
    layers = slice(window[0][1], window[-1][2] + 1)
    found = ranges[free, layers, layers].copy()
    if at:
        found[:, 0] += hop[chain[at - 1][0], free, None]
    if end < len(chain):
        found[:, :, -1] += hop[free, chain[end][0], None]
    _, inner = _path(found, hop[np.ix_(free, free)], np.add, simple=True)
    recut = [(int(free[team]), a + layers.start, b + layers.start) for team, a, b in inner]
    better = [*chain[:at], *recut, *chain[end:]]
    gained = bool(inner) and sum(_parts(ranges, hop, better)) < sum(_parts(ranges, hop, chain)) * (1 - CLOSE)
    return better if gained else chain


def _path(ranges: Floats, hop: Floats, join: np.ufunc, *, simple: bool) -> tuple[float, Chain]:
    """The cheapest walk from layer 0 to the last; `simple`: none through a team twice, as far as labels can tell.

    A label is the best walk known to the state (team, layers done), so that a simple walk may be missed.
    """
    n_teams, n_layers = len(ranges), ranges.shape[1] - 1
    best = np.full((n_teams, n_layers + 1), np.inf)
    reached = np.full((n_teams, n_layers + 1), np.inf)
    came_from = np.full((n_teams, n_layers + 1), -1)
    start = np.zeros((n_teams, n_layers + 1), np.int64)
    held = np.zeros((n_teams, n_layers + 1, n_teams), bool)
    ours = np.arange(n_teams)
    for stop in range(1, n_layers + 1):
        options = join(reached[:, :stop], ranges[:, :stop, stop])
        options[:, 0] = ranges[:, 0, stop]
        first = options.argmin(1)
        best[:, stop], start[:, stop] = options[ours, first], first
        if simple:
            parents = came_from[ours, first]
            held[:, stop] = np.where((first > 0)[:, None], held[parents, first], False)  # noqa: FBT003
            held[ours, stop, ours] = True
        if stop < n_layers:
            arrivals = join(best[:, stop, None], hop)
            arrivals[ours, ours] = np.inf
            if simple:
                arrivals[held[:, stop]] = np.inf
            came_from[:, stop] = arrivals.argmin(0)
            reached[:, stop] = arrivals.min(0)
    team = int(best[:, n_layers].argmin())
    cost = float(best[team, n_layers])
    return (cost, _walk(team, n_layers, start, came_from)) if np.isfinite(cost) else (np.inf, [])


def _walk(team: int, stop: int, start: NDArray[np.int64], came_from: NDArray[np.int64]) -> Chain:
    chain: Chain = []
    while stop:
        first = int(start[team, stop])
        chain.append((team, first, stop))
        team, stop = int(came_from[team, first]), first
    return chain[::-1]


def _latency(teams: Teams, chain: Chain) -> float:
    return sum(_parts(teams.latency, teams.hop, chain)) if chain else np.inf


def _bottleneck(teams: Teams, chain: Chain) -> float:
    return max(_parts(teams.busy, teams.hop_busy, chain)) if chain else np.inf


def _parts(ranges: Floats, hop: Floats, chain: Chain) -> Iterator[float]:
    """Costs of a chain's stages and hops."""
    yield from (float(ranges[stage]) for stage in chain)
    yield from (float(hop[one, other]) for (one, _, _), (other, _, _) in pairwise(chain))
