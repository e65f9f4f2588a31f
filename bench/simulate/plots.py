"""Frontiers and replicas over time, as PNG or SVG by the file's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.simulate.tune import ORACLE, OURS, Tuned


def frontiers(found: Sequence[tuple[str, Mapping[str, Tuned]]], path: Path) -> None:
    """For each trace: late requests against replica-seconds on the second half, and ours over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 2, squeeze=False)
    for (name, tuned), (spread, over_time) in zip(found, rows, strict=True):
        for policy, one in tuned.items():
            xs = [scored.outcome.replica_s for scored in one.second]
            ys = [100 * scored.outcome.violations for scored in one.second]
            own = policy in {OURS, ORACLE}
            spread.plot(
                xs, ys, "*-" if policy == OURS else "^:" if own else "o-", markersize=8 if own else 3, label=policy
            )
        chosen = tuned[OURS].second[tuned[OURS].chosen].outcome
        widest = 4 * chosen.replica_s
        spread.set(xlim=(0, widest), yscale="symlog", xlabel="replica-seconds", ylabel="late, %", title=name)
        spread.set_yscale("symlog", linthresh=0.1)
        spread.legend(fontsize=7)
        times = [at_s / 60 for at_s, _, _ in chosen.replicas]
        over_time.step(times, [count for _, count, _ in chosen.replicas], where="post", label="replicas")
        over_time.plot(times, [flight for _, _, flight in chosen.replicas], linewidth=0.7, label="requests in flight")
        over_time.set(xlabel="minutes", title="ours")
        over_time.legend(fontsize=7)
        for axes in (spread, over_time):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
