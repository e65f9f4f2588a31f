"""A Grafana dashboard: rates, latencies, who answers, what is in flight, by node, shard and model version. Pure."""

from __future__ import annotations

from typing import Any

from deploy.kubernetes.workloads import FUNCTION_LABEL

VARIABLES = ("node_id", "shard_id", "model_version")
_CHOSEN = "{" + ",".join(f'{name}=~"${name}"' for name in VARIABLES) + "}"
_FUNCTION = f"{{{{{FUNCTION_LABEL}}}}}"
_COLUMNS, _WIDTH, _HEIGHT = 2, 12, 8


def _p95(histogram: str) -> str:
    buckets = f"sum by (le, {FUNCTION_LABEL}) (rate({histogram}_bucket$chosen[5m]))"
    return f"histogram_quantile(0.95, {buckets})"


# Title, unit of Grafana, and (legend, PromQL); `$chosen` stands for the three variables' matchers.
_PANELS = (
    ("Answers, by route", "reqps", (("{{route}}", "sum by (route) (rate(edgecascade_requests_total$chosen[5m]))"),)),
    ("Why, by reason", "reqps", (("{{reason}}", "sum by (reason) (rate(edgecascade_requests_total$chosen[5m]))"),)),
    (
        "Deadlines missed, by class",
        "percentunit",
        (("{{deadline_class}}", "edgecascade:deadline_misses:ratio_rate5m"),),
    ),
    ("Latency at the 95th percentile", "s", ((_FUNCTION, _p95("edgecascade_request_seconds")),)),
    (
        "At work and waiting",
        "short",
        (
            (f"{_FUNCTION} at work", f"sum by ({FUNCTION_LABEL}) (edgecascade_inflight_requests$chosen)"),
            (f"{_FUNCTION} waiting", f"sum by ({FUNCTION_LABEL}) (edgecascade_waiting_requests$chosen)"),
        ),
    ),
    ("Refused, by code", "reqps", (("{{code}}", "sum by (code) (rate(edgecascade_rejections_total$chosen[5m]))"),)),
    ("Replicas that take requests", "short", ((_FUNCTION, f"sum by ({FUNCTION_LABEL}) (edgecascade_ready$chosen)"),)),
    (
        "Replicas that the scaler wants",
        "short",
        (("{{function}}", "max by (function, namespace) (edgecascade_scaler_wanted_replicas)"),),
    ),
    ("Tokens", "short", (("{{kind}}", "sum by (kind) (rate(edgecascade_tokens_total$chosen[5m]))"),)),
    ("First token at the 95th percentile", "s", ((_FUNCTION, _p95("edgecascade_time_to_first_token_seconds")),)),
    ("Battery", "percentunit", (("{{node_id}}", "min by (node_id) (edgecascade_battery_level_ratio$chosen)"),)),
)


def dashboard() -> dict[str, Any]:
    """The JSON model that Grafana imports; it asks for a data source of type Prometheus."""
    return {
        "title": "edgecascade",
        "uid": "edgecascade",
        "tags": ["edgecascade"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_source(), *map(_variable, VARIABLES)]},
        "panels": [_panel(number, *panel) for number, panel in enumerate(_PANELS)],
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$source"},
        "query": f"label_values(edgecascade_ready, {name})",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, title: str, unit: str, lines: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    return {
        "id": number + 1,
        "title": title,
        "type": "timeseries",
        "datasource": {"type": "prometheus", "uid": "$source"},
        "gridPos": {"x": _WIDTH * column, "y": _HEIGHT * row, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "legendFormat": legend, "expr": text.replace("$chosen", _CHOSEN)}
            for index, (legend, text) in enumerate(lines)
        ],
    }
