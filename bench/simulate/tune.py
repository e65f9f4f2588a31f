"""Each policy's grid, its frontier on a trace's first half, and what that is worth on the second.

Every policy has a knob between cost and lateness, so two of them are compared at equal cost or at equal lateness. The
settings that are best at some price on the first half are scored on the second; between them a mixture is assumed
(the lower convex hull of what they did there), which favours the others: ours stands as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.simulate.arrivals import Trace
from bench.simulate.policies import P95, Concurrency, Cpu, Fixed, Oracle, Ours, Queue
from bench.simulate.scale import Outcome, Setting, Site, run
from scaler.capacity import Capacity

OURS, ORACLE = "ours", "oracle"
WINDOWS_S, DOWN_S = (15.0, 60.0), (0.0, 60.0, 300.0)
PERCENTILES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)
LATE_SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Scored:
    """A setting with what it did."""

    setting: Setting
    outcome: Outcome


Point = tuple[float, float]
"""Replica-seconds, share of requests that were late."""


def grids(trace: Trace, site: Site) -> Mapping[str, Sequence[Setting]]:
    """All settings of all policies; `trace` bounds the fixed numbers."""
    slo_s = site.target.slo_s
    busy = max(1.0, trace.rate * _mean_service_s(trace, site) / site.target.slots)
    counts = sorted({max(1, round(busy * factor / 10)) for factor in (4, 6, 8, *range(9, 20), 22, 25, 30, 35, 40, 50)})
    grid: dict[str, list[Setting]] = {
        "fixed": [Setting("fixed", (("replicas", n),), lambda _, n=n: Fixed(n)) for n in counts],
        "HPA on CPU": [
            Setting("HPA on CPU", (("target", u),), lambda _, u=u: Cpu(u), stabilisation_s=down)
            for u in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
            for down in DOWN_S
        ],
        "KEDA on p95": [
            Setting("KEDA on p95", (("threshold", f * slo_s),), lambda _, f=f: P95(f * slo_s), window, down)
            for f in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
            for window in WINDOWS_S
            for down in DOWN_S
        ],
        "concurrency": [
            Setting("concurrency", (("target", c),), lambda _, c=c: Concurrency(c), stabilisation_s=down)
            for c in (
                f * site.target.slots for f in (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0, 1.2, 1.5)
            )
            for down in DOWN_S
        ],
        "KEDA on queue": [
            Setting("KEDA on queue", (("threshold", c), ("waiting", w)), lambda _, c=c, w=w: Queue(c, w), 60.0, down)
            for thresholds, w in (
                ((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.3, 1.6), False),
                ((0.1, 0.2, 0.5, 1, 2), True),
            )
            for c in (f * site.target.slots for f in thresholds)
            for down in DOWN_S
        ],
        OURS: [_ours(percentile) for percentile in PERCENTILES],
        ORACLE: [_oracle(share) for share in LATE_SHARES],
    }
    return grid


def _ours(percentile: float) -> Setting:
    return Setting(
        OURS,
        (("percentile", percentile),),
        lambda world: Ours(Capacity(replace(world.site.target, percentile=percentile)), world.site.tolerance),
        window_s=30.0,
    )


def _oracle(share: float) -> Setting:
    def make(world):
        return Oracle(world.pool, world.jobs, world.site.target, share, world.site.poll_s)

    return Setting(ORACLE, (("late", share),), make)


def _mean_service_s(trace: Trace, site: Site) -> float:
    times = [site.machine.service_s(a.context, a.generated) for a in trace.arrivals]
    return sum(times) / len(times) if times else 0.0


def efficient(scored: Iterable[Scored]) -> list[Scored]:
    """Those that nobody beats in both cost and lateness, the cheapest first."""
    best: list[Scored] = []
    for one in sorted(scored, key=lambda s: (s.outcome.replica_s, s.outcome.violations)):
        if not best or one.outcome.violations < best[-1].outcome.violations:
            best.append(one)
    return best


def hull(points: Iterable[Point]) -> list[Point]:
    """The lower convex hull that falls, the cheapest first."""
    lower: list[Point] = []
    for point in sorted(points):
        if lower and point[1] >= lower[-1][1]:
            continue
        while len(lower) > 1 and _above(lower[-2], lower[-1], point):
            lower.pop()
        lower.append(point)
    return lower


def _above(a: Point, b: Point, c: Point) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def late_at(points: Sequence[Point], cost: float) -> float | None:
    """The lateness of a hull at a cost; None where it cannot be so cheap."""
    if not points or cost < points[0][0]:
        return None
    for a, b in zip(points, points[1:], strict=False):
        if cost <= b[0]:
            return a[1] + (b[1] - a[1]) * (cost - a[0]) / (b[0] - a[0])
    return points[-1][1]


def cost_at(points: Sequence[Point], late: float) -> float | None:
    """The least cost of a hull at a lateness; None where it is never so good."""
    if not points or late < points[-1][1]:
        return None
    for a, b in zip(points, points[1:], strict=False):
        if b[1] <= late <= a[1]:
            return a[0] if a[1] == b[1] else a[0] + (b[0] - a[0]) * (a[1] - late) / (a[1] - b[1])
    return points[0][0]


def tuned(trace: Trace, site: Site, settings: Sequence[Setting], step: Callable[[], None]) -> list[Scored]:
    """What is efficient on the first half, as it does on the second."""
    first = trace.first_half()
    found = []
    for setting in settings:
        found.append(Scored(setting, run(first, site, setting)))
        step()
    return [Scored(one.setting, run(trace, site, one.setting, first.length_s)) for one in efficient(found)]
