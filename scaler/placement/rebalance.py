"""Whether to plan again, and whether the new plan pays for the move. Pure: time and what was seen come in as values.

A plan is looked at again when a node falls silent, a link or a node is slower than the plan took it for, or latency
stays over the objective. The new one is applied only if what it saves, over the time that conditions are trusted to
last, is more than what moving costs: bytes to load meanwhile, and sessions that must begin again elsewhere. Where a
range has lost a node, any move pays. Moves are rate-limited, forced ones too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from scaler.placement.errors import InfeasibleError
from scaler.placement.plan import place
from scaler.placement.predict import fault, predict
from scaler.placement.values import Goal, Link, Node, Plan, Problem, Stage

HOUR_S = 3600.0


class Reason(StrEnum):
    """Why a decision was taken: what set it off, or what kept the plan as it is."""

    STEADY = "steady"
    NODE_SILENT = "node_silent"
    LINK_SLOW = "link_slow"
    NODE_SLOW = "node_slow"
    OVER_SLO = "over_slo"
    DRIFTED = "drifted"
    SAME_PLAN = "same_plan"
    NOT_WORTH_IT = "not_worth_it"
    TOO_SOON = "too_soon"
    INFEASIBLE = "infeasible"


class Action(StrEnum):
    """What is to be done: nothing, put the same plan into force again, or move to another."""

    KEEP, REPEAT, MOVE = "keep", "repeat", "move"


@dataclass(frozen=True)
class Policy:
    """When a move is worth thinking of, and what it costs.

    A link or node counts as slow at `slow_factor` times what the plan took it for, a link only if that is
    `least_link_ms` more; latency must be over `slo_ms` for `sustained_s`, and a node silent for `silent_s`. A plan must
    be better by the share `least_gain`, since nodes out of use are known less well than those in use. Savings are
    counted over `horizon_s`. At most one move that is not forced in `interval_s`, and at most `moves_per_hour` of all
    kinds. A node loads `load_mib_per_s`.
    """

    slo_ms: float = math.inf
    sustained_s: float = 30.0
    silent_s: float = 5.0
    slow_factor: float = 1.5
    least_link_ms: float = 1.0
    least_gain: float = 0.1
    horizon_s: float = 600.0
    interval_s: float = 120.0
    moves_per_hour: int = 6
    load_mib_per_s: float = 100.0


@dataclass(frozen=True)
class Observed:
    """One look at the shards in use.

    `silent_s` says for how long nothing was heard of each node that is silent; `links` are links as measured now;
    `slowdown` is by how many times each node is slower than measured when planned; `sessions` are open now;
    `drifted`: the platform runs something else than the plan.
    """

    at_s: float
    silent_s: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    slowdown: Mapping[str, float] = field(default_factory=dict)
    latency_ms: float | None = None
    requests_per_s: float = 0.0
    sessions: int = 0
    drifted: bool = False


@dataclass(frozen=True)
class State:
    """The plan in force, for which conditions it was made, when moves were, and since when latency is over."""

    problem: Problem
    plan: Plan
    moves_s: tuple[float, ...] = ()
    over_since_s: float | None = None


@dataclass(frozen=True)
class Decision:
    """What to do and why; `plan` is the one to put into force, and what the move gains and costs, in request-seconds.

    `forced`: a range has lost a node, so that any move pays.
    """

    action: Action
    reason: Reason
    trigger: Reason
    sentence: str
    plan: Plan
    gain_s: float = 0.0
    cost_s: float = 0.0
    forced: bool = False


def decide(state: State, seen: Observed, policy: Policy) -> tuple[State, Decision]:
    """The state from now on (as if what was decided gets done), and the decision."""
    state = replace(state, over_since_s=_over_since(state, seen, policy))
    trigger, what = _trigger(state, seen, policy)
    if trigger is Reason.STEADY:
        return state, Decision(Action.KEEP, Reason.STEADY, trigger, "nothing has changed", state.plan)
    if trigger is Reason.DRIFTED:
        why = _too_soon(state, seen, policy, forced=True)
        action, reason = (Action.KEEP, Reason.TOO_SOON) if why else (Action.REPEAT, trigger)
        decision = Decision(action, reason, trigger, f"{what} {why}".strip(), state.plan)
    else:
        decision = _weighed(state, seen, policy, conditions(state.problem, seen, policy), trigger, what)
    if decision.action is Action.KEEP:
        return state, decision
    recent = tuple(at for at in state.moves_s if seen.at_s - at < HOUR_S)
    # The problem stays as planned for, so that nodes and links that recover are noticed; only what moved is new.
    return replace(state, plan=decision.plan, moves_s=(*recent, seen.at_s), over_since_s=None), decision


def conditions(problem: Problem, seen: Observed, policy: Policy) -> Problem:
    """The problem as things are now: without silent nodes, with links and nodes as fast as they are."""
    silent = {name for name, for_s in seen.silent_s.items() if for_s >= policy.silent_s}

    def there(names: Sequence[str]) -> bool:
        return silent.isdisjoint(names)

    return replace(
        problem,
        nodes=[_slowed(node, seen.slowdown.get(node.name, 1.0)) for node in problem.nodes if there((node.name,))],
        links={pair: seen.links.get(pair, link) for pair, link in problem.links.items() if there(pair)},
        pins=[rule for rule in problem.pins if there((rule.node,))],
        exclusions=[rule for rule in problem.exclusions if there((rule.node,))],
    )


def _slowed(node: Node, factor: float) -> Node:
    times = (node.decode_ms, node.prefill_ms, node.head_ms)
    decode_ms, prefill_ms, head_ms = (factor * ms for ms in times)
    return replace(node, decode_ms=decode_ms, prefill_ms=prefill_ms, head_ms=head_ms)


def _over_since(state: State, seen: Observed, policy: Policy) -> float | None:
    if seen.latency_ms is None:
        return state.over_since_s
    if seen.latency_ms <= policy.slo_ms:
        return None
    return seen.at_s if state.over_since_s is None else state.over_since_s


def _trigger(state: State, seen: Observed, policy: Policy) -> tuple[Reason, str]:
    """What there is to look into, the gravest first."""
    used = state.plan.by_node
    for name, for_s in seen.silent_s.items():
        if name in used and for_s >= policy.silent_s:
            return Reason.NODE_SILENT, f"nothing was heard of {name} for {for_s:.1f} s"
    if seen.drifted:
        return Reason.DRIFTED, "the platform runs other layers than planned; somebody has deployed anew"
    for name, factor in seen.slowdown.items():
        if name in used and factor >= policy.slow_factor:
            return Reason.NODE_SLOW, f"{name} is {factor:.1f} times as slow as measured"
    for (one, other), link in seen.links.items():
        if factor := _slower(state, one, other, link, policy):
            return Reason.LINK_SLOW, f"the link {one} → {other} is {factor:.1f} times as slow as planned for"
    if state.over_since_s is not None and seen.at_s - state.over_since_s >= policy.sustained_s:
        for_s = seen.at_s - state.over_since_s
        return Reason.OVER_SLO, f"latency is over {policy.slo_ms:g} ms for {for_s:.0f} s"
    return Reason.STEADY, ""


def _slower(state: State, one: str, other: str, link: Link, policy: Policy) -> float:
    """By how much a link between stages in use is slower, 0 if by little."""
    neighbours = {
        pair
        for a, b in zip(state.plan.stages, state.plan.stages[1:], strict=False)
        for x in a.nodes
        for y in b.nodes
        for pair in ((x, y), (y, x))
    }
    planned = state.problem.links.get((one, other))
    if planned is None or (one, other) not in neighbours:
        return 0.0
    size = state.problem.model.hidden_bytes
    now_ms, planned_ms = (one.latency_ms + one.busy_ms(size) for one in (link, planned))
    is_slow = now_ms >= policy.slow_factor * planned_ms and now_ms - planned_ms >= policy.least_link_ms
    return now_ms / planned_ms if is_slow else 0.0


def _weighed(state: State, seen: Observed, policy: Policy, now: Problem, trigger: Reason, what: str) -> Decision:
    """Plan again and compare."""

    def kept(reason: Reason, why: str, gain_s: float = 0.0, cost_s: float = 0.0) -> Decision:
        return Decision(Action.KEEP, reason, trigger, f"{what}; {why}", state.plan, gain_s, cost_s)

    old = _surviving(state, now)
    broken = bool(fault(now, old))
    try:
        new = _planned(now, state.plan.goal, least=1 if broken else now.replicas)
    except InfeasibleError as error:
        return kept(Reason.INFEASIBLE, f"no other plan can be: {error}")
    if new.by_node == state.plan.by_node:
        return kept(Reason.SAME_PLAN, "and no other plan is better")
    forced = broken or any(len(stage.nodes) < now.replicas for stage in old)
    gain, gain_s = (1.0, math.inf) if forced else _gain(state, seen, policy, now, old, new)
    cost_s = _cost_s(state, seen, policy, now, new)
    if gain < policy.least_gain:
        return kept(Reason.NOT_WORTH_IT, f"another plan is better by {100 * gain:.0f} % only", gain_s, cost_s)
    if gain_s <= cost_s:
        return kept(Reason.NOT_WORTH_IT, f"another plan saves {gain_s:.1f} s and costs {cost_s:.1f} s", gain_s, cost_s)
    if why := _too_soon(state, seen, policy, forced=forced):
        return kept(Reason.TOO_SOON, why, gain_s, cost_s)
    lost = "a range has nobody left to run it" if broken else "a range has lost a replica"
    saves = lost if forced else f"it saves {gain_s:.1f} s and costs {cost_s:.1f} s"
    sentence = f"{what}; {saves}"
    return Decision(Action.MOVE, trigger, trigger, sentence, new, gain_s, cost_s, forced=forced)


def _planned(now: Problem, goal: Goal, least: int) -> Plan:
    """The best plan with as many replicas as can be, at least so many; raises `InfeasibleError`."""
    try:
        return place(now, goal)
    except InfeasibleError:
        if now.replicas <= least:
            raise
        return _planned(replace(now, replicas=now.replicas - 1), goal, least)


def _surviving(state: State, now: Problem) -> list[Stage]:
    """The plan in force without the nodes that are gone; a range nobody is left for stays, and is a fault."""
    known = {node.name for node in now.nodes}
    found = []
    for stage in state.plan.stages:
        left = tuple(name for name in stage.nodes if name in known)
        found.append(replace(stage, nodes=left or stage.nodes))
    return found


def _gain(
    state: State, seen: Observed, policy: Policy, now: Problem, old: Sequence[Stage], new: Plan
) -> tuple[float, float]:
    """The share that is saved, and seconds of waiting saved over the horizon, by all requests together."""
    before, after = predict(now, old), new.prediction
    if state.plan.goal is Goal.LATENCY:
        before_ms, after_ms = before.request_ms, after.request_ms
    else:
        before_ms, after_ms = before.bottleneck_ms, after.bottleneck_ms
    saved_ms = before_ms - after_ms
    return saved_ms / before_ms, saved_ms / 1000 * seen.requests_per_s * policy.horizon_s


def _cost_s(state: State, seen: Observed, policy: Policy, now: Problem, new: Plan) -> float:
    """Seconds of waiting that a move costs, by all requests together.

    Nodes load what they have not yet, each by itself, the slowest deciding; requests that arrive meanwhile wait half of
    that on average. Sessions that are open read their prompts and tokens again.
    """
    loaded = max((_new_bytes(now, state.plan, new, name) for name in new.by_node), default=0.0)
    load_s = loaded / (policy.load_mib_per_s * 2**20)
    replay_s = new.prediction.prompt_ms / 1000
    return seen.requests_per_s * load_s * load_s / 2 + seen.sessions * (load_s + replay_s)


def _new_bytes(problem: Problem, old: Plan, new: Plan, name: str) -> float:
    """Weights that a node has to read: those of layers it did not run, and of ends it did not hold."""
    before, after = old.by_node.get(name, range(0)), new.by_node[name]
    model = problem.model
    size = sum(model.layers[layer].size_bytes for layer in after if layer not in before)
    size += model.first_bytes if 0 in after and 0 not in before else 0
    last = model.n_layers - 1
    return float(size + (model.last_bytes if last in after and last not in before else 0))


def _too_soon(state: State, seen: Observed, policy: Policy, *, forced: bool) -> str:
    """Why there may be no move now, '' if there may."""
    recent = [at for at in state.moves_s if seen.at_s - at < HOUR_S]
    if len(recent) >= policy.moves_per_hour:
        return f"and there were {len(recent)} moves within the hour, the most there may be"
    if recent and not forced and seen.at_s - recent[-1] < policy.interval_s:
        return f"and the last move was {seen.at_s - recent[-1]:.0f} s ago, less than {policy.interval_s:g} s"
    return ""
