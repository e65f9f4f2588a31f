"""`edgecascade bench …`: each command opens what it measures with, and nothing else.

Rooms that `bench` must not import are handed in by the command line, as the context's `obj`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench.bundle import Autoscaled, Start, StartPlaced, StartSite, StartWhole
from bench.queries import Query

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a pipe.")]
Skill = Annotated[str, typer.Option(help="assistant, home, banking or chat.")]
Tier = Annotated[Path, typer.Argument(help="A tier's folder, as `edgecascade build` writes it.")]
BenchData = Annotated[
    Path | None, typer.Option(help="JSON lines, or the published sets' folder, of which the test halves; else our own.")
]
Skills = Annotated[list[str] | None, typer.Option(help="This skill; may be given again. All by default.")]
SKILLS = ("assistant", "home", "banking")

app = typer.Typer(help="Measure a running service, the engine, or what a tier costs.", no_args_is_help=True)


@dataclass(frozen=True)
class Rooms:
    """What the benches need of other rooms.

    `smollm2` is the model's file, fetched if need be; `home` where things are built; `start` runs a bundle;
    `published` reads a split of the published sets for some skills; `autoscaled` runs a bundle that scales; `site` runs
    one site, `whole` all of stack.yml; `placed` runs the edge tier under the rebalancer.
    """

    smollm2: Callable[[Callable[[float, float, str], None]], Path]
    home: Callable[[], Path]
    start: Start
    published: Callable[..., Sequence[Query]]
    autoscaled: Autoscaled
    site: StartSite
    whole: StartWhole
    placed: StartPlaced


@app.command("faults")
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


@app.command("grammar")
def grammar(
    tier: Annotated[Path, typer.Argument(help="The artifact of a tier that chats.")] = Path("var/edge"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in turns.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens an answer.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Of the engine.")] = 2,
) -> None:
    """Measure what holding answers to a form costs, and what forced tokens save; the last line is JSON.

    Example: edgecascade bench grammar var/edge --rounds 9
    """
    from bench.grammar import measure, report

    report(measure(tier, rounds, max_tokens, threads))


@app.command("drafts")
def drafts(
    context: typer.Context,
    tier: Annotated[Path, typer.Argument(help="The artifact of a tier that chats.")] = Path("var/edge"),
    data: BenchData = None,
    queries: Annotated[int, typer.Option(min=1, help="At most so many, drawn by a fixed seed.")] = 1000,
    source: Annotated[
        str, typer.Option("--drafts", help="own: the tier's answers; none; or the folder of a tier that writes them.")
    ] = "own",
    corrupt: Annotated[float, typer.Option(min=0, max=1, help="Share of a draft's words that are replaced.")] = 0.1,
    lookup: Annotated[int, typer.Option(min=0, max=16, help="LOOKUP_TOKENS of the tier that is given drafts.")] = 0,
    exact: Annotated[bool, typer.Option(help="Run the tier with EXACT_DRAFTS.")] = True,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens an answer.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Of the engine.")] = 2,
    shards: Annotated[int, typer.Option(min=1, help="Cut the tier into so many shards, which call each other.")] = 1,
    hop_ms: Annotated[float, typer.Option(min=0, help="What a message between shards takes, which is waited.")] = 0.0,
) -> None:
    """Measure what drafts of answers save, and whether they change the answers; the last line is JSON.

    Examples: edgecascade bench drafts var/edge --corrupt 0.2 --queries 200
              edgecascade bench drafts var/edge --drafts var/edge-gptq --corrupt 0
              edgecascade bench drafts var/edge --drafts none --lookup 4
              edgecascade bench drafts var/edge --shards 2 --hop-ms 5
    """
    from bench.drafts import Plan, figures, measure, report
    from bench.progress import bar

    rooms: Rooms = context.obj
    texts = [query.text for query in _queries(rooms, data, ["assistant"], queries)]
    with bar("asking") as progress:
        plan = Plan(tier, source, corrupt, lookup, exact, max_tokens, threads, shards, hop_ms)
        asked = measure(plan, texts, progress)
    report(figures(asked))


@app.command("load")
def load(
    url: Annotated[str, typer.Argument(help="Any OpenAI-compatible address, without /v1.")],
    callers: Annotated[int, typer.Option(min=1, help="Closed loop: so many at a time.")] = 4,
    requests: Annotated[int, typer.Option(min=1, help="Closed loop: so many in all.")] = 100,
    rate: Annotated[str, typer.Option(help="Open loop: Poisson arrivals a second; several by commas are steps.")] = "",
    seconds: Annotated[float, typer.Option(help="Open loop: length of the run, or of each step.")] = 10.0,
    skill: Skill = "chat",
    model: Annotated[str, typer.Option(help="The model to name.")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer.")] = 32,
    data: Annotated[Path | None, typer.Option(help="JSON lines with the texts to send instead of our own.")] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Write latencies to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Send load and report latency, time to first token and errors.

    Examples: edgecascade bench load http://127.0.0.1:8080 --callers 8 --requests 200
              edgecascade bench load http://127.0.0.1:8080 --rate 2,5,10 --seconds 20 --plot load.png
    """
    from bench.client import Client
    from bench.load import Load, rates, steps
    from bench.measure import print_load, send
    from bench.progress import bar
    from bench.queries import OWN_QUERIES, read

    own_skill = None if skill == "chat" else skill
    texts = [query.text for query in read(data or OWN_QUERIES, own_skill)]
    arrivals = steps(rates(rate), seconds) if rate else []
    with Client(url, api_key=api_key or None) as client, bar("sending") as report:
        shots = send(client, Load(texts, skill, model, max_tokens), arrivals, callers, requests, report)
    print_load(shots, plot, as_json=as_json)


