"""Whether a plan keeps its word: throttled shards on this machine, the planned cut beside the even one.

Knows neither how shards are started nor how they are asked: that is handed in, as `Run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise, permutations
from statistics import median
from typing import Any

from bench.profile import Profile
from scaler.placement.plan import place
from scaler.placement.predict import predict
from scaler.placement.values import Goal, Link, Model, Node, Problem, Rule, Stage, Workload

MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """One answer: until its first token, and from one token to the next."""

    prompt_ms: float
    token_ms: float


Ask = Callable[[], Timing]
Run = Callable[[Sequence[range], Sequence[float]], AbstractContextManager[Ask]]
"""Starts a shard for each range, slowed down so many times, the head first, and yields how to ask them."""


@dataclass(frozen=True)
class Site:
    """What stands for a site: by how many times each node is slower than this machine, its memory, and the links."""

    slowdown: Sequence[float]
    memory_mib: float
    link: Link

    def problem(self, profile: Profile, model: Model, workload: Workload) -> Problem:
        """Its nodes as this machine was measured; the first one has the head, since requests come there."""
        nodes = [
            Node(f"node-{n}", int(self.memory_mib * MIB), *(s * ms for ms in _times(profile)))
            for n, s in enumerate(self.slowdown)
        ]
        links = dict.fromkeys(permutations([node.name for node in nodes], 2), self.link)
        return Problem(nodes, links, model, workload, pins=[Rule(nodes[0].name, range(1))])


def _times(profile: Profile) -> tuple[float, float, float]:
    return profile.decode_ms, profile.prefill_ms, profile.head_ms


def compare(site: Site, profile: Profile, model: Model, workload: Workload, run: Run, answers: int) -> dict[str, Any]:
    """Plan for latency, run that cut and the even one, and say how far predictions were off.

    Raises `InfeasibleError` where either does not fit the nodes' memory.
    """
    problem = site.problem(profile, model, workload)
    planned = place(problem, Goal.LATENCY).stages
    cuts = {"planned": planned, "even": _evenly(problem, planned)}
    rows = {}
    for name, stages in cuts.items():
        numbers = [int(stage.nodes[0].removeprefix("node-")) for stage in stages]
        ranges = [range(stage.first, stage.stop) for stage in stages]
        with run(ranges, [site.slowdown[n] for n in numbers]) as ask:
            ask()  # the first one warms up
            rows[name] = _row(problem, stages, [ask() for _ in range(answers)])
    return rows


def _evenly(problem: Problem, planned: Sequence[Stage]) -> list[Stage]:
    """The even cut over the nodes of a plan."""
    edges = [round(n * problem.model.n_layers / len(planned)) for n in range(len(planned) + 1)]
    return [Stage(stage.nodes, a, b) for stage, (a, b) in zip(planned, pairwise(edges), strict=True)]


def _row(problem: Problem, stages: Sequence[Stage], timings: Sequence[Timing]) -> Mapping[str, Any]:
    says = predict(problem, stages)
    token_ms, prompt_ms = (median(getattr(t, name) for t in timings) for name in ("token_ms", "prompt_ms"))
    return {
        "layers": [stage.layers for stage in stages],
        "token_ms": token_ms,
        "predicted_token_ms": says.token_ms,
        "token_error": says.token_ms / token_ms - 1,
        "prompt_ms": prompt_ms,
        "predicted_prompt_ms": says.prompt_ms,
        "prompt_error": says.prompt_ms / prompt_ms - 1,
    }
