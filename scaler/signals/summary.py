"""Sums a window up to the reading that capacity is computed from: pure.

The gateway sees what comes through it, also while no replica runs; replicas see what comes past it. Of arrivals and of
requests in flight the larger count holds.
"""

from __future__ import annotations

from scaler.errors import SourceError
from scaler.replicas import Found
from scaler.signals.series import Window
from scaler.trigger import Trigger
from scaler.values import Reading

REFUSED_FOR_LOAD = ("overloaded", "deadline")
"""Codes of rejections that are demand all the same; a malformed request is none."""
_OURS, _WATCHDOG, _GATEWAY = "edgecascade_request_seconds", "http_request_duration_seconds", "gateway_functions_seconds"


def summarise(window: Window, found: Found, trigger: Trigger, now_s: float) -> Reading:
    """One reading; raises `SourceError` where there are no samples, too old ones, or one look only."""
    _check(window, trigger, now_s)
    span_s = window.span_s
    at_gateway, at_replicas = _gateway_in_flight(window), _replicas_in_flight(window)
    held = max(0.0, at_gateway - at_replicas) if found.ready == 0 else 0.0
    service_s, variance = _service(window)
    answered = window.increase("edgecascade_requests_total")
    return Reading(
        at_s=now_s,
        arrivals_per_s=max(_gateway_arrivals(window), _replicas_arrivals(window)) / span_s,
        arrivals_scv=_scv(window),
        in_flight=max(at_gateway, at_replicas),
        queued=(window.latest("edgecascade_waiting_requests") or 0.0) + held,
        queue_wait_s=window.mean("edgecascade_queue_seconds"),
        service_s=service_s,
        service_scv=variance / service_s**2 if service_s and variance is not None else None,
        latency_s=_latency(window, trigger.target.percentile),
        tokens_per_request=window.increase("edgecascade_tokens_total", kind=("completion",)) / answered
        if answered > 0
        else None,
        ready=found.ready,
        starting=found.starting,
        power_ceiling=found.power_ceiling,
    )


def _check(window: Window, trigger: Trigger, now_s: float) -> None:
    name, newest_s = trigger.function, window.newest_s
    if newest_s is None:
        raise SourceError(f"there are no metrics of '{name}', neither its own nor the gateway's")
    if now_s - newest_s > trigger.stale_s:
        age_s = now_s - newest_s
        raise SourceError(f"the newest metrics of '{name}' are {age_s:.0f} s old; {trigger.stale_s:g} s are allowed")
    if window.span_s <= 0:
        raise SourceError(f"the metrics of '{name}' were seen once; rates need two looks")


def _gateway_arrivals(window: Window) -> float:
    return window.increase("gateway_function_invocation_started")


def _replicas_arrivals(window: Window) -> float:
    refused = window.increase("edgecascade_rejections_total", code=REFUSED_FOR_LOAD)
    return window.increase("edgecascade_requests_total") + refused or window.increase("http_requests_total")


def _gateway_in_flight(window: Window) -> float:
    started = window.latest("gateway_function_invocation_started") or 0.0
    return max(0.0, started - (window.latest("gateway_function_invocation_total") or 0.0))


def _replicas_in_flight(window: Window) -> float:
    at_work, waiting = window.latest("edgecascade_inflight_requests"), window.latest("edgecascade_waiting_requests")
    if at_work is None:
        return window.latest("http_requests_in_flight") or 0.0
    return at_work + (waiting or 0.0)


def _service(window: Window) -> tuple[float | None, float | None]:
    """(mean, variance) of the time in the tier without its queue; a stranger's watchdog does not know its queue."""
    mean, wait_s = window.mean(_OURS), window.mean("edgecascade_queue_seconds")
    if mean is None:
        return window.mean(_WATCHDOG), window.buckets(_WATCHDOG).variance()
    parts = [window.buckets(f"edgecascade_{part}_seconds").variance() for part in ("prefill", "decode")]
    return max(0.0, mean - (wait_s or 0.0)), sum(part or 0.0 for part in parts)


def _scv(window: Window) -> float | None:
    for name in ("gateway_function_invocation_started", "edgecascade_requests_total", "http_requests_total"):
        if window.increase(name) > 0:
            return window.dispersion(name)
    return None


def _latency(window: Window, percentile: float) -> float | None:
    """From the finest histogram there is: the gateway's ends at 10 s."""
    for name in (_OURS, _WATCHDOG, _GATEWAY):
        found = window.buckets(name).quantile(percentile)
        if found is not None:
            return found
    return None
