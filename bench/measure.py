"""`edgecascade eval` and the benches of a running bundle: run, plot, and print for a person or a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import leaks as leaks_of
from bench import links as links_of
from bench import overhead as own_cost
from bench import plot as plots
from bench import ranked as ranked_of
from bench import rolling as roll
from bench import rpc as rpc_of
from bench import saturation, tables
from bench import sites as two_sites
from bench import survival as survival_of
from bench.arms import ARMS, SEQUENTIAL, TITLES
from bench.bundle import Start, StartSite, StartWhole, Variant
from bench.cascade import compare, frontier, rows, stage_for, tier_means, verdict, ways
from bench.chaos import Plan, as_dict, cases
from bench.client import Client
from bench.demo import Material, ask_with_progress, baseline_outcomes
from bench.errors import BenchError
from bench.load import Load, Run, Shot, summary
from bench.metrics import row
from bench.progress import bar, terminal
from bench.queries import Query
from bench.sharded import n_layers
from bench.slow_tiers import Site, slowed_to

TIERS = ("device", "edge", "auto")
TRIAL_QUERIES = 30
P99_MS, POINTS = 80.0, 0.5  # what the issue asks of a cascade


def models_of(tier: str) -> Sequence[str]:
    """The models that `--tier` names, all if it is empty; raises `BenchError`."""
    if tier and tier not in TIERS:
        raise BenchError(f"tier '{tier}' is unknown; use one of {', '.join(TIERS)}")
    return [tier] if tier else TIERS


def evaluate(client: Client, skill: str, material: Material, tier: str, plot: Path | None, *, as_json: bool) -> None:
    """Ask one skill's queries and print the rows; raises `BenchError`."""
    models = models_of(tier)
    if plot and tier:
        raise BenchError("a plot needs both tiers; leave --tier out")
    progress = Console(stderr=True)
    found = ask_with_progress(client, material.queries, models, progress)
    baseline = baseline_outcomes(material, progress)
    rows = {**found.rows, **({"linear": row(baseline[skill])} if skill in baseline else {})}
    if plot:
        title = f"{skill}, {len(material.queries)} queries"
        plots.trade_off(found.trade_off(), rows.get("cascade"), rows.get("oracle"), title, plot)
    if as_json:
        print(json.dumps({**found.as_dict(), "rows": {name: r.as_dict() for name, r in rows.items()}}))
        return
    console = terminal(stderr=False)
    console.print(tables.main_table(rows, f"{skill}: {material.origin}"), tables.detail_table(rows))
    console.print(
        f"{len(material.queries)} queries; wrong among local answers: {tables.percent(found.realised_local_error)} %"
    )


def send(
    client: Client,
    load: Load,
    arrivals: Sequence[float],
    callers: int,
    requests: int,
    report: Callable[[int, int, str], None],
) -> list[Shot]:
    """Open loop if there are arrivals, closed loop otherwise; raises `BenchError`."""
    total, sent = len(arrivals) or requests, count(1)
    run = Run(client, load, lambda: report(next(sent), total, ""))
    return run.open(arrivals) if arrivals else run.closed(callers, requests)


def print_load(shots: Sequence[Shot], plot: Path | None, *, as_json: bool) -> None:
    """Print a run's figures; raises `BenchError` if nothing was answered."""
    if plot:
        plots.load(shots, plot)
    figures = summary(shots)
    if as_json:
        print(json.dumps(figures))
    else:
        terminal(stderr=False).print(tables.load_table(figures), tables.load_line(figures))
    if not figures["answered"]:
        raise BenchError(f"none of {len(shots)} requests was answered")


