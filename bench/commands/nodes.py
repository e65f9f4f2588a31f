"""Commands about a tier on several nodes: what cutting costs, where parts go, what a node's end does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.shared import Json, Rooms


def links(
    context: typer.Context,
    tier: Annotated[Path | None, typer.Option(help="The artifact of a tier that chats; by default the edge's.")] = None,
    shards: Annotated[str, typer.Option(help="Numbers of shards; 1, the tier as it is, is among them.")] = "1,2,4",
    delays: Annotated[str, typer.Option(help="Of the link, one way, in ms.")] = "0,1,2,5,10",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of all ways; figures are their medians.")] = 9,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens an answer.")] = 64,
    callers: Annotated[int, typer.Option(min=1, help="Answers at once, where that is what counts.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Of the unsplit tier's engine, and of all shards' together.")] = 2,
    states: Annotated[str, typer.Option(help="fp32, or with a loss fp16 or int8.")] = "fp32",
    spin: Annotated[bool, typer.Option("--spin", help="Shards run with SHARD_SPIN=1.")] = False,
    prose_tokens: Annotated[int, typer.Option(min=0, help="Prose to measure what shorter states lose; 0: not.")] = 256,
    plot: Annotated[Path | None, typer.Option(help="Write time against link delay to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what cutting a tier costs: time and bytes a hop, throughput, and what slower links do.

    Examples: edgecascade bench links --json
              edgecascade bench links --shards 1,2 --delays 0 --states fp16 --prose-tokens 0
    """
    from bench.links import Plan
    from bench.load import rates
    from bench.measure import links as measure

    rooms: Rooms = context.obj[Rooms]
    counts, delays_ms = [int(count) for count in rates(shards)], [float(delay) for delay in delays.split(",")]
    folder = tier or rooms.home() / "edge"
    plan = Plan(folder, counts, rounds, tokens, callers, delays_ms, threads, states, spin, prose_tokens)
    measure(rooms.start, plan, plot, as_json=as_json)


