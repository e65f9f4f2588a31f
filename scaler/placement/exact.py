"""The exact search: a dynamic programme over how many nodes of each class are used, as EdgeShard's over sets of nodes.

`best[s, t, b]` is the least cost of layers 0 … b-1 on the nodes counted by state s, team t running the last range
(EdgeShard, arXiv 2405.14371, sections IV-B and IV-C, there with one node a device). A state is a number in mixed radix,
one digit a class; single nodes are classes of one, and then states are sets. Costs are joined by a sum for latency and
by the largest for throughput.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scaler.placement.costs import Floats, Ints, Teams

MOST_CELLS = 2**23
"""Beyond this many cells the search takes too long; a dozen different nodes and 170 layers are within."""
Chain = list[tuple[int, int, int]]
"""Stages in order: team, first layer, stop."""
ROUNDING = 1e-12
"""What sums of the same numbers may differ by."""


def shortest(teams: Teams, cap_ms: float = np.inf) -> tuple[float, Chain]:
    """The chain that answers one request soonest, no part of it busy for longer than `cap_ms`; ∞, [] if none is."""
    cap = cap_ms * (1 + ROUNDING)
    latency = np.where(teams.busy <= cap, teams.latency, np.inf)
    return _Search(teams, latency, np.where(teams.hop_busy <= cap, teams.hop, np.inf), np.add).run()


def widest(teams: Teams) -> tuple[float, Chain]:
    """The chain whose busiest part is busy for the shortest time."""
    return _Search(teams, teams.busy, teams.hop_busy, np.maximum).run()


@dataclass
class _Search:
    teams: Teams
    ranges: Floats
    hop: Floats
    join: np.ufunc

    def __post_init__(self) -> None:
        radix = np.concatenate([[1], np.cumprod(self.teams.limits + 1)])
        self._place, self._n_states = radix[:-1], int(radix[-1])
        self._offsets = self.teams.members @ self._place

    def run(self) -> tuple[float, Chain]:
        n_teams, n_layers = len(self.teams.members), self.teams.n_layers
        best = np.full((self._n_states, n_teams, n_layers + 1), np.inf)
        best[self._offsets, np.arange(n_teams)] = self.ranges[:, 0]
        for states in self._levels():
            for team, offset in enumerate(self._offsets):
                before = states[self._leaves_room(states, team)]
                if len(before):
                    best[before + offset, team] = self._extended(self._reached(best, before, team), team)
        state, team = divmod(int(best[:, :, n_layers].argmin()), n_teams)
        cost = float(best[state, team, n_layers])
        return cost, self._chain(best, state, team) if np.isfinite(cost) else []

    def _levels(self) -> Iterator[Ints]:
        """States from which another stage may follow, by how many nodes they count."""
        states = np.arange(self._n_states)
        counts = sum(states // place % (limit + 1) for place, limit in zip(self._place, self.teams.limits, strict=True))
        a_team = int(self.teams.members[0].sum())
        for n_stages in range(1, min(int(self.teams.limits.sum()) // a_team, self.teams.n_layers)):
            yield states[counts == n_stages * a_team]

    def _leaves_room(self, states: Ints, team: int) -> np.ndarray:
        digits = states[:, None] // self._place % (self.teams.limits + 1)
        room: np.ndarray = (digits + self.teams.members[team] <= self.teams.limits).all(1)
        return room

    def _reached(self, best: Floats, before: Ints, team: int) -> Floats:
        """Cost of having the first a layers done and their result at `team`, (states, L+1)."""
        found = self.join(best[before, 0], self.hop[0, team])
        for last in range(1, len(self.teams.members)):
            np.minimum(found, self.join(best[before, last], self.hop[last, team]), out=found)
        return np.asarray(found)

    def _extended(self, reached: Floats, team: int) -> Floats:
        """Cost of having the first b layers done, `team` running the last of them, (states, L+1)."""
        found = np.full_like(reached, np.inf)
        for a in range(1, self.teams.n_layers):
            row = self.ranges[team, a, a + 1 :]
            np.minimum(found[:, a + 1 :], self.join(reached[:, a, None], row), out=found[:, a + 1 :])
        return found

    def _chain(self, best: Floats, state: int, team: int) -> Chain:
        """Follow the best choices back; they are computed again, by the same sums."""
        chain: Chain = []
        stop = self.teams.n_layers
        while best[state, team, stop] < self.ranges[team, 0, stop] or not np.isfinite(self.ranges[team, 0, stop]):
            before = state - int(self._offsets[team])
            reached = self.join(best[before], self.hop[:, team, None])
            last, first = np.unravel_index(self.join(reached, self.ranges[team, :, stop]).argmin(), reached.shape)
            chain.append((team, int(first), stop))
            state, team, stop = before, int(last), int(first)
        return [*reversed([*chain, (team, 0, stop)])]