@app.command("cascade")
def cascade(
    context: typer.Context,
    data: BenchData = None,
    skill: Skills = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many queries a skill, by a fixed seed; 0: all.")] = 100,
    deadline: Annotated[float, typer.Option(min=1, help="What requests carry where speed is the point, ms.")] = 80.0,
    deadlines: Annotated[str, typer.Option(help="More deadlines by commas, for the frontier.")] = "",
    device_ms: Annotated[float, typer.Option(min=1, help="The device's mean reply.")] = 38.0,
    edge_ms: Annotated[float, typer.Option(min=1, help="The edge's mean reply, the network included.")] = 92.0,
    network_ms: Annotated[float, typer.Option(min=0, help="There and back between the sites.")] = 12.0,
    as_is: Annotated[bool, typer.Option("--as-is", help="Leave the tiers as fast as they are.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write accuracy against deadline to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Compare the ways to join the tiers, which stand for slower machines, on labelled queries.

    Examples: edgecascade bench cascade --json
              edgecascade bench cascade --data ../data --deadlines 60,100,140 --plot frontier.png
    """
    from bench.load import rates
    from bench.measure import cascade as measure
    from bench.measure import site_of

    rooms: Rooms = context.obj
    queries = _queries(rooms, data, skill or list(SKILLS), limit)
    wanted = None if as_is else {"device": device_ms, "edge": edge_ms}
    site = site_of(rooms.start, wanted, network_ms, queries)
    more = rates(deadlines) if deadlines else []
    measure(rooms.start, queries, site, deadline, more, plot, as_json=as_json)


@app.command("overhead")
def overhead(
    context: typer.Context,
    pairs: Annotated[int, typer.Option(min=10, help="Questions asked both ways.")] = 500,
    rate: Annotated[float, typer.Option(min=1, help="Requests a second of the open loop.")] = 50.0,
    seconds: Annotated[float, typer.Option(min=1, help="Length of the open loop, each way.")] = 40.0,
    data: BenchData = None,
    as_json: Json = False,
) -> None:
    """Measure what the dispatcher adds to asking the device tier directly: in pairs, and under load.

    Example: edgecascade bench overhead --pairs 1000
    """
    from bench.measure import overhead as measure

    rooms: Rooms = context.obj
    queries = _queries(rooms, data, list(SKILLS), 100)
    measure(rooms.start, queries, pairs, rate, seconds, as_json=as_json)


@app.command("chaos")
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

    rooms: Rooms = context.obj
    kinds = kind or list(KINDS)
    for name in set(kinds) - set(KINDS):
        raise BenchError(f"fault '{name}' is unknown; use {', '.join(KINDS)}")
    site, flooded = Site(dict.fromkeys(TIERS, slowdown)), Site({"device": flood_device, "edge": flood_edge})
    plan, queries = Plan(requests, callers, deadline), _queries(rooms, data, list(SKILLS), 100)
    measure(rooms.start, queries, site, plan, kinds, Flooding(flooded, seconds), as_json=as_json)


@app.command("autoscale")
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

    rooms: Rooms = context.obj
    plan = Plan(low, high, seconds, after, slowdown, slo_seconds, max_replicas)
    queries = [query for query in read(OWN_QUERIES, None) if query.skill == SKILL]
    measure(rooms.autoscaled, queries, plan, record, plot, as_json=as_json)


@app.command("sites")
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

    rooms: Rooms = context.obj
    measure(rooms.site, _queries(rooms, data, list(SKILLS), 100), Plan(rate, seconds, deadline), as_json=as_json)


@app.command("rolling")
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

    rooms: Rooms = context.obj
    measure(rooms.whole, _queries(rooms, data, list(SKILLS), 100), Plan(rate, pause, deadline), as_json=as_json)


@app.command("links")
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

    rooms: Rooms = context.obj
    counts, delays_ms = [int(count) for count in rates(shards)], [float(delay) for delay in delays.split(",")]
    folder = tier or rooms.home() / "edge"
    plan = Plan(folder, counts, rounds, tokens, callers, delays_ms, threads, states, spin, prose_tokens)
    measure(rooms.start, plan, plot, as_json=as_json)


@app.command("ranked")
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

    rooms: Rooms = context.obj
    counts, delays_ms = [int(count) for count in rates(ranks)], [float(delay) for delay in delays.split(",")]
    plan = Plan(tier or rooms.home() / "edge", counts, rounds, tokens, delays_ms, threads)
    measure(rooms.start, plan, as_json=as_json)


@app.command("survival")
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

    rooms: Rooms = context.obj
    plan = Plan(tier or rooms.home() / "edge", shards, replicas, trials, seed, tokens, threads=threads)
    measure(rooms.start, plan, as_json=as_json)


@app.command("placement")
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


@app.command("placed")
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

    rooms: Rooms = context.obj
    what = Effects(tier or rooms.home() / "edge", rates(factors), scale, room, rounds, tokens)
    with bar("measuring") as progress:
        found = figures(measure(rooms.start, what, progress))
    report(found, as_json=as_json)


@app.command("rebalance")
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

    rooms: Rooms = context.obj
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


@app.command("seal")
def seal(
    artifact: Tier,
    rounds: Annotated[int, typer.Option(min=3, help="Each opens the plain and the sealed one in turn.")] = 11,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 2,
    as_json: Json = False,
) -> None:
    """Measure what sealing costs when a tier is opened: a copy sealed under a passing key beside the plain one.

    Example: edgecascade bench seal var/edge --rounds 21
    """
    from bench.opening import compare, opening_pairs, print_comparison
    from bench.progress import bar

    with opening_pairs(artifact, threads) as pairs, bar("opening") as report:
        figures = compare(pairs, rounds, report)
    print_comparison(figures, as_json=as_json)


@app.command("engine")
def engine(
    context: typer.Context,
    peers: Annotated[str, typer.Option(help="Some of ours,llama.cpp,genai,optimum,transformers; all by default.")] = "",
    shape: Annotated[str, typer.Option(help="smollm2, or random weights: qwen05, 1b.")] = "smollm2",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of everybody; figures are their medians.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each contender.")] = 2,
    huge_pages: Annotated[bool, typer.Option(help="Start everybody with huge pages, as stack.yml starts ours.")] = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="Shows that all runs; its figures are not to be quoted.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write speed and loss to this PNG, and an SVG beside it.")] = None,
    as_json: Json = False,
) -> None:
    """Measure our engine against llama.cpp and others on the same weights, interleaved, quality included.

    Examples: edgecascade bench engine --plot engine.png      edgecascade bench engine --quick --peers ours
    """
    from bench.engine import Plan, finish, measure, model, show
    from bench.peers import chosen
    from bench.progress import bar, terminal

    rooms: Rooms = context.obj
    names = chosen(peers)
    plan = Plan(rounds=rounds, threads=threads, huge_pages=huge_pages)
    plan = plan.quick() if quick else plan
    with bar("measuring") as report:
        found = model(shape, lambda: rooms.smollm2(report), rooms.home() / "bench")
        run = measure(found, names, plan, report)
    console = terminal(stderr=as_json)
    if not as_json:
        show(run, found, plan, console)
    finish(run, plot, found.name, console, print)


def _queries(rooms: Rooms, data: Path | None, skills: Sequence[str], limit: int) -> list[Query]:
    """Labelled queries of some skills, shuffled together by a fixed seed; raises `BenchError`."""
    from bench.queries import OWN_QUERIES, read, sample

    if data is not None and data.is_dir():
        found = list(rooms.published(data, "test", *skills))
    else:
        named = read(data or OWN_QUERIES, skills[0] if len(skills) == 1 else None)
        found = [query for query in named if query.skill in skills]
    return sample(found, limit or len(found))
