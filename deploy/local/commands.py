"""`edgecascade up`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.errors import StartError
from deploy.rooms import Rooms

if TYPE_CHECKING:  # only `up` needs them, not its `--help`
    from deploy.local.rebalance import Rebalance
    from deploy.stack import Stack

DEFAULT_PORT = 8080


def up(
    context: typer.Context,
    port: Annotated[
        int, typer.Option(envvar="EDGECASCADE_PORT", min=0, max=65535, help="The gateway's; 0: a free one.")
    ] = DEFAULT_PORT,
    only: Annotated[list[str] | None, typer.Option(help="Start this function only; may be given again.")] = None,
    site: Annotated[str, typer.Option(help="device or edge: this site's functions; EDGE_URL joins them.")] = "",
    secrets: Annotated[
        Path | None, typer.Option(help="The folder with stack.yml's secrets: keys are asked for, sealed tiers run.")
    ] = None,
    functions: Annotated[list[str] | None, typer.Argument(help="With --autoscale: which; edge by default.")] = None,
    autoscale: Annotated[bool, typer.Option("--autoscale", help="Run as many replicas as the scaler says.")] = False,
    min_replicas: Annotated[int, typer.Option(min=0, help="0: none while nobody asks.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, max=100, help="At most so many replicas.")] = 5,
    slo_seconds: Annotated[float, typer.Option(min=0.001, help="The latency to hold.")] = 2.0,
    percentile: Annotated[float, typer.Option(min=0.01, max=99.99, help="For this share: 0.95, or 95.")] = 0.95,
    cooldown: Annotated[float, typer.Option(min=0, help="Seconds without a request until there is none.")] = 60.0,
    window: Annotated[float, typer.Option(min=0, help="Seconds that fewer must have been wanted.")] = 30.0,
    record: Annotated[Path | None, typer.Option(help="Write replicas, load and latency here, JSON lines.")] = None,
    shards: Annotated[str, typer.Option(help="Cut a function's layers over processes: edge=2, or edge=0-7,8-29.")] = "",
    tensor: Annotated[str, typer.Option(help="Split a function's heads and columns over processes: edge=2.")] = "",
    exit_threshold: Annotated[
        str, typer.Option(help="The edge's early exits: off, tuned, or the confidence from which they answer.")
    ] = "",
    rebalance: Annotated[
        Path | None, typer.Option(help="A nodes file: cut the edge over them by plan, anew when one slows or dies.")
    ] = None,
    slowdown: Annotated[
        list[str] | None, typer.Option(help="With --rebalance: NODE=3 is so many times slower; may be given again.")
    ] = None,
) -> None:
    """Run the bundle of stack.yml on this machine until Ctrl-C.

    Examples: edgecascade up --port 9000 --only dispatcher --only device
              edgecascade up --site edge --port 9000
              EDGE_URL=http://127.0.0.1:9000/function/edge edgecascade up --site device --secrets .secrets
              edgecascade up --autoscale edge --min-replicas 0 --slo-seconds 1.5
              edgecascade up --shards edge=2
              edgecascade up --tensor edge=2
              edgecascade up --rebalance nodes.yaml --slowdown till=3
    """
    from deploy.local.up import serve, serve_autoscaled, serve_rebalanced

    if functions and not autoscale:
        raise StartError(
            "functions are named only to scale them: edgecascade up --autoscale edge; --only starts some alone"
        )
    if shards and tensor:
        raise StartError("--shards and --tensor cut the same model in two ways; choose one")
    if rebalance and (shards or tensor or autoscale):
        raise StartError("--rebalance cuts the edge tier by its own plan; leave --shards, --tensor and --autoscale out")
    rooms: Rooms = context.obj[Rooms]
    variables = {"EDGE_EXIT_THRESHOLD": exit_threshold} if exit_threshold else {}
    stack, settings = rooms.checkout.stack(tuple(only or ()), site, variables), rooms.checkout.settings(port, secrets)
    if secrets is None:
        rooms.ensure_edge(stack)
    if shards:
        stack = _sharded(rooms, stack, shards)
    if tensor:
        stack = _ranked(stack, tensor)
    if rebalance:
        serve_rebalanced(stack, settings, _rebalance(rooms, stack, rebalance, slowdown or [], slo_seconds))
        return
    if not autoscale:
        serve(stack, settings)
        return
    from deploy.local.autoscale import Autoscale, Timing

    timing = Timing(cooldown_s=cooldown, down_window_s=window)
    wanted = tuple(functions or ("edge",))
    options = Autoscale(wanted, slo_seconds, percentile, min_replicas, max_replicas, timing, record)
    serve_autoscaled(stack, settings, options)


def _sharded(rooms: Rooms, stack: Stack, wish: str) -> Stack:
    """The stack with a function in shards."""
    from deploy.local.process import free_ports
    from deploy.local.shards import parse_wish, ranges, sharded

    name, cut = parse_wish(wish)
    parts = ranges(cut, rooms.layers(_tier(rooms, stack, name)))
    return sharded(stack, name, parts, free_ports(len(parts) - 1))


def _ranked(stack: Stack, wish: str) -> Stack:
    """The stack with a function in ranks."""
    from deploy.local.process import free_ports
    from deploy.local.ranks import parse_ranks, ranked

    name, count = parse_ranks(wish)
    return ranked(stack, name, free_ports(count - 1))


def _rebalance(rooms: Rooms, stack: Stack, nodes: Path, slowdown: list[str], slo_s: float) -> Rebalance:
    """What `up --rebalance` runs: the edge tier over some nodes."""
    from deploy.local.placed import factors
    from deploy.local.rebalance import Rebalance
    from scaler.placement.rebalance import Policy

    problem = rooms.problem([nodes], _tier(rooms, stack, "edge"))
    policy = Policy(slo_ms=1e3 * slo_s)
    return Rebalance(problem, policy=policy, slowdown=factors(slowdown, [n.name for n in problem.nodes]))


def _tier(rooms: Rooms, stack: Stack, name: str) -> Path:
    """Where a function's tier lies on this machine."""
    from deploy.local.plan import here

    path = stack.only((name,)).functions[name].environment.get("MODEL_PATH", "")
    return Path(here(path, rooms.checkout.site()))
