"""Figures from outcomes. Pure: no clock, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.queries import OUT_OF_SCOPE

ECE_BINS = 15


@dataclass(frozen=True)
class Outcome:
    """What came of one query.

    `predicted` is the intent of the answer (None: no frame came); `right` means the whole frame equals the expected
    one; `confidence` is P(right) as reported, if it was; `latency_ms` is the caller's; `network_bytes` crossed between
    the sites; `joules` is what the service reported, if it did.
    """

    expected: str
    predicted: str | None
    right: bool
    local: bool
    latency_ms: float
    confidence: float | None = None
    network_bytes: int = 0
    joules: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table; shares and accuracies lie in 0…1, None where there is nothing to divide by."""

    n: int
    accuracy: float | None
    in_scope_accuracy: float | None
    oos_recall: float | None
    oos_precision: float | None
    share_local: float | None
    ece: float | None
    ece_floor: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    mean_ms: float | None
    mean_confidence: float | None
    joules: float | None
    bytes: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def row(outcomes: Sequence[Outcome]) -> Row:
    """Sum the outcomes of one row up; joules and bytes are means per query."""
    latencies = [o.latency_ms for o in outcomes]
    stated = [(o.confidence, o.right) for o in outcomes if o.confidence is not None]
    return Row(
        n=len(outcomes),
        accuracy=share(outcomes, lambda o: o.right),
        in_scope_accuracy=share([o for o in outcomes if o.expected != OUT_OF_SCOPE], lambda o: o.right),
        oos_recall=share([o for o in outcomes if o.expected == OUT_OF_SCOPE], lambda o: o.predicted == OUT_OF_SCOPE),
        oos_precision=share([o for o in outcomes if o.predicted == OUT_OF_SCOPE], lambda o: o.expected == OUT_OF_SCOPE),
        share_local=share(outcomes, lambda o: o.local),
        ece=ece(stated),
        ece_floor=ece_floor([confidence for confidence, _ in stated]),
        p50_ms=percentile(latencies, 0.50),
        p95_ms=percentile(latencies, 0.95),
        p99_ms=percentile(latencies, 0.99),
        mean_ms=mean(latencies),
        mean_confidence=mean([confidence for confidence, _ in stated]),
        joules=mean([o.joules for o in outcomes if o.joules is not None]),
        bytes=mean([o.network_bytes for o in outcomes]),
    )


def share(outcomes: Sequence[Outcome], holds: Callable[[Outcome], bool]) -> float | None:
    """Part of the outcomes for which something holds."""
    return sum(map(holds, outcomes)) / len(outcomes) if outcomes else None


def mean(values: Sequence[float]) -> float | None:
    """The mean, exact to a rounding."""
    return math.fsum(values) / len(values) if values else None


def percentile(values: Iterable[float], q: float) -> float | None:
    """The q-quantile (0…1), linear between neighbours."""
    ordered = sorted(values)
    if not ordered:
        return None
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def ece(stated: Sequence[tuple[float, bool]], bins: int = ECE_BINS) -> float | None:
    """Expected calibration error over bins of equal mass: mean |confidence − accuracy|, weighted by bin size.

    Equal confidences count with their common accuracy, so that the result does not hang on the order of ties.
    """
    if not stated:
        return None
    rights: dict[float, list[bool]] = {}
    for confidence, right in stated:
        rights.setdefault(confidence, []).append(right)
    gaps = [c - sum(found) / len(found) for c, found in sorted(rights.items()) for _ in found]
    n = len(gaps)
    return math.fsum(abs(math.fsum(gaps[i * n // bins : (i + 1) * n // bins])) for i in range(bins)) / n


def ece_floor(confidences: Sequence[float], bins: int = ECE_BINS) -> float | None:
    """The error `ece` is expected to show for confidences that are perfectly calibrated: what so few queries leave.

    A bin's gap is then a sum of centred coin tosses, near normal, whose mean absolute value is √(2/π) of its spread.
    """
    if not confidences:
        return None
    spreads, n = [c * (1 - c) for c in sorted(confidences)], len(confidences)
    variances = [math.fsum(spreads[i * n // bins : (i + 1) * n // bins]) for i in range(bins)]
    return math.fsum(math.sqrt(2 / math.pi * variance) for variance in variances) / n


def oracle(device: Outcome, edge: Outcome) -> Outcome:
    """The best a router could do: local where the device is right, the edge otherwise."""
    return device if device.right else edge


def local_error(cascade: Sequence[Outcome]) -> float | None:
    """Share of wrong answers among those given locally."""
    return share([o for o in cascade if o.local], lambda o: not o.right)


@dataclass(frozen=True)
class Point:
    """One threshold: the share answered locally and the accuracy of the whole."""

    threshold: float
    share_local: float
    accuracy: float


def trade_off(pairs: Sequence[tuple[Outcome, Outcome]]) -> list[Point]:
    """Accuracy against share local for every threshold, from (device, edge) outcomes of the same queries.

    Begins with everything at the edge; then the queries whose device confidence is highest stay local.
    """
    ordered = sorted(pairs, key=lambda pair: -_certainty(pair[0]))
    n = len(ordered)
    if not n:
        return []
    right = sum(edge.right for _, edge in ordered)
    points = [Point(math.inf, 0.0, right / n)]
    for k, (device, edge) in enumerate(ordered, 1):
        right += device.right - edge.right
        if k == n or _certainty(ordered[k][0]) < _certainty(device):  # equal confidences move together
            points.append(Point(_certainty(device), k / n, right / n))
    return points


def _certainty(outcome: Outcome) -> float:
    return -math.inf if outcome.confidence is None else outcome.confidence
