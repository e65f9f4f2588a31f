"""Figures as PNG files, and SVG where a page wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from bench import figures
from bench.cascade import Frontier
from bench.flood import Answer
from bench.links import Run
from bench.load import Shot
from bench.metrics import Point, Row
from bench.recording import Look

if TYPE_CHECKING:
    from bench.rebalance import Run as Rebalancing  # whose engine takes long to import


def trade_off(points: Sequence[Point], row: Row | None, oracle: Row | None, title: str, path: Path) -> None:
    """Accuracy against share answered locally; `row` marks where the cascade stands, `oracle` what no router beats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    xs, ys = [100 * p.share_local for p in points], [100 * p.accuracy for p in points]
    axes.plot(xs, ys, drawstyle="default", label="by device confidence")
    axes.plot([xs[0], xs[-1]], [ys[0], ys[-1]], ":", color="grey", label="at random")
    axes.plot(xs[0], ys[0], "s", label="edge only")
    axes.plot(xs[-1], ys[-1], "o", label="device only")
    for mark, name, place in (("*", "cascade", row), ("^", "oracle", oracle)):
        if place is not None and place.share_local is not None and place.accuracy is not None:
            axes.plot(100 * place.share_local, 100 * place.accuracy, mark, markersize=11, label=name)
    axes.set(xlabel="answered locally, %", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def frontier(points: Sequence[Frontier], titles: Mapping[str, str], bar: float | None, path: Path) -> None:
    """Accuracy against the deadline, a line an arm; full where 99 % of the answers came in time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for arm in dict.fromkeys(p.arm for p in points):
        own = sorted((p for p in points if p.arm == arm), key=lambda p: p.deadline_ms)
        xs, ys = [p.deadline_ms for p in own], [100 * (p.accuracy or 0.0) for p in own]
        (line,) = axes.plot(xs, ys, label=titles[arm])
        for x, y, point in zip(xs, ys, own, strict=True):
            in_time = point.p99_ms is not None and point.p99_ms <= point.deadline_ms
            axes.plot(x, y, "o", color=line.get_color(), fillstyle="full" if in_time else "none")
    if bar is not None:
        axes.axhline(100 * bar, linestyle=":", color="grey", label="sequential, no deadline")
    axes.set(xlabel="deadline, ms (full marks: p99 within it)", ylabel="accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def links(run: Run, path: Path) -> None:
    """Time a token against a link's delay, with the least that it could be."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    delays = [d.delay_ms for d in run.delayed]
    axes.plot(delays, [d.token_ms for d in run.delayed], "o-", label="two shards, measured")
    axes.plot(
        delays, [d.limit_ms for d in run.delayed], ":", color="grey", label="unsplit compute + the way there and back"
    )
    axes.set(xlabel="delay of the link one way, ms", ylabel="ms a token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def load(shots: Sequence[Shot], path: Path) -> None:
    """Latency and first token over time, and their distribution."""
    from matplotlib.figure import Figure

    good = sorted((s for s in shots if not s.error), key=lambda s: s.due_s)
    failed = [s for s in shots if s.error]
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_time, spread = figure.subplots(1, 2)
    series = {
        "whole answer": [(s.due_s, 1000 * (s.done_s - s.due_s)) for s in good],
        "first token": [(s.due_s, 1000 * (s.first_s - s.due_s)) for s in good if s.first_s is not None],
    }
    for name, pairs in series.items():
        over_time.plot([x for x, _ in pairs], [y for _, y in pairs], ".", markersize=4, label=name)
        ordered = sorted(y for _, y in pairs)
        spread.plot(ordered, [100 * (i + 1) / len(ordered) for i in range(len(ordered))], label=name)
    over_time.plot([s.due_s for s in failed], [1000 * (s.done_s - s.due_s) for s in failed], "x", label="failed")
    over_time.set(xlabel="due at, s", ylabel="ms")
    spread.set(xlabel="ms", ylabel="% of answers at most this late")
    if any(math.isfinite(y) and y > 0 for pairs in series.values() for _, y in pairs):
        spread.set_xscale("log")
    for axes in (over_time, spread):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def engine(rows: Sequence[figures.Row], title: str, path: Path) -> list[Path]:
    """Decoding speed of each contender, and against what its arithmetic loses; a PNG and an SVG beside each other."""
    from matplotlib.figure import Figure

    timed = sorted((r for r in rows if r.decode_short), key=lambda r: r.decode_short or 0.0)
    figure = Figure(figsize=(12, 1.5 + 0.4 * max(len(timed), 6)), layout="constrained")
    bars, spread = figure.subplots(1, 2)
    names = [r.name for r in timed]
    bars.barh(names, [r.decode_short or 0.0 for r in timed], label="128 tokens in context")
    bars.barh(names, [r.decode_long or 0.0 for r in timed], height=0.35, label="1,024 tokens in context")
    bars.set(xlabel="decoded tokens a second", title=title)
    for r in timed:
        if r.kl is not None:
            spread.plot(r.kl, r.decode_short, "*" if r.peer == "ours" else "o", markersize=9)
            spread.annotate(
                r.name, (r.kl, r.decode_short or 0.0), xytext=(5, 4), textcoords="offset points", fontsize=8
            )
    spread.set_xscale("symlog", linthresh=1e-3)
    spread.set(xlabel="mean KL to the dequantised weights, nats", ylabel="decoded tokens a second")
    spread.set_ylim(0, 1.1 * max((r.decode_short or 0.0 for r in timed), default=1.0))
    bars.legend(loc="lower right")
    spread.margins(0.15)
    for axes in (bars, spread):
        axes.grid(alpha=0.3)
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in written:
        figure.savefig(file, dpi=120)
    return written


def autoscale(answers: Sequence[Answer], looks: Sequence[Look], slo_s: float, path: Path) -> None:
    """Replicas wanted and ready, requests in flight, and each request's latency, over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    replicas, load, latency = figure.subplots(3, 1, sharex=True)
    times = [look.at_s for look in looks]
    replicas.step(times, [look.wanted for look in looks], where="post", label="wanted")
    replicas.step(times, [look.ready for look in looks], where="post", label="ready")
    replicas.set(ylabel="replicas")
    load.plot(times, [look.in_flight for look in looks], label="in flight")
    load.set(ylabel="requests")
    good = [a for a in answers if a.status == HTTPStatus.OK]
    failed = [a for a in answers if a.status != HTTPStatus.OK]
    latency.plot([a.due_s for a in good], [a.latency_ms for a in good], ".", markersize=4, label="answered")
    latency.plot([a.due_s for a in failed], [a.latency_ms for a in failed], "x", label="failed")
    latency.axhline(1000 * slo_s, linestyle=":", color="grey", label="SLO")
    latency.set(xlabel="s", ylabel="ms", yscale="log")
    for axes in (replicas, load, latency):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def rebalance(runs: Sequence[Rebalancing], path: Path) -> None:
    """Each request's latency over time, a row a run: the fault, the decision, the move's end, and the SLO."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(runs)), layout="constrained")
    rows = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for axes, run in zip(rows, runs, strict=True):
        axes.plot([a.sent_s - run.fault_s for a in run.answers], [a.latency_ms for a in run.answers], ".")
        axes.axhline(run.slo_ms, linestyle=":", color="grey", label="SLO")
        axes.axvline(0.0, color="tab:red", label=run.trial.fault)
        for move in run.moves:
            axes.axvline(move.at_s - run.fault_s, linestyle="--", color="tab:green", label=move.decision.reason.value)
        axes.set(ylabel="ms", yscale="log", title=f"{run.trial.fault}: {run.victim}")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    rows[-1].set(xlabel="s since the fault")
    figure.savefig(path, dpi=120)
