"""What a placement is computed from, and what comes of it: plain values, no clock, no network.

Times are milliseconds; a `Link` is one direction. Layers are numbered from 0, ranges are half-open as in Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from scaler.placement.errors import NodesFileError

BITS, MBIT_PER_MS = 8, 1000.0


class Goal(StrEnum):
    """`latency`: one request as fast as can be; `throughput`: as many as can be, its busiest part as idle as can be."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


@dataclass(frozen=True)
class Node:
    """A machine as `profile-node` measures it; `memory_bytes` is what weights and key-value memory may take.

    `decode_ms` is the time of one layer for one token, `prefill_ms` that of one layer for one token of a prompt,
    `head_ms` that of the vocabulary head, once a pass; `watts` what it draws while it computes.
    """

    name: str
    memory_bytes: int
    decode_ms: float
    prefill_ms: float
    head_ms: float = 0.0
    watts: float | None = None


@dataclass(frozen=True)
class Link:
    """One direction of a link.

    `latency_ms` is what a small message takes from process to process, software included.
    """

    latency_ms: float
    mbit_per_s: float

    def busy_ms(self, size_bytes: float) -> float:
        """How long so many bytes occupy it."""
        return size_bytes * BITS / (self.mbit_per_s * MBIT_PER_MS)


@dataclass(frozen=True)
class Layer:
    """What a layer holds and how much it computes, 1.0 being the layer that nodes were measured with."""

    size_bytes: int
    work: float = 1.0


@dataclass(frozen=True)
class Model:
    """A model as far as placement knows it.

    Whoever runs layer 0 holds `first_bytes` more (embeddings), whoever runs the last one `last_bytes` (norm and head);
    who runs both saves `shared_bytes` of them. `kv_bytes` are those of one token in one layer, `hidden_bytes` those
    of one token's state on a link.
    """

    layers: Sequence[Layer]
    first_bytes: int
    last_bytes: int
    shared_bytes: int
    kv_bytes: int
    hidden_bytes: int

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)


@dataclass(frozen=True)
class Workload:
    """What a usual request is, and how many nodes must hold at once: `sessions`, each of up to `context` tokens.

    Prompts pass the stages in pieces of `chunk_tokens`, which overlap.
    """

    prompt_tokens: int = 128
    answer_tokens: int = 64
    context: int = 2048
    sessions: int = 4
    chunk_tokens: int = 256

    @property
    def n_chunks(self) -> int:
        """Pieces of a prompt."""
        return math.ceil(self.prompt_tokens / self.chunk_tokens)


@dataclass(frozen=True)
class Rule:
    """Ties layers to a node: as a pin they run there, as an exclusion they do not."""

    node: str
    layers: range


@dataclass(frozen=True)
class Problem:
    """Nodes, links (by sender and receiver; an absent pair is not joined), a model, and what must hold.

    Each range of layers is run by `replicas` nodes. Raises `NodesFileError` where the parts do not fit together.
    """

    nodes: Sequence[Node]
    links: Mapping[tuple[str, str], Link]
    model: Model
    workload: Workload = Workload()
    pins: Sequence[Rule] = ()
    exclusions: Sequence[Rule] = ()
    replicas: int = 1

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        for name in names:
            if names.count(name) > 1:
                raise NodesFileError(f"two nodes are called '{name}'; give each a name of its own")
        known, n_layers = set(names), self.model.n_layers
        named = [("link", name) for pair in self.links for name in pair]
        named += [("pin", rule.node) for rule in self.pins] + [("exclusion", rule.node) for rule in self.exclusions]
        for what, name in named:
            if name not in known:
                raise NodesFileError(f"a {what} names the node '{name}', which is not under 'nodes'")
        for rule in (*self.pins, *self.exclusions):
            if not 0 <= rule.layers.start < rule.layers.stop <= n_layers:
                last = rule.layers.stop - 1
                raise NodesFileError(
                    f"layers {rule.layers.start}-{last} of '{rule.node}' are not some of the layers 0-{n_layers - 1}"
                )


@dataclass(frozen=True)
class Stage:
    """Layers `first` … `stop - 1` on each of some nodes."""

    nodes: tuple[str, ...]
    first: int
    stop: int

    @property
    def layers(self) -> str:
        """The range as `SHARD_LAYERS` takes it, both ends included."""
        return f"{self.first}-{self.stop - 1}"


@dataclass(frozen=True)
class Prediction:
    """What a plan comes to for the workload; with replicas, through the slowest of each stage.

    `token_ms`: one decoded token, all hops included; `prompt_ms`: until the first token; `request_ms`: a request by
    itself; `bottleneck_ms`: what one request occupies the busiest part, `bottleneck`, which bounds `requests_per_s`.
    """

    token_ms: float
    prompt_ms: float
    request_ms: float
    bottleneck_ms: float
    bottleneck: str
    joules_per_token: float | None = None

    @property
    def requests_per_s(self) -> float:
        """The most requests a second, with enough of them at once to fill all stages."""
        return 1000 / self.bottleneck_ms


@dataclass(frozen=True)
class Plan:
    """An assignment. `cost_ms` is what was minimised, `bound_ms` what no plan is below (equal to it where exact)."""

    goal: Goal
    stages: tuple[Stage, ...]
    prediction: Prediction
    cost_ms: float
    bound_ms: float
    method: str
    why: tuple[str, ...] = field(default=())

    @property
    def gap(self) -> float:
        """By how much, at most, it is worse than the best, as a share of the bound."""
        return max(0.0, self.cost_ms / self.bound_ms - 1) if self.bound_ms > 0 else 0.0

    @property
    def by_node(self) -> dict[str, range]:
        """The layers of each node that has some."""
        return {name: range(stage.first, stage.stop) for stage in self.stages for name in stage.nodes}
