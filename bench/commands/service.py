"""Commands that ask: once, many times, with labels, from many callers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.shared import SKILLS, BenchData, Json, Rooms, Skill, Skills, labelled
from bench.errors import BenchError

Url = Annotated[str, typer.Option(help="A bundle's gateway; by default the local one, started if none runs.")]
ExitThreshold = Annotated[
    str, typer.Option(help="The edge's early exits: off, tuned, or the confidence from which they answer.")
]


def ask(
    context: typer.Context,
    text: Annotated[str | None, typer.Argument(help="What to say; with --chat it may be left out.")] = None,
    skill: Skill = "assistant",
    url: Url = "",
    chat: Annotated[bool, typer.Option("--chat", help="Chat, and keep talking until an empty line.")] = False,
    as_json: Json = False,
) -> None:
    """Ask once, or talk: the answer on stdout; tier, confidence and milliseconds on stderr.

    Examples: edgecascade ask "wake me at six"      edgecascade ask --skill home "play some jazz"
              edgecascade ask --chat "Hello!"       edgecascade ask "pay my bill" --json | jq .frame
    """
    from bench.ask import once, talk
    from bench.client import Client

    if not text and not chat:
        raise BenchError('say something: edgecascade ask "wake me at six", or edgecascade ask --chat')
    rooms: Rooms = context.obj[Rooms]
    with rooms.service(url, {}) as address, Client(address) as client:
        if chat or skill == "chat":
            talk(client, text, as_json=as_json, goes_on=chat)
        else:
            once(client, skill, text or "", as_json=as_json)


def evaluate(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help='{"text", "intent", "slots"?} lines, or the sets\' folder.')],
    skill: Skill = "assistant",
    tier: Annotated[str, typer.Option(help="device, edge or auto (the cascade) alone; all of them by default.")] = "",
    split: Annotated[str, typer.Option(help="Which split, if --data is a folder.")] = "test",
    limit: Annotated[int, typer.Option(min=0, help="At most so many queries, drawn by a fixed seed.")] = 0,
    linear: Annotated[bool, typer.Option(help="Fit the linear baseline too, if --data is a folder.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Write accuracy against share local to this PNG.")] = None,
    url: Url = "",
    exit_threshold: ExitThreshold = "",
    as_json: Json = False,
) -> None:
    """Measure the tiers, the cascade and the oracle on labelled queries.

    Example: edgecascade eval --data my.jsonl --skill banking --plot banking.png
    """
    from bench.client import Client
    from bench.demo import Material
    from bench.measure import evaluate as measure
    from bench.measure import models_of
    from bench.queries import read, sample

    rooms: Rooms = context.obj[Rooms]
    models_of(tier)
    published = data.is_dir()
    queries = rooms.published(data, split, skill) if published else read(data, skill)
    queries = sample(queries, limit) if limit else queries
    train = rooms.published(data, "train", skill) if linear and not tier and published else []
    variables = {"EDGE_EXIT_THRESHOLD": exit_threshold} if exit_threshold else {}
    with rooms.service(url, variables) as address, Client(address) as client:
        measure(client, skill, Material(queries, str(data), train), tier, plot, as_json=as_json)


def demo(context: typer.Context, as_json: Json = False) -> None:
    """Build what is missing, start the bundle, ask 300 held-out questions, print the table, chat, stop."""
    from bench.client import Client
    from bench.demo import gather, run
    from bench.progress import terminal

    rooms: Rooms = context.obj[Rooms]
    console, material = terminal(stderr=as_json), gather(rooms.data, rooms.published)
    with rooms.site("", {}) as address, Client(address) as client:
        figures = run(client, material, console)
    if as_json:
        typer.echo(json.dumps(figures))


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

    rooms: Rooms = context.obj[Rooms]
    queries = labelled(rooms, data, skill or list(SKILLS), limit)
    wanted = None if as_is else {"device": device_ms, "edge": edge_ms}
    site = site_of(rooms.start, wanted, network_ms, queries)
    more = rates(deadlines) if deadlines else []
    measure(rooms.start, queries, site, deadline, more, plot, as_json=as_json)


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

    rooms: Rooms = context.obj[Rooms]
    queries = labelled(rooms, data, list(SKILLS), 100)
    measure(rooms.start, queries, pairs, rate, seconds, as_json=as_json)