def site_of(start: Start, wanted_ms: Mapping[str, float] | None, network_ms: float, queries: Sequence[Query]) -> Site:
    """The tiers as they are, or slowed to means that trials on some of the queries find."""
    if wanted_ms is None:
        return Site(network_ms=network_ms)
    console = terminal()
    some = queries[:: max(1, len(queries) // TRIAL_QUERIES)]
    console.print(f"slowing the tiers to {wanted_ms} ms, trials of {len(some)} queries")
    return slowed_to(partial(tier_means, start, ARMS, some), wanted_ms, network_ms, console.print)


def cascade(
    start: Start,
    queries: Sequence[Query],
    site: Site,
    deadline_ms: float,
    deadlines_ms: Sequence[float],
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    """Compare every way to join the tiers, print the table and, as the last line, JSON; raises `BenchError`."""
    chosen = ways(ARMS, deadline_ms, deadlines_ms)
    with stage_for(start, site, ARMS) as (stage, clients), bar("asking") as report:
        asked = count(1)
        found = compare(stage, clients, chosen, queries, lambda: report(next(asked), len(queries), ""))
    figures = rows(found)
    points = frontier(found, figures)
    if plot:
        bar_accuracy = figures[SEQUENTIAL].row.accuracy if SEQUENTIAL in figures else None
        plots.frontier(points, TITLES, bar_accuracy, plot)
    said: dict[str, Any] = {
        "n": len(queries),
        "slowdown": dict(site.slowdown),
        "network_ms": site.network_ms,
        "edge_threads": site.edge_threads,
        "rows": {name: f.as_dict() for name, f in figures.items()},
        "frontier": [asdict(point) for point in points],
        "link_bytes": {"counted": found.link_bytes, "reported": found.reported_bytes},
        "verdict": verdict(figures, P99_MS, POINTS),
    }
    if as_json:
        print(json.dumps(said))
        return
    title = f"{len(queries)} queries, {site.network_ms:g} ms of network, slowdown {_factors(site)}"
    terminal(stderr=False).print(tables.cascade_table(figures, TITLES, title))


def overhead(start: Start, queries: Sequence[Query], pairs: int, rate: float, seconds: float, *, as_json: bool) -> None:
    """Measure what the dispatcher adds and print it; raises `BenchError`."""
    names = (own_cost.DISPATCHER, own_cost.TIER)
    with start({name: Variant(name) for name in names}) as running, bar("asking in pairs") as report:
        asked = count(1)
        figures = own_cost.measure(running, queries, pairs, rate, seconds, lambda: report(next(asked), pairs, ""))
    if as_json:
        print(json.dumps(figures))
    else:
        terminal(stderr=False).print(tables.added_table(figures))


def chaos(
    start: Start,
    queries: Sequence[Query],
    site: Site,
    plan: Plan,
    kinds: Sequence[str],
    floods: saturation.Flooding,
    *,
    as_json: bool,
) -> None:
    """Break the tiers, then flood them, and print what came of it; raises `BenchError`."""
    with bar("breaking") as report:
        found = cases(start, site, queries, plan, kinds, report)
    most, steps = saturation.around(start, floods, queries, plan.deadline_ms) if floods.seconds else (0.0, [])
    if as_json:
        beyond = {"saturation": saturation.as_dict(most, steps)} if steps else {}
        print(json.dumps({"faults": as_dict(found), **beyond}))
        return
    console = terminal(stderr=False)
    title = f"{plan.requests} requests a fault, deadline {plan.deadline_ms:g} ms, slowdown {_factors(site)}"
    console.print(tables.chaos_table(found, title))
    for c in found:
        for lie, times in c.lies.items():
            console.print(f"{c.name}: {times} x {lie}")
    if steps:
        console.print(tables.saturation_table(steps, f"saturation: {most:.1f} good answers a second"))


def sites(start: StartSite, queries: Sequence[Query], plan: two_sites.Plan, *, as_json: bool) -> None:
    """Cut the link between two sites and print what came of it; raises `BenchError` if a demand does not hold."""
    with bar("asking") as report:
        found = two_sites.run(start, queries, plan, report)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        title = f"{plan.rate:g} requests/s, {plan.seconds:g} s a phase, deadline {plan.deadline_ms:g} ms"
        terminal(stderr=False).print(tables.sites_table(found.phases, title))
        print(f"escalation resumed {tables.number(found.resumed_s)} s after the sites were joined again")
    _held(found.failings)


def rolling(start: StartWhole, queries: Sequence[Query], plan: roll.Plan, *, as_json: bool) -> None:
    """Replace every function and print what came of it; raises `BenchError` if a demand does not hold."""
    with bar("replacing") as report:
        found = roll.run(start, queries, plan, report)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        turns = ", ".join(f"{r.name} ({r.took_s:.1f} s)" for r in found.restarts)
        print(f"replaced: {turns}")
        print(
            f"{found.sent} requests at {plan.rate:g}/s: {found.failed} failed, {found.flagged} flagged {found.reasons}"
        )
        print(
            f"p50 {tables.number(found.p50_ms)} ms, p99 {tables.number(found.p99_ms)} ms; answered by {found.sources}"
        )
    _held(found.failings)


def _held(failings: Sequence[str]) -> None:
    if failings:
        raise BenchError(f"does not hold: {'; '.join(failings)}")


def links(start: Start, plan: links_of.Plan, plot: Path | None, *, as_json: bool) -> None:
    """Measure what cutting a tier costs and print it; raises `BenchError`."""
    with bar("asking") as report:
        run = links_of.measure(start, plan, report)
    if plot:
        plots.links(run, plot)
    if as_json:
        print(json.dumps(run.as_dict()))
        return
    console = terminal(stderr=False)
    console.print(tables.links_table(run.rows, f"{plan.tokens} tokens, {plan.callers} at once, {plan.states}"))
    up, down = run.bytes_per_token_up, run.bytes_per_token_down
    console.print(f"bytes a token over a link: {up:.0f} there, {down:.0f} back")
    most, least = run.transport_ms
    console.print(f"of a hop, gRPC takes {most:.2f} ms there and back, {least:.2f} at least")
    for loss in run.losses:
        console.print(
            f"states in {loss.states}: {loss.bytes_per_token} bytes a token, "
            f"KL {loss.kl:.2g} nats, same best token {100 * loss.top1_agreement:.1f} %"
        )
    for d in run.delayed:
        console.print(f"{d.delay_ms:g} ms away: {d.token_ms:.2f} ms a token; compute and hops alone {d.limit_ms:.2f}")


def ranked(start: Start, plan: ranked_of.Plan, *, as_json: bool) -> None:
    """Measure what splitting a tier among ranks costs and print it; raises `BenchError`."""
    with bar("asking") as report:
        run = ranked_of.measure(start, plan, n_layers(plan.tier), report)
    if as_json:
        print(json.dumps(run.as_dict()))
        return
    terminal(stderr=False).print(tables.ranked_table(run.rows, f"{plan.tokens} tokens, {plan.threads} threads each"))
    print(f"bytes a token between two ranks: {run.bytes_per_token_up:.0f} there, {run.bytes_per_token_down:.0f} back")
    for d in run.delayed:
        print(f"{d.delay_ms:g} ms away: {d.token_ms:.1f} ms a token; compute and {d.trips} ways alone {d.limit_ms:.1f}")


def survival(start: Start, plan: survival_of.Plan, *, as_json: bool) -> None:
    """Kill shards while they answer and print what came of it; raises `BenchError`."""
    with bar("killing") as report:
        found = survival_of.Figures.of(survival_of.measure(start, plan, report))
    if as_json:
        print(json.dumps({"trials": plan.trials, "replicas": plan.replicas, **asdict(found)}))
        return
    print(
        f"{plan.trials} kills, {plan.shards} ranges of {plan.replicas}: {found.identical} identical answers, ", end=""
    )
    print(f"{found.fallbacks} declared fallbacks, {found.lost} lost")
    if found.resume_ms_p50 is not None:
        p50, most = found.resume_ms_p50, found.resume_ms_max
        print(f"the longest pause after a kill: {p50:.0f} ms (median), {most:.0f} at most")
    for why, times in found.reasons.items():
        print(f"lost {times} x: {why}")


def leaks(start: Start, plan: leaks_of.Plan, *, as_json: bool) -> None:
    """Ask shards many times and print what they hold before and after; raises `BenchError`."""
    with bar("asking") as report:
        found = leaks_of.measure(start, plan, report)
    if as_json:
        print(json.dumps({"shards": plan.shards, **found.as_dict()}))
        return
    print(f"{found.answered} answered, {found.left} left by their callers, {found.refused} failed")
    for when, held in (("before", found.before), ("after", found.after)):
        print(
            f"{when}: {held.sessions} sessions, {held.files} file descriptors, {held.threads} threads, "
            f"{held.resident_bytes / 1e6:.0f} MB"
        )


def rpc(file: Path, plan: rpc_of.Plan, *, as_json: bool) -> None:
    """Let llama.cpp decode whole and cut, and print both; raises `BenchError`."""
    with bar("decoding") as report:
        found = rpc_of.measure(file, plan, report)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    print(
        f"llama.cpp, {found.file}, {found.threads} threads a process: {found.whole_ms:.2f} ms a token whole, ", end=""
    )
    print(f"{found.cut_ms:.2f} with {found.layers_away} layers and the head over RPC; the hop adds {found.hop_ms:.2f}")


def _factors(site: Site) -> str:
    return ", ".join(f"{name} {factor:.2f}" for name, factor in site.slowdown.items())
