"""What capacity is computed from, and what it answers: plain values, no clock, no network.

Times are seconds on one monotonic clock; rates are per second; a `None` was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a tier holds: `percentile` (0 to 1) of its requests within `slo_s`, by `minimum` to `maximum` replicas.

    `cold_start_s` is how long a new replica takes until it serves; `slots` the requests one replica serves at once.
    """

    slo_s: float
    percentile: float
    minimum: int
    maximum: int
    cold_start_s: float = 10.0
    slots: int = 1


@dataclass(frozen=True)
class Reading:
    """One look at a tier. Distributions are over the signal window that ends at `at_s`.

    `service` is the time in the tier without its queue; `scv` the squared coefficient of variation (variance over mean
    squared); `latency_s` the latency at the target's percentile as clients saw it; tokens are those generated.
    `in_flight` counts all that is not answered yet, `queued` those of them that wait. `arrived` are the requests since
    the look before, where a counter tells.
    """

    at_s: float
    arrivals_per_s: float
    arrivals_scv: float | None
    in_flight: float
    queued: float
    queue_wait_s: float | None
    service_s: float | None
    service_scv: float | None
    latency_s: float | None
    tokens_per_request: float | None
    ready: int
    starting: int
    power_ceiling: int | None = None
    arrived: float | None = None


@dataclass(frozen=True)
class Decision:
    """The replicas wanted, and why, in one sentence an operator can read."""

    replicas: int
    reason: str
