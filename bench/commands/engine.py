"""Commands about one machine and the engine on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.shared import BenchData, Json, Rooms, Tier, labelled


def profile_node(
    model: Annotated[Path, typer.Option(help="The tier's artifact.")] = Path("var/edge"),
    name: Annotated[str, typer.Option(help="The node's name; by default the machine's.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 2,
    watts: Annotated[float | None, typer.Option(min=0, help="What it draws while it computes.")] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine with a tier's layers and print it as a nodes file for `plan`.

    Example: edgecascade profile-node --model var/edge --name kiosk-1
    """
    from bench.profile import Plan, profile
    from bench.progress import bar

    with bar("measuring") as progress:
        found = profile(model, Plan(threads=threads), progress, name, watts)
    typer.echo(json.dumps(found.as_dict()) if as_json else found.as_yaml(), nl=as_json)


def grammar(
    tier: Annotated[Path, typer.Argument(help="The artifact of a tier that chats.")] = Path("var/edge"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in turns.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens an answer.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Of the engine.")] = 2,
    as_json: Json = False,
) -> None:
    """Measure what holding answers to a form costs, and what forced tokens save; the last line is JSON.

    Example: edgecascade bench grammar var/edge --rounds 9
    """
    from bench.grammar import measure, report

    report(measure(tier, rounds, max_tokens, threads), as_json=as_json)


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
    as_json: Json = False,
) -> None:
    """Measure what drafts of answers save, and whether they change the answers; the last line is JSON.

    Examples: edgecascade bench drafts var/edge --corrupt 0.2 --queries 200
              edgecascade bench drafts var/edge --drafts var/edge-gptq --corrupt 0
              edgecascade bench drafts var/edge --drafts none --lookup 4
              edgecascade bench drafts var/edge --shards 2 --hop-ms 5
    """
    from bench.drafts import Plan, figures, measure, report
    from bench.progress import bar

    rooms: Rooms = context.obj[Rooms]
    texts = [query.text for query in labelled(rooms, data, ["assistant"], queries)]
    with bar("asking") as progress:
        plan = Plan(tier, source, corrupt, lookup, exact, max_tokens, threads, shards, hop_ms)
        asked = measure(plan, texts, progress)
    report(figures(asked), as_json=as_json)


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

    rooms: Rooms = context.obj[Rooms]
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
