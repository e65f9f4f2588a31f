"""Tables for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from bench.evaluate import Evaluation
from bench.metrics import Row

NAMES = {
    "linear": "linear baseline",
    "device": "device only",
    "edge": "edge only",
    "cascade": "cascade",
    "oracle": "oracle",
}
ORDER = ("linear", "device", "edge", "cascade", "oracle")


def main_table(rows: Mapping[str, Row], title: str) -> Table:
    """Latency, confidence, accuracy, and bytes and joules per query of each row."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for name in ("mean ms", "p50", "p95", "p99", "confid.", "right %", "local %", "bytes", "J (modelled)"):
        table.add_column(name, justify="right")
    for name in ORDER:
        if name in rows:
            table.add_row(NAMES[name], *_cells(rows[name]))
    return table


def skill_table(parts: Mapping[str, Evaluation], linear: Mapping[str, Row]) -> Table:
    """Each row's accuracy by skill, and what the cascade keeps local."""
    table = Table(title="right by skill, %", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for skill in parts:
        table.add_column(skill, justify="right")
    for name in ORDER:
        rows = [linear.get(skill) if name == "linear" else part.rows.get(name) for skill, part in parts.items()]
        if any(row is not None for row in rows):
            table.add_row(NAMES[name], *(percent(row.accuracy if row else None) for row in rows))
    if all("cascade" in part.rows for part in parts.values()):
        cascades = [(part, part.rows["cascade"]) for part in parts.values()]
        table.add_row("answered locally", *(percent(row.share_local) for _, row in cascades), style="dim")
        table.add_row("wrong among those", *(percent(part.realised_local_error) for part, _ in cascades), style="dim")
        table.add_row("threshold", *(_threshold(part) for part, _ in cascades), style="dim")
    return table


def detail_table(rows: Mapping[str, Row]) -> Table:
    """Out-of-scope and calibration figures of each row."""
    table = Table(box=box.SIMPLE)
    table.add_column("")
    for name in ("in scope %", "oos recall %", "oos precision %", "ECE", "ECE floor"):
        table.add_column(name, justify="right")
    for name in ORDER:
        if name in rows:
            row = rows[name]
            shares = (row.in_scope_accuracy, row.oos_recall, row.oos_precision)
            table.add_row(NAMES[name], *map(percent, shares), number(row.ece, 3), number(row.ece_floor, 3))
    return table


def load_table(figures: Mapping[str, Any]) -> Table:
    """The spreads of a load run, in milliseconds."""
    table = Table(box=box.SIMPLE)
    table.add_column("ms")
    spreads = {name.removesuffix("_ms"): values for name, values in figures.items() if name.endswith("_ms")}
    for name in next(iter(spreads.values()), {}):
        table.add_column(name, justify="right")
    for name, values in spreads.items():
        table.add_row(name.replace("_", " "), *map(number, values.values()))
    return table


def load_line(figures: Mapping[str, Any]) -> str:
    """What else a load run showed, in a line."""
    seen = {name: figures[name] for name in ("requests", "answered", "errors", "sources")}
    words = [f"{name} {value}" for name, value in seen.items() if value]
    return ", ".join([*words, f"{number(figures['requests_per_s'])} answers a second"])


def percent(value: float | None) -> str:
    """A share as per cent, one decimal; – if there is none."""
    return "–" if value is None else f"{100 * value:.1f}"


def number(value: float | None, decimals: int = 1) -> str:
    """A number; – if there is none."""
    return "–" if value is None else f"{value:.{decimals}f}"


def _cells(row: Row) -> Sequence[str]:
    times = (row.mean_ms, row.p50_ms, row.p95_ms, row.p99_ms)
    shares = (percent(row.accuracy), percent(row.share_local))
    return [*map(number, times), number(row.mean_confidence, 3), *shares, number(row.bytes, 0), number(row.joules, 3)]


def _threshold(part: Evaluation) -> str:
    return number(next(iter(part.thresholds.values()), None), 3)
