"""`edgecascade scaler`, and where layers go: `plan` and `rebalance`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # `--help` loads no numpy
    from scaler.placement.values import Problem


@dataclass(frozen=True)
class Rooms:
    """What they need of other rooms; the command line puts it into the context's `obj`, by this class.

    `problem` reads nodes files and a tier for placement.
    """

    problem: Callable[[Sequence[Path], Path], Problem]


def scaler() -> None:
    """Answer KEDA over gRPC with the replicas that hold the latency target; until SIGTERM, then drain.

    Settings come from the environment: SCALER_PORT (6000), SCALER_METRICS_PORT (6001), … docs/scaling.md has them all.

    Example: SCALER_REPLICAS=replicas.json edgecascade scaler
    """
    from scaler.server import serve
    from scaler.settings import Settings

    serve(Settings.from_environment(os.environ))


def plan(
    context: typer.Context,
    nodes: Annotated[list[Path], typer.Argument(help="Nodes files; their lists are joined.")],
    model: Annotated[Path, typer.Option(help="The tier's artifact.")],
    goal: Annotated[str, typer.Option(help="latency or throughput.")] = "latency",
    plot: Annotated[Path | None, typer.Option(help="Write a drawing to this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a pipe.")] = False,
) -> None:
    """Say which node should run which layers of a tier, why, and what that comes to.

    Examples: edgecascade plan nodes.yaml --model var/edge
              edgecascade plan nodes.yaml jetson.yaml --model var/edge --goal throughput --plot plan.png
    """
    from scaler.placement import read, report
    from scaler.placement.plan import place

    rooms: Rooms = context.obj[Rooms]
    problem = rooms.problem(nodes, model)
    best = place(problem, read.goal(goal))
    typer.echo(json.dumps(report.as_dict(problem, best)) if as_json else report.text(problem, best))
    if plot:
        report.draw(problem, best, plot)


def rebalance(
    context: typer.Context,
    nodes: Annotated[list[Path], typer.Argument(help="Nodes files; nodes are named as Kubernetes names them.")],
    model: Annotated[Path, typer.Option(help="The tier's artifact; its manifest.json will do.")],
    goal: Annotated[str, typer.Option(help="latency or throughput.")] = "latency",
    function: Annotated[str, typer.Option(help="The first shard; the others are FUNCTION-shard-1 and so on.")] = "edge",
    shards: Annotated[int, typer.Option(min=2, max=100, help="How many shards are deployed.")] = 2,
    namespace: Annotated[str, typer.Option(help="Where they are.")] = "openfaas-fn",
    prometheus: Annotated[str, typer.Option(help="Read metrics there, http://host:port, not from the shards.")] = "",
    slo_ms: Annotated[float, typer.Option(min=1, help="Plan anew when the 95th percentile stays above.")] = 2000.0,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds from look to look.")] = 2.0,
    moves_per_hour: Annotated[int, typer.Option(min=1, help="At most so many moves an hour.")] = 6,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Where decisions are counted.")] = 6002,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide, log and count; apply nothing.")] = False,
) -> None:
    """Keep a tier's shards in Kubernetes where the best plan has them, and plan anew when nodes or links change.

    Examples: edgecascade rebalance nodes.yaml --model var/edge --shards 3 --dry-run
              edgecascade rebalance nodes.yaml --model var/edge --prometheus http://prometheus.openfaas:9090
    """
    from scaler.placement import read
    from scaler.placement.rebalance import Policy
    from scaler.placement.server import Options, serve

    rooms: Rooms = context.obj[Rooms]
    policy = Policy(slo_ms=slo_ms, moves_per_hour=moves_per_hour)
    window_s = max(20.0, 10 * interval)
    options = Options(
        function, namespace, shards, prometheus, interval, window_s=window_s, metrics_port=metrics_port, dry_run=dry_run
    )
    serve(rooms.problem(nodes, model), read.goal(goal), policy, options)
