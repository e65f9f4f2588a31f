"""Tables for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from bench import figures, links, ranked
from bench.cascade import Figures
from bench.chaos import Case
from bench.evaluate import Evaluation
from bench.memory import GB
from bench.metrics import Row
from bench.saturation import Step
from bench.sites import Phase

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


def cascade_table(rows: Mapping[str, Figures], titles: Mapping[str, str], title: str) -> Table:
    """What each way to join the tiers is worth; ways with a deadline of their own are named `arm@milliseconds`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for name in ("right %", "local %", "gap %", "mean ms", "p50", "p95", "p99", "late %", "flag %", "router"):
        table.add_column(name, justify="right")
    for name in ("bytes", "J"):
        table.add_column(name, justify="right")
    for name, f in rows.items():
        times = map(number, (f.row.mean_ms, f.row.p50_ms, f.row.p95_ms, f.row.p99_ms))
        shares = map(percent, (f.row.accuracy, f.row.share_local, f.gap_closed))
        flags = (percent(f.late), percent(f.degraded), number(f.router_p50_ms, 2))
        label = titles.get(name, name)
        table.add_row(label, *shares, *times, *flags, number(f.row.bytes, 0), number(f.row.joules, 3))
    return table


def added_table(figures: Mapping[str, Any]) -> Table:
    """What the dispatcher adds, in milliseconds."""
    table = Table(title="added by the dispatcher, ms", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for name in ("p50", "p99", "beside the model: p50", "p99"):
        table.add_column(name, justify="right")
    at_rate = figures["at_rate"]
    labels = {"pairs": "in pairs", "at_rate": f"at {at_rate['requests_per_s']:g} requests/s"}
    for part, label in labels.items():
        names = ("p50_ms", "p99_ms", "beside_p50_ms", "beside_p99_ms")
        table.add_row(label, *(number(figures[part][name], 2) for name in names))
    return table


def chaos_table(cases: Sequence[Case], title: str) -> Table:
    """What each fault did; a case in red broke one of the bounds."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for name in ("answered %", "in time %", "p50 ms", "p99", "worst late", "true %", "tries", "left, bytes", "well, s"):
        table.add_column(name, justify="right")
    table.add_column("fails")
    for c in cases:
        shares = (percent(c.answered), percent(c.in_time), number(c.p50_ms), number(c.p99_ms), number(c.worst_late_ms))
        rest = (percent(c.truthful), number(c.amplification, 2), str(c.local_only_bytes), number(c.recovered_s))
        table.add_row(c.name, *shares, *rest, ", ".join(c.failings), style="red" if c.failings else None)
    return table


def sites_table(phases: Sequence[Phase], title: str) -> Table:
    """What came of each phase of a link that is cut and mended."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for name in ("sent", "answered", "by the edge", "flagged", "lies", "p50 ms", "p99"):
        table.add_column(name, justify="right")
    table.add_column("reasons")
    for p in phases:
        counts = (p.sent, p.answered, p.sources.get("edge", 0), p.flagged, sum(p.lies.values()))
        reasons = ", ".join(f"{reason} {times}" for reason, times in p.reasons.items())
        table.add_row(p.name, *map(str, counts), number(p.p50_ms), number(p.p99_ms), reasons)
    return table


def links_table(rows: Sequence[links.Row], title: str) -> Table:
    """What shards cost; a row in red said something else than the unsplit tier."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for name in (
        "shards",
        "threads each",
        "work",
        "ms a token",
        "ms a hop",
        "tokens/s at once",
        "of unsplit %",
        "CPU ms a token",
    ):
        table.add_column(name, justify="right")
    for r in rows:
        alone = (number(r.token_ms, 2), number(r.hop_ms, 2))
        together = (number(r.together_tokens_s), percent(r.efficiency), number(r.cpu_ms, 2))
        work = "in turns" if r.groups == 1 else "at once" if r.shards > 1 else ""
        table.add_row(str(r.shards), str(r.threads), work, *alone, *together, style=None if r.same else "red")
    return table


def ranked_table(rows: Sequence[ranked.Row], title: str) -> Table:
    """What ranks cost, and how many answers were the unsplit tier's."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for name in ("ranks", "ms a token", "CPU ms a token", "same answers"):
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(str(r.ranks), number(r.token_ms, 2), number(r.cpu_ms, 2), f"{r.same} of {r.asked}")
    return table


def saturation_table(steps: Sequence[Step], title: str) -> Table:
    """What is served, and how fast the rest is refused, around saturation."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in ("load", "requests/s", "good/s", "sent", "answered", "refused", "p50 ms", "p99", "worst", "no answer"):
        table.add_column(name, justify="right")
    for s in steps:
        refusals = map(number, (s.rejected_p50_ms, s.rejected_p99_ms, s.rejected_worst_ms))
        counts = map(str, (s.sent, s.answered, s.rejected))
        table.add_row(
            f"{s.load:g} x", number(s.requests_per_s), number(s.goodput_per_s), *counts, *refusals, str(s.unanswered)
        )
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


def engine_table(rows: Sequence[figures.Row], title: str) -> Table:
    """Speed in tokens a second, load time and memory of each contender."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for name in (
        "decode 128",
        "1k",
        "prefill 128",
        "512",
        "% ceiling",
        "4 : 1",
        "cold s",
        "warm s",
        "peak MB",
        "MB/token",
    ):
        table.add_column(name, justify="right")
    for r in _measured(rows):
        rates = map(number, (r.decode_short, r.decode_long, r.prefill_128, r.prefill_512))
        ratios = (percent(r.bandwidth_share), number(r.together_ratio, 2))
        seconds = (number(r.cold_s, 2), number(r.warm_s, 2))
        table.add_row(r.name, *rates, *ratios, *seconds, _megabytes(r.peak_bytes), _megabytes(r.weight_bytes))
    return table


def engine_quality(rows: Sequence[figures.Row], title: str) -> Table:
    """What each contender's arithmetic loses."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for name in ("mean KL", "in pieces of 32", "same best %", "perplexity"):
        table.add_column(name, justify="right")
    table.add_column("settings")
    for r in _measured(rows):
        losses = (number(r.kl, 4), number(r.kl_pieces, 4))
        table.add_row(r.name, *losses, percent(r.top1), number(r.perplexity, 2), r.about)
    return table


def engine_notes(rows: Sequence[figures.Row]) -> list[str]:
    """Who is not in the tables, or left on the way, and why."""
    return [f"{r.name}: {r.skipped}" for r in rows if r.skipped]


def _measured(rows: Sequence[figures.Row]) -> list[figures.Row]:
    return [r for r in rows if r.weight_bytes]


def _megabytes(size_bytes: int | None) -> str:
    return "–" if size_bytes is None else f"{size_bytes * 1000 / GB:.0f}"


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
