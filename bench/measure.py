"""`edgecascade eval` and `edgecascade bench load`: run, plot, and print for a person or a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from rich.console import Console

from bench import plot as plots
from bench import tables
from bench.client import Client
from bench.demo import Material, ask_with_progress, baseline_outcomes
from bench.errors import BenchError
from bench.load import Load, Run, Shot, summary
from bench.metrics import row
from bench.progress import terminal

TIERS = ("device", "edge", "auto")


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
