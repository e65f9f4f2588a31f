"""What an assignment comes to, and whether it can be at all: sums over its stages, whoever made it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from scaler.placement.costs import memory_bytes
from scaler.placement.errors import InfeasibleError
from scaler.placement.values import Link, Node, Prediction, Problem, Stage

MIB = 2**20


def predict(problem: Problem, stages: Sequence[Stage]) -> Prediction:
    """What any assignment comes to; raises `InfeasibleError` where it breaks memory, links, pins or exclusions."""
    _check(problem, stages)
    work, model = problem.workload, problem.model
    n_chunks, chunk = work.n_chunks, work.prompt_tokens / work.n_chunks
    a_token, a_chunk, shares, head = [], [], dict[str, float](), 0.0
    for stage in stages:
        each = times(problem, stage)
        decode, prefill, head = (max(column) for column in zip(*each, strict=True))
        a_token.append(decode + head)
        a_chunk.append(chunk * prefill)
        a_request = max(
            work.prompt_tokens * p + (work.answer_tokens - 1) * d + work.answer_tokens * h for d, p, h in each
        )
        shares["+".join(stage.nodes)] = a_request / problem.replicas
    hops = [hop(problem, one, other) for one, other in pairwise(stages)]
    there = [link.latency_ms + link.busy_ms(model.hidden_bytes) for link, _ in hops]
    back = [link.latency_ms for _, link in hops]
    transfers = [link.busy_ms(chunk * model.hidden_bytes) for link, _ in hops]
    for (link, _), (one, other) in zip(hops, pairwise(stages), strict=True):
        n_states = work.prompt_tokens + work.answer_tokens - 1
        name = f"link {'+'.join(one.nodes)} → {'+'.join(other.nodes)}"
        shares[name] = link.busy_ms(n_states * model.hidden_bytes) / problem.replicas
    once = sum(a_chunk) + sum(transfers) + sum(link.latency_ms for link, _ in hops) + sum(back) + head
    prompt_ms = once + (n_chunks - 1) * max(*a_chunk, *transfers, 0.0)
    token_ms = sum(a_token) + sum(there) + sum(back)
    bottleneck = max(shares, key=lambda name: shares[name])
    return Prediction(
        token_ms=token_ms,
        prompt_ms=prompt_ms,
        request_ms=prompt_ms + (work.answer_tokens - 1) * token_ms,
        bottleneck_ms=shares[bottleneck],
        bottleneck=bottleneck,
        joules_per_token=_joules(problem, stages),
    )


def nodes_of(problem: Problem, stage: Stage) -> list[Node]:
    """The nodes of a stage."""
    by_name = {node.name: node for node in problem.nodes}
    return [by_name[name] for name in stage.nodes]


def times(problem: Problem, stage: Stage) -> list[tuple[float, float, float]]:
    """Decoding a token, reading one of a prompt, and the head's time, on each node of a stage."""
    work = sum(layer.work for layer in problem.model.layers[stage.first : stage.stop])
    last = stage.stop == problem.model.n_layers
    return [
        (work * node.decode_ms, work * node.prefill_ms, node.head_ms if last else 0.0)
        for node in nodes_of(problem, stage)
    ]


def hop(problem: Problem, one: Stage, other: Stage) -> tuple[Link, Link]:
    """The worst link there and the worst back, among the replicas of two stages."""
    there = [problem.links[a, b] for a in one.nodes for b in other.nodes]
    back = [problem.links[b, a] for a in one.nodes for b in other.nodes]
    return _worst(there), _worst(back)


def _worst(links: Sequence[Link]) -> Link:
    return Link(max(link.latency_ms for link in links), min(link.mbit_per_s for link in links))


def _joules(problem: Problem, stages: Sequence[Stage]) -> float | None:
    """Energy of a decoded token, one replica of each stage at work; None unless every node states its power."""
    total = 0.0
    for stage in stages:
        drawn = [
            (decode + head) * node.watts / 1000
            for node, (decode, _, head) in zip(nodes_of(problem, stage), times(problem, stage), strict=True)
            if node.watts is not None
        ]
        if len(drawn) < len(stage.nodes):
            return None
        total += max(drawn)
    return total


def fault(problem: Problem, stages: Sequence[Stage]) -> str:
    """Name the first thing an assignment breaks, '' if it holds."""
    return next(_faults(problem, stages), "")


def _faults(problem: Problem, stages: Sequence[Stage]) -> Iterator[str]:
    edges = [(stage.first, stage.stop) for stage in stages]
    if [0, *(stop for _, stop in edges)] != [*(first for first, _ in edges), problem.model.n_layers]:
        yield f"its ranges do not make up layers 0-{problem.model.n_layers - 1}"
    known, names = {node.name for node in problem.nodes}, [name for stage in stages for name in stage.nodes]
    yield from (f"the node '{name}' is not there" for name in names if name not in known)
    yield from (f"the node '{name}' has two ranges" for name in names if names.count(name) > 1)
    sizes = memory_bytes(problem)
    for stage in stages:
        needed = sizes[stage.first, stage.stop]
        for node in nodes_of(problem, stage):
            if needed > node.memory_bytes:
                yield f"layers {stage.layers} take {mib(needed)} and '{node.name}' has {mib(node.memory_bytes)}"
    for one, other in pairwise(stages):
        for a, b in ((a, b) for a in one.nodes for b in other.nodes):
            if (a, b) not in problem.links or (b, a) not in problem.links:
                yield f"'{a}' and '{b}' are not joined by a link"
    yield from _broken_rules(problem, stages)


def _broken_rules(problem: Problem, stages: Sequence[Stage]) -> Iterator[str]:
    on = {layer: stage.nodes for stage in stages for layer in range(stage.first, stage.stop)}
    for rule in problem.pins:
        if any(rule.node not in on[layer] for layer in rule.layers):
            yield f"layers {in_words(rule.layers)} are pinned to '{rule.node}'"
    for rule in problem.exclusions:
        if any(rule.node in on[layer] for layer in rule.layers):
            yield f"layers {in_words(rule.layers)} must not run on '{rule.node}'"


def _check(problem: Problem, stages: Sequence[Stage]) -> None:
    if found := fault(problem, stages):
        raise InfeasibleError(f"this plan cannot be: {found}")


def in_words(layers: range) -> str:
    """A range with both ends."""
    return f"{layers.start}-{layers.stop - 1}"


def mib(size_bytes: float) -> str:
    """Bytes for a person."""
    return f"{size_bytes / MIB:.1f} MiB"
