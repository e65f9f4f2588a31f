"""`edgecascade simulate`, as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a pipe.")]


def simulate(
    trace: Annotated[
        list[str] | None,
        typer.Argument(help="CSV files (TIMESTAMP,ContextTokens,GeneratedTokens), or steady, diurnal, bursts, flash."),
    ] = None,
    load: Annotated[str, typer.Option(help="Times each trace's own rate; several by commas.")] = "1",
    slo: Annotated[float, typer.Option(min=0.001, help="Seconds a request may take.")] = 10.0,
    percentile: Annotated[float, typer.Option(min=0.01, max=0.9999, help="Share of requests within it.")] = 0.95,
    cold_start: Annotated[float, typer.Option(min=0, help="Seconds until a new replica serves.")] = 10.0,
    poll: Annotated[float, typer.Option(min=1, help="Seconds between two looks of the HPA.")] = 15.0,
    max_replicas: Annotated[int, typer.Option(min=1, help="The most of any policy.")] = 400,
    slots: Annotated[int, typer.Option(min=1, help="Requests that a replica serves at once.")] = 1,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests a second of generated traces.")] = 6.0,
    seconds: Annotated[float, typer.Option(min=60, help="Length of generated traces.")] = 3600.0,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    devices: Annotated[int, typer.Option(min=0, help="Simulate a fleet of so many devices for a day instead.")] = 0,
    sites: Annotated[int, typer.Option(min=1, help="Of the fleet, with four edge nodes each.")] = 50,
    hours: Annotated[float, typer.Option(min=0.01, help="Of the fleet.")] = 24.0,
    plot: Annotated[Path | None, typer.Option(help="Draw the frontiers to this PNG or SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Simulate autoscalers side by side on traces, tuned on the first half, scored on the second; or a fleet's day.

    Examples: edgecascade simulate bursts flash --plot frontiers.png
              edgecascade simulate conv.csv code.csv --load 0.25,1,4 --jobs 2 --json
              edgecascade simulate --devices 10000
    """
    from bench.errors import BenchError
    from bench.load import rates
    from bench.simulate.fleet import Plan
    from bench.simulate.report import fleet, policies, traces
    from bench.simulate.scale import Site
    from scaler.values import Target

    if devices:
        fleet(Plan(devices=devices, sites=sites, length_s=3600 * hours, seed=seed), as_json=as_json)
        return
    if not trace:
        raise BenchError("name a trace: edgecascade simulate bursts, or a CSV file; or a fleet: --devices 10000")
    chosen = traces(trace, rates(load), rate, seconds, seed)
    site = Site(Target(slo, percentile, 1, max_replicas, cold_start, slots), poll_s=poll)
    policies(chosen, site, jobs, plot, as_json=as_json)
