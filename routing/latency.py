"""Is the model too slow to be asked? A ceiling on a moving percentile, with hysteresis and probes. Pure.

Above `canned_above_ms` requests get a canned answer, but for a share of probes, which still go to the model. Only
what the latest probes take counts from then on; once their percentile is below `back_below_ms`, all requests go again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LatencyLimits:
    """When to stop asking, and when to ask again.

    `back_below_ms` must lie below `canned_above_ms`. Nothing is decided on fewer than `least_samples`; samples older
    than `window_s`, or beyond the newest `window` (while shut: the newest `least_samples`), are forgotten. One request
    in `probe_every` is a probe, and any request that comes `probe_after_s` after the last one.
    """

    canned_above_ms: float
    back_below_ms: float
    percentile: float = 0.95
    window: int = 64
    window_s: float = 30.0
    least_samples: int = 5
    probe_every: int = 10
    probe_after_s: float = 1.0

    def __post_init__(self) -> None:
        """Refuse limits under which the gate would flutter, or never open; raises `ValueError` naming the field."""
        if not 0 < self.back_below_ms < self.canned_above_ms < math.inf:
            raise ValueError("latency.back_below_ms must be above 0 and below latency.canned_above_ms")
        if not 0 < self.percentile <= 1:
            raise ValueError("latency.percentile must be above 0 and at most 1")
        if not 1 <= self.least_samples <= self.window:
            raise ValueError("latency.least_samples must be from 1 to latency.window")
        if not (self.window_s > 0 and self.probe_every >= 1 and self.probe_after_s >= 0):
            raise ValueError("latency.window_s, probe_every and probe_after_s must be above 0, 1 and 0 or more")


@dataclass(frozen=True)
class LatencyGate:
    """The state between two requests: `samples` are (when, in seconds on one clock; milliseconds), oldest first."""

    limits: LatencyLimits
    samples: tuple[tuple[float, float], ...] = ()
    canned: bool = False
    since_probe: int = 0
    last_probe_s: float = -math.inf

    def admit(self, now_s: float) -> tuple[LatencyGate, bool]:
        """Whether the request that comes now may go to the model; if it may, report what it took to `observe`."""
        if not self.canned:
            return self, True
        due = now_s - self.last_probe_s >= self.limits.probe_after_s
        if due or self.since_probe + 1 >= self.limits.probe_every:
            return replace(self, since_probe=0, last_probe_s=now_s), True
        return replace(self, since_probe=self.since_probe + 1), False

    def observe(self, now_s: float, took_ms: float) -> LatencyGate:
        """Take in what a request to the model took; one that failed or was given up took at least that long."""
        since_s = now_s - self.limits.window_s
        kept = (sample for sample in self.samples if sample[0] > since_s)
        count = self.limits.least_samples if self.canned else self.limits.window
        seen = replace(self, samples=(*kept, (now_s, took_ms))[-count:])
        value_ms = seen.percentile_ms
        if value_ms is None:
            return seen
        if not self.canned and value_ms > self.limits.canned_above_ms:
            return replace(seen, canned=True, samples=(), since_probe=0, last_probe_s=now_s)
        if self.canned and value_ms < self.limits.back_below_ms:
            return replace(seen, canned=False, samples=())
        return seen

    @property
    def percentile_ms(self) -> float | None:
        """The percentile of the samples (nearest rank), or None while there are too few."""
        if len(self.samples) < self.limits.least_samples:
            return None
        ranked = sorted(took_ms for _, took_ms in self.samples)
        return ranked[math.ceil(self.limits.percentile * len(ranked)) - 1]
