"""Show a plan: as JSON, as text with a drawing, as a PNG."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from scaler.placement.costs import memory_bytes
from scaler.placement.errors import PlacementError
from scaler.placement.predict import hop, times
from scaler.placement.values import Goal, Plan, Problem, Stage

MIB = 2**20
WIDTH = 40
"""Columns of the drawing that stand for all layers."""


def as_dict(problem: Problem, plan: Plan) -> dict[str, Any]:
    """All that is known of a plan, for a pipe."""
    found = plan.prediction
    return {
        "goal": plan.goal.value,
        "method": plan.method,
        "cost_ms": plan.cost_ms,
        "bound_ms": plan.bound_ms,
        "gap": plan.gap,
        "stages": [_stage(problem, stage) for stage in plan.stages],
        "hops": [_hop(problem, one, other) for one, other in pairwise(plan.stages)],
        "predicted": {
            "token_ms": found.token_ms,
            "prompt_ms": found.prompt_ms,
            "request_ms": found.request_ms,
            "requests_per_s": found.requests_per_s,
            "bottleneck": found.bottleneck,
            "joules_per_token": found.joules_per_token,
        },
        "workload": vars(problem.workload),
        "why": list(plan.why),
    }


def _stage(problem: Problem, stage: Stage) -> dict[str, Any]:
    decode, prefill, head = (max(column) for column in zip(*times(problem, stage), strict=True))
    by_name = {node.name: node for node in problem.nodes}
    return {
        "nodes": list(stage.nodes),
        "layers": stage.layers,
        "token_ms": decode + head,
        "prompt_ms": problem.workload.prompt_tokens * prefill + head,
        "memory_bytes": int(memory_bytes(problem)[stage.first, stage.stop]),
        "memory_share": max(
            memory_bytes(problem)[stage.first, stage.stop] / by_name[name].memory_bytes for name in stage.nodes
        ),
    }


def _hop(problem: Problem, one: Stage, other: Stage) -> dict[str, float]:
    there, back = hop(problem, one, other)
    return {"token_ms": there.latency_ms + there.busy_ms(problem.model.hidden_bytes) + back.latency_ms}


def text(problem: Problem, plan: Plan) -> str:
    """The plan for a person: a line a stage, what it comes to, and why."""
    found, work = plan.prediction, problem.workload
    names = ["+".join(stage.nodes) for stage in plan.stages]
    widest = max(map(len, names))
    lines = []
    for number, (name, stage) in enumerate(zip(names, plan.stages, strict=True)):
        row = _stage(problem, stage)
        if number:
            ms = _hop(problem, plan.stages[number - 1], stage)["token_ms"]
            lines.append(f"{'':{widest}}  {' ' * _column(problem, stage.first)}│ {ms:.2f} ms there and back")
        used = f"{row['memory_bytes'] / MIB:.0f} MiB ({100 * row['memory_share']:.0f} %)"
        figures = f"layers {stage.layers:>7}  {row['token_ms']:7.2f} ms/token  {used}"
        lines.append(f"{name:{widest}}  {_bar(problem, stage)}  {figures}")
    gap = f"at most {100 * plan.gap:.2f} % above the bound of {plan.bound_ms:.1f} ms"
    what = "a request" if plan.goal is Goal.LATENCY else "a request on the busiest node or link"
    joules = found.joules_per_token
    comes_to = {
        "a token": f"{found.token_ms:.2f} ms",
        f"a prompt of {work.prompt_tokens} tokens": f"{found.prompt_ms:.1f} ms until the first token",
        f"a request of {work.answer_tokens} tokens": f"{found.request_ms:.1f} ms",
        "at once": f"at most {found.requests_per_s:.2f} requests a second; the busiest is {found.bottleneck}",
        "energy": f"{joules:.3f} J a token" if joules is not None else "not stated by all nodes",
    }
    proof = "proven best" if plan.gap == 0 else gap
    lines += ["", f"{plan.goal.value}: {plan.cost_ms:.1f} ms {what}, {proof} ({plan.method})"]
    lines += [f"predicted, {name}: {value}" for name, value in comes_to.items()]
    lines += [f"why: {sentence}" for sentence in plan.why]
    return "\n".join(lines)


def _column(problem: Problem, layer: int) -> int:
    return round(WIDTH * layer / problem.model.n_layers)


def _bar(problem: Problem, stage: Stage) -> str:
    first, stop = _column(problem, stage.first), _column(problem, stage.stop)
    filled = max(1, stop - first)
    return f"{'·' * first}{'█' * filled}{'·' * (WIDTH - first - filled)}"[:WIDTH]


def draw(problem: Problem, plan: Plan, path: Path) -> None:
    """Write a PNG: layers and time by stage; raises `PlacementError` where it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.45 * len(plan.stages)), layout="constrained")
    layers, clock = figure.subplots(1, 2, sharey=True)
    passed = 0.0
    for number, stage in enumerate(plan.stages):
        row = _stage(problem, stage)
        layers.barh(number, stage.stop - stage.first, left=stage.first)
        layers.annotate(stage.layers, ((stage.first + stage.stop) / 2, number), ha="center", va="center")
        if number:
            waited = _hop(problem, plan.stages[number - 1], stage)["token_ms"]
            clock.barh(number, waited, left=passed, color="lightgrey")
            passed += waited
        clock.barh(number, row["token_ms"], left=passed)
        passed += row["token_ms"]
    layers.set_yticks(range(len(plan.stages)), ["+".join(stage.nodes) for stage in plan.stages])
    layers.invert_yaxis()
    layers.set(xlabel="layers", xlim=(0, problem.model.n_layers))
    clock.set(xlabel="one token, ms (grey: links, there and back)")
    found = plan.prediction
    figure.suptitle(f"{plan.goal.value}: {found.token_ms:.2f} ms a token, {found.prompt_ms:.1f} ms a prompt")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise PlacementError(f"{path} cannot be written ({error.strerror})") from error
