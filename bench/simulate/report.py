"""`edgecascade simulate`: run, and print for a person or a pipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from bench.errors import BenchError
from bench.progress import Report, bar, terminal
from bench.simulate.arrivals import GENERATORS, Trace, read, scaled
from bench.simulate.fleet import Fleet, Plan
from bench.simulate.scale import Site
from bench.simulate.tune import OURS, Tuned, Verdict, grids, tuned, verdict
from bench.tables import number, percent


def traces(names: Sequence[str], loads: Sequence[float], rate: float, length_s: float, seed: int) -> list[Trace]:
    """Each named trace at each load; raises `BenchError` for a name that is neither a file nor a generator."""
    found = []
    for name in names:
        if name in GENERATORS:
            trace = GENERATORS[name](rate, length_s, seed)
        elif Path(name).is_file():
            trace = read(Path(name))
        else:
            raise BenchError(f"trace '{name}' is neither a file nor one of {', '.join(GENERATORS)}")
        found += [scaled(trace, load, seed) for load in loads]
    return found


def compare(chosen: Sequence[Trace], site: Site, jobs: int, report: Report) -> list[dict[str, Tuned]]:
    """All policies on each trace, on several processes."""
    found: list[dict[str, Tuned]] = [{} for _ in chosen]
    names = sorted(grids(chosen[0].first_half(), site), key=lambda name: name != OURS)  # what takes longest begins
    with ProcessPoolExecutor(jobs) as pool:
        waiting = {pool.submit(tuned, name, trace, site): (i, name) for name in names for i, trace in enumerate(chosen)}
        for done, future in enumerate(as_completed(waiting), 1):
            i, name = waiting[future]
            found[i][name] = future.result()
            report(done, len(waiting), f"{chosen[i].name}: {name}")
    return found


def policies(chosen: Sequence[Trace], site: Site, jobs: int, plot: Path | None, *, as_json: bool) -> None:
    """Compare, then print tables or JSON, and draw."""
    with bar("simulating") as report:
        found = compare(chosen, site, jobs, report)
    if plot:
        from bench.simulate.plots import frontiers

        frontiers([(trace.name, tune) for trace, tune in zip(chosen, found, strict=True)], plot)
    if as_json:
        print(
            json.dumps({"site": asdict(site), "traces": [_as_dict(t, f) for t, f in zip(chosen, found, strict=True)]})
        )
        return
    console = terminal(stderr=False)
    for trace, tune in zip(chosen, found, strict=True):
        console.print(_table(trace, tune, site), sentence(verdict(tune)))


def sentence(v: Verdict) -> str:
    """A verdict in words."""
    words = "[green]pass[/]" if v.passed else "[red]no[/]"
    late = (
        "nobody else is so cheap"
        if v.best_late is None
        else f"at this cost {v.best_late_by} has {percent(v.best_late)} % late"
    )
    cost = (
        "nobody else is so seldom late"
        if v.saved is None
        else f"{percent(v.saved)} % fewer replica-seconds than {v.best_replica_s_by} for the same"
    )
    return f"{words}: ours has {percent(v.late)} % late; {late}; {cost}"


def _table(trace: Trace, found: Mapping[str, Tuned], site: Site) -> Table:
    """Each policy as it was tuned to the target, scored on the second half."""
    title = (
        f"{trace.name}: {len(trace.arrivals)} requests; tuned on the first half to {100 * site.target.percentile:g} %"
        f" within {site.target.slo_s:g} s, scored on the second (simulated)"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for name in ("in time %", "replica-s", "kJ", "p50 s", "p95 s"):
        table.add_column(name, justify="right")
    table.add_column("setting")
    for name in grids(trace, site):
        one = found[name]
        o = one.second[one.chosen].outcome
        cells = (percent(1 - o.violations), number(o.replica_s, 0), number(o.joules / 1000), number(o.p50_s, 2))
        setting = one.second[one.chosen].setting.removeprefix(f"{name} ")
        table.add_row(name, *cells, number(o.p95_s, 2), setting, style="bold" if name == OURS else None)
    return table


def _as_dict(trace: Trace, found: Mapping[str, Tuned]) -> dict[str, Any]:
    v = verdict(found)
    return {
        "trace": trace.name,
        "requests": len(trace.arrivals),
        "verdict": {**asdict(v), "late_ratio": v.late_ratio, "saved": v.saved, "passed": v.passed},
        "policies": {
            name: {
                "chosen": one.second[one.chosen].setting,
                "frontier": [
                    {
                        "setting": scored.setting,
                        "attainment": 1 - scored.outcome.violations,
                        "replica_s": scored.outcome.replica_s,
                        "joules": scored.outcome.joules,
                        "p95_s": scored.outcome.p95_s,
                    }
                    for scored in one.second
                ],
            }
            for name, one in found.items()
        },
    }


def fleet(plan: Plan, *, as_json: bool) -> None:
    """Simulate a fleet and print what came of it."""
    with bar("simulating") as report:
        figures = Fleet(plan).run(lambda share: report(share, 1, f"{plan.devices} devices"))
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(title=f"{plan.devices} devices, {plan.sites} sites (simulated)", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in figures.items():
        said = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,.6g}"
        table.add_row(name.replace("_", " "), said)
    terminal(stderr=False).print(table)
