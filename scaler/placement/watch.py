"""What the shards in use say of themselves, gathered into what `rebalance` decides on.

A node is silent from the look at which none of its shards answered, until one answers again. How slow it is follows
from what its passes took against what its profile says, how slow a link is from the time that answers of the next
shard took to arrive beyond the time it took to give them. Both are remembered for a while, for a node that was left
says nothing any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from scaler.placement.predict import hop, nodes_of
from scaler.placement.rebalance import Observed, State
from scaler.placement.values import Link, Node, Problem, Stage
from scaler.signals.series import Window
from scaler.signals.source import OURS, SHARD

NAMES = (*OURS, *SHARD)
"""The series that are looked at."""
LEAST_STEPS = 8
"""Fewer single-token passes within the window say nothing."""
PERCENTILE = 0.95


@dataclass(frozen=True)
class Placed:
    """One shard's replica: the node it runs on, and where it shows its metrics (http://host:port), '' if not known."""

    node: str
    address: str


class Whereabouts(Protocol):
    """Knows which shards run where."""

    def shards(self) -> Sequence[Placed]:
        """All that are there now; raises `SourceError`."""


class Pages(Protocol):
    """Reads what shards show."""

    def read(self, shards: Sequence[Placed], now_s: float) -> Mapping[str, Window]:
        """A window of samples for each node that was heard of; a node that was not is absent."""


@dataclass
class Watch:
    """Looks at shards, and remembers. Not for two threads at once.

    What was measured of nodes and links holds for `trusted_s`, and a node that fell silent is tried again after that.
    """

    whereabouts: Whereabouts
    pages: Pages
    trusted_s: float = 600.0
    _silent_since: dict[str, float] = field(default_factory=dict)
    _slowdown: dict[str, tuple[float, float]] = field(default_factory=dict)
    _links: dict[tuple[str, str], tuple[float, Link]] = field(default_factory=dict)

    def look(self, state: State, now_s: float) -> Observed:
        """Look once; raises `SourceError` where it cannot even be known which shards there are."""
        found = self.pages.read(self.whereabouts.shards(), now_s)
        self._listen(state, found, now_s)
        self._measure(state, found, now_s)
        head = [window for name in state.plan.stages[0].nodes if (window := found.get(name))]
        return Observed(
            at_s=now_s,
            silent_s={name: now_s - since for name, since in self._silent_since.items()},
            links={pair: link for pair, (_, link) in self._links.items()},
            slowdown={name: factor for name, (_, factor) in self._slowdown.items()},
            latency_ms=max((ms for w in head if (ms := _latency_ms(w)) is not None), default=None),
            requests_per_s=sum(_per_s(w) for w in head),
            sessions=round(sum(w.latest("edgecascade_inflight_requests") or 0.0 for w in head)),
        )

    def _listen(self, state: State, found: Mapping[str, Window], now_s: float) -> None:
        for name in found:
            self._silent_since.pop(name, None)
        for name in state.plan.by_node.keys() - found.keys():
            self._silent_since.setdefault(name, now_s)
        for name, since in list(self._silent_since.items()):
            if name not in state.plan.by_node and now_s - since > self.trusted_s:
                del self._silent_since[name]

    def _measure(self, state: State, found: Mapping[str, Window], now_s: float) -> None:
        for stage in state.plan.stages:
            for node in nodes_of(state.problem, stage):
                factor = slowdown(state.problem, stage, node, found[node.name]) if node.name in found else None
                if factor is not None:
                    self._slowdown[node.name] = now_s, factor
        for one, other in pairwise(state.plan.stages):
            link = slower_link(state.problem, one, other, found)
            if link is not None:
                pairs = [(a, b) for a in one.nodes for b in other.nodes]
                self._links |= dict.fromkeys([*pairs, *((b, a) for a, b in pairs)], (now_s, link))
        _forget(self._slowdown, now_s - self.trusted_s)
        _forget(self._links, now_s - self.trusted_s)


def slowdown(problem: Problem, stage: Stage, node: Node, window: Window) -> float | None:
    """By how many times a node's passes take longer than its profile says, None if there were too few.

    A pass that several answers share costs, for each more, what a token of a prompt does.
    """
    passes = window.increase("edgecascade_passes_total")
    if passes < LEAST_STEPS:
        return None
    further = window.increase("edgecascade_pass_tokens_total") / passes - 1
    work = sum(layer.work for layer in problem.model.layers[stage.first : stage.stop])
    head_ms = node.head_ms if stage.stop == problem.model.n_layers else 0.0
    expected_ms = work * (node.decode_ms + max(0.0, further) * node.prefill_ms) + head_ms
    return 1e3 * window.increase("edgecascade_pass_seconds_total") / passes / expected_ms


def slower_link(problem: Problem, one: Stage, other: Stage, found: Mapping[str, Window]) -> Link | None:
    """The link between two stages as it is now, the same both ways; None if too little passed over it."""
    windows = [found[name] for name in one.nodes if name in found]
    beyond = [found[name] for name in other.nodes if name in found]
    waited = _mean_ms(windows, "edgecascade_link_seconds_total", "edgecascade_link_steps_total")
    took = _mean_ms(beyond, "edgecascade_shard_step_seconds_total", "edgecascade_shard_steps_total")
    if waited is None or took is None:
        return None
    planned, _ = hop(problem, one, other)
    latency_ms = max(0.0, waited - took - planned.busy_ms(problem.model.hidden_bytes)) / 2
    return Link(latency_ms, planned.mbit_per_s)


def _mean_ms(windows: Sequence[Window], seconds: str, times: str) -> float | None:
    count = sum(window.increase(times) for window in windows)
    return 1e3 * sum(window.increase(seconds) for window in windows) / count if count >= LEAST_STEPS else None


def _latency_ms(window: Window) -> float | None:
    found = window.buckets("edgecascade_request_seconds").quantile(PERCENTILE)
    return None if found is None else 1e3 * found


def _per_s(window: Window) -> float:
    return window.increase("edgecascade_requests_total") / window.span_s if window.span_s > 0 else 0.0


def _forget(kept: dict[Any, tuple[float, Any]], before_s: float) -> None:
    for key in [key for key, (at_s, _) in kept.items() if at_s < before_s]:
        del kept[key]