def ranked(
    context: typer.Context,
    tier: Annotated[Path | None, typer.Option(help="The artifact of a tier that chats; by default the edge's.")] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks; 1, the tier as it is, is among them.")] = "1,2",
    delays: Annotated[str, typer.Option(help="Of the link between two ranks, one way, in ms.")] = "0,1,5",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of all ways; figures are their medians.")] = 5,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens an answer.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Of each rank's engine, and of the unsplit tier's.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure what splitting a tier among ranks costs: time, CPU time and bytes a token, and what slower links do.

    Examples: edgecascade bench ranked --json
              edgecascade bench ranked --ranks 1,2,3,4 --delays 0
    """
    from bench.load import rates
    from bench.measure import ranked as measure
    from bench.ranked import Plan

    rooms: Rooms = context.obj[Rooms]
    counts, delays_ms = [int(count) for count in rates(ranks)], [float(delay) for delay in delays.split(",")]
    plan = Plan(tier or rooms.home() / "edge", counts, rounds, tokens, delays_ms, threads)
    measure(rooms.start, plan, as_json=as_json)


def survival(
    context: typer.Context,
    trials: Annotated[int, typer.Option(min=1, help="Kills.")] = 100,
    seed: Annotated[int, typer.Option(help="Of what is asked, who is killed and when.")] = 1,
    shards: Annotated[int, typer.Option(min=2, help="Ranges that the layers are cut into.")] = 2,
    replicas: Annotated[int, typer.Option(min=1, max=4, help="Of each range; 1: the fallback is what counts.")] = 2,
    tier: Annotated[Path | None, typer.Option(help="The artifact of a tier that chats; by default the edge's.")] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens an answer.")] = 48,
    threads: Annotated[int, typer.Option(min=1, help="Of each shard's engine.")] = 2,
    as_json: Json = False,
) -> None:
    """Kill shards (SIGKILL) in the middle of answers: these must be the same to the letter, or declared fallbacks.

    Examples: edgecascade bench survival --json --trials 100 --seed 1
              edgecascade bench survival --replicas 1 --trials 20
    """
    from bench.measure import survival as measure
    from bench.survival import Plan

    rooms: Rooms = context.obj[Rooms]
    plan = Plan(tier or rooms.home() / "edge", shards, replicas, trials, seed, tokens, threads=threads)
    measure(rooms.start, plan, as_json=as_json)


def leaks(
    context: typer.Context,
    requests: Annotated[int, typer.Option(min=1, help="Requests that count.")] = 10_000,
    tier: Annotated[Path | None, typer.Option(help="The artifact of a tier that chats; by default the edge's.")] = None,
    shards: Annotated[int, typer.Option(min=2, help="Ranges that the layers are cut into.")] = 2,
    callers: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 4,
    leave_each: Annotated[int, typer.Option(min=1, help="Each so-manieth caller leaves in mid-answer.")] = 3,
    as_json: Json = False,
) -> None:
    """Ask shards many times, with callers who leave: sessions and file descriptors must be as before.

    Examples: edgecascade bench leaks --json
              edgecascade bench leaks --requests 500 --shards 3
    """
    from bench.leaks import Plan
    from bench.measure import leaks as measure

    rooms: Rooms = context.obj[Rooms]
    plan = Plan(tier or rooms.home() / "edge", shards, requests, callers, leave_each)
    measure(rooms.start, plan, as_json=as_json)


def rpc(
    context: typer.Context,
    layers: Annotated[int, typer.Option(min=1, help="The last ones, which another process runs.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Turns; figures are their medians.")] = 7,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens a turn.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Of each process.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure what cutting SmolLM2 costs llama.cpp, by its RPC backend: beside `bench links`, which cuts ours.

    Needs the peers: make bench-peers, then .venv-bench/bin/edgecascade bench rpc

    Example: edgecascade bench rpc --rounds 9 --json
    """
    from bench.measure import rpc as measure
    from bench.progress import bar
    from bench.rpc import Plan

    rooms: Rooms = context.obj[Rooms]
    with bar("fetching") as report:
        file = rooms.smollm2(report)
    log = rooms.home() / "bench" / "rpc.log"
    measure(file, Plan(layers, rounds, tokens, threads, log), as_json=as_json)


def placement(
    nodes: Annotated[int, typer.Option(min=2, max=200, help="Nodes of each fleet.")] = 64,
    layers: Annotated[int, typer.Option(min=2, max=200, help="Layers of the model.")] = 80,
    fleets: Annotated[int, typer.Option(min=1, help="Fleets of each sort.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure how long planning takes for fleets drawn at random, and how far from the bound its plans may be.

    Example: edgecascade bench placement --nodes 64 --layers 80
    """
    from bench.placement import measure, report

    report(measure(nodes, layers, range(fleets)), nodes, layers, as_json=as_json)


def placed(
    context: typer.Context,
    tier: Annotated[Path | None, typer.Option(help="The artifact of a tier that chats; by default the edge's.")] = None,
    factors: Annotated[str, typer.Option(help="How much slower nodes are than each other, the head first.")] = "1,3,9",
    scale: Annotated[float, typer.Option(min=1, help="How much slower than here the fastest is.")] = 4.0,
    room: Annotated[int, typer.Option(min=1, help="Layers that fit into a node's memory.")] = 14,
    rounds: Annotated[int, typer.Option(min=1, help="Each measures the nodes and asks both cuts.")] = 9,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens an answer.")] = 48,
    as_json: Json = False,
) -> None:
    """Run slowed shards in the planned cut and in the even one: which is faster, and was it predicted? Ends in JSON.

    Examples: edgecascade bench placed --rounds 15
              edgecascade bench placed --factors 1,2,2 --room 12
    """
    from bench.load import rates
    from bench.placed import Effects, figures, measure, report
    from bench.progress import bar

    rooms: Rooms = context.obj[Rooms]
    what = Effects(tier or rooms.home() / "edge", rates(factors), scale, room, rounds, tokens)
    with bar("measuring") as progress:
        found = figures(measure(rooms.start, what, progress))
    report(found, as_json=as_json)


def rebalance(
    context: typer.Context,
    fault: Annotated[
        list[str] | None, typer.Option(help="throttle or kill; may be given again. Both by default.")
    ] = None,
    tier: Annotated[Path | None, typer.Option(help="The artifact of a tier that chats; by default the edge's.")] = None,
    rate: Annotated[float, typer.Option(min=0.05, help="Requests a second.")] = 0.5,
    before: Annotated[float, typer.Option(min=1, help="Seconds of load before the fault.")] = 20.0,
    after: Annotated[float, typer.Option(min=5, help="Seconds of load after it.")] = 90.0,
    replicas: Annotated[int, typer.Option(min=1, max=2, help="Nodes that run each range.")] = 1,
    slowdown: Annotated[float, typer.Option(min=1, help="By how much a throttled node gets slower.")] = 8.0,
    slo_factor: Annotated[float, typer.Option(min=1.1, help="The SLO, as a multiple of what the plan predicts.")] = 2.0,
    tokens: Annotated[int, typer.Option(min=4, help="Tokens an answer.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="Write each request's latency to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Throttle, or kill, a node under load: a new plan, and back under the SLO, without a lost request? Ends in JSON.

    Examples: edgecascade bench rebalance --plot rebalance.png
              edgecascade bench rebalance --fault kill --replicas 2
    """
    from bench.progress import bar
    from bench.rebalance import FAULTS, Trial, as_dict, check, measure, report

    rooms: Rooms = context.obj[Rooms]
    folder = tier or rooms.home() / "edge"
    runs = []
    for name in fault or FAULTS:
        trial = Trial(check(name), folder, rate, before, after, replicas, slowdown, slo_factor, tokens)
        with bar(name) as progress:
            runs.append(measure(rooms.placed, trial, progress))
    if plot:
        from bench.plot import rebalance as draw

        draw(runs, plot)
    report([as_dict(run) for run in runs], as_json=as_json)
