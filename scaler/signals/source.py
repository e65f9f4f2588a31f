"""Where signals come from: the seam between what is asked and who is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scaler.replicas import Replica
from scaler.signals.series import Window

GATEWAY = (
    "gateway_function_invocation_started",
    "gateway_function_invocation_total",
    "gateway_functions_seconds_bucket",
    "gateway_functions_seconds_count",
    "gateway_service_count",
)
WATCHDOG = (
    "http_requests_total",
    "http_requests_in_flight",
    "http_request_duration_seconds_bucket",
    "http_request_duration_seconds_sum",
    "http_request_duration_seconds_count",
)
OURS = (
    "edgecascade_requests_total",
    "edgecascade_rejections_total",
    "edgecascade_tokens_total",
    "edgecascade_inflight_requests",
    "edgecascade_waiting_requests",
    "edgecascade_request_seconds_bucket",
    "edgecascade_request_seconds_sum",
    "edgecascade_request_seconds_count",
    "edgecascade_queue_seconds_sum",
    "edgecascade_queue_seconds_count",
    "edgecascade_prefill_seconds_bucket",
    "edgecascade_decode_seconds_bucket",
)
SHARD = (
    "edgecascade_passes_total",
    "edgecascade_pass_tokens_total",
    "edgecascade_pass_seconds_total",
    "edgecascade_link_steps_total",
    "edgecascade_link_seconds_total",
    "edgecascade_shard_steps_total",
    "edgecascade_shard_step_seconds_total",
    "edgecascade_shard_sessions",
)
"""What shards say of their passes and of the links to the shards after them."""
FUNCTION = (*OURS, *WATCHDOG)
"""What a function's replicas say; `GATEWAY` is what the gateway says of the function, under `function_name`."""


class Source(Protocol):
    """Reads the series above, of one function."""

    def read(self, replicas: Sequence[Replica], now_s: float) -> Window:
        """Look once, at `now_s` on our clock; raises `SourceError`."""
        ...


def gateway_name(function: str, namespace: str) -> str:
    """What the gateway calls a function in its metrics."""
    return f"{function}.{namespace}"
