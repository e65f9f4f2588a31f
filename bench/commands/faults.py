"""Commands that break, cut, replace and scale what is asked meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.shared import SKILLS, BenchData, Json, Rooms, labelled


def faults(
    target: Annotated[str, typer.Argument(help="What to pass on to, http://host:port.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0: a free port.")] = 0,
    control: Annotated[int, typer.Option(min=0, max=65535, help="Where to take orders; 0: a free port.")] = 0,
    orders: Annotated[str, typer.Option("--faults", help="What to begin with, as JSON.")] = "{}",
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
) -> None:
    """Run a TCP proxy that delays, thins, cuts, garbles or swallows, and counts bytes; until Ctrl-C.

    Examples: edgecascade bench faults http://127.0.0.1:5001 --port 7001 --control 7002
              edgecascade bench faults http://127.0.0.1:5001 --faults '{"both": {"latency_ms": 6, "jitter_ms": 1}}'
    """
    from bench.faults.control import parse, serve

    serve(target, port, control, parse(orders), seed)


def chaos(
    context: typer.Context,
    requests: Annotated[int, typer.Option(min=1, help="Sent under each fault.")] = 200,
    callers: Annotated[int, typer.Option(min=1, help="So many at a time.")] = 2,
    deadline: Annotated[float, typer.Option(min=1, help="Of each request, ms.")] = 250.0,
    kind: Annotated[list[str] | None, typer.Option(help="This fault; may be given again. All by default.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Length of each rate around saturation; 0: none.")] = 5.0,
    slowdown: Annotated[float, typer.Option(min=1, help="Of both tiers: what stands for slower machines.")] = 2.0,
    flood_device: Annotated[float, typer.Option(min=1, help="SLOWDOWN of the device in the floods.")] = 13.0,
    flood_edge: Annotated[float, typer.Option(min=1, help="Of the edge: as here, 38 and 92 ms, or so.")] = 2.85,
    data: BenchData = None,
    as_json: Json = False,
) -> None:
    """Break each tier in each way: is every request answered, in time, truthfully? Then flood them.

    Examples: edgecascade bench chaos --json
              edgecascade bench chaos --kind stalled --kind garbage --requests 1000 --seconds 0
    """
    from bench.chaos import KINDS, Plan
    from bench.errors import BenchError
    from bench.measure import chaos as measure
    from bench.saturation import Flooding
    from bench.slow_tiers import TIERS, Site

    rooms: Rooms = context.obj[Rooms]
    kinds = kind or list(KINDS)
    for name in set(kinds) - set(KINDS):
        raise BenchError(f"fault '{name}' is unknown; use {', '.join(KINDS)}")
    site, flooded = Site(dict.fromkeys(TIERS, slowdown)), Site({"device": flood_device, "edge": flood_edge})
    plan, queries = Plan(requests, callers, deadline), labelled(rooms, data, list(SKILLS), 100)
    measure(rooms.start, queries, site, plan, kinds, Flooding(flooded, seconds), as_json=as_json)


def autoscale(
    context: typer.Context,
    low: Annotated[float, typer.Option(min=0.01, help="Requests a second before and after the step.")] = 0.5,
    high: Annotated[float, typer.Option(min=0.01, help="Requests a second in the step.")] = 6.0,
    seconds: Annotated[float, typer.Option(min=10, help="Length of the step.")] = 60.0,
    after: Annotated[float, typer.Option(min=10, help="How long to watch after it.")] = 150.0,
    slowdown: Annotated[float, typer.Option(min=1, help="Of each forward pass: what stands for a larger tier.")] = 20.0,
    slo_seconds: Annotated[float, typer.Option(min=0.01, help="The latency to hold for 95 %.")] = 1.5,
    max_replicas: Annotated[int, typer.Option(min=1, max=20, help="At most so many replicas.")] = 6,
    record: Annotated[Path | None, typer.Option(help="Keep the recording here, JSON lines.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write replicas, load and latency to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Show the local autoscaler under a step load: 0 → 1 → n → 1, requests that failed, the 95th percentile.

    Example: edgecascade bench autoscale --plot autoscale.png
    """
    from bench.autoscale import SKILL, Plan, measure
    from bench.queries import OWN_QUERIES, read

    rooms: Rooms = context.obj[Rooms]
    plan = Plan(low, high, seconds, after, slowdown, slo_seconds, max_replicas)
    queries = [query for query in read(OWN_QUERIES, None) if query.skill == SKILL]
    measure(rooms.autoscaled, queries, plan, record, plot, as_json=as_json)


def sites(
    context: typer.Context,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second.")] = 10.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each phase: joined, cut, joined again.")] = 8.0,
    deadline: Annotated[float, typer.Option(min=1, help="Of each request, ms.")] = 2000.0,
    data: BenchData = None,
    as_json: Json = False,
) -> None:
    """Cut the link between a device site and an edge site under load, and see whether all is answered and flagged.

    Example: edgecascade bench sites --rate 20 --seconds 20 --json
    """
    from bench.measure import sites as measure
    from bench.sites import Plan

    rooms: Rooms = context.obj[Rooms]
    measure(rooms.site, labelled(rooms, data, list(SKILLS), 100), Plan(rate, seconds, deadline), as_json=as_json)


def rolling(
    context: typer.Context,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second.")] = 20.0,
    pause: Annotated[float, typer.Option(min=0, help="Seconds before and after each restart.")] = 2.0,
    deadline: Annotated[float, typer.Option(min=1, help="Of each request, ms.")] = 5000.0,
    data: BenchData = None,
    as_json: Json = False,
) -> None:
    """Replace every function in turn under load, and count the requests that fail.

    Example: edgecascade bench rolling --rate 20 --json
    """
    from bench.measure import rolling as measure
    from bench.rolling import Plan

    rooms: Rooms = context.obj[Rooms]
    measure(rooms.whole, labelled(rooms, data, list(SKILLS), 100), Plan(rate, pause, deadline), as_json=as_json)
