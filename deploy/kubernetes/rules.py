"""Recording rules and alerts for Prometheus: pure.

Two promises are watched, each by how fast its error budget burns (Google's SRE workbook, chapter 5: a long window says
that it matters, a short one that it still goes on; too few requests say nothing):

- a class of deadlines (voice, control, kiosk; whatever the policy names): `CLASS_OBJECTIVE` of its requests are
  answered in time, as the dispatcher counts them;
- a tier: `PERCENTILE` of its requests within the seconds that it is scaled for, those it refused being too slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.kubernetes.scaling import MAX_REPLICAS, PERCENTILE, demand, slo_seconds
from deploy.kubernetes.workloads import FUNCTION_LABEL
from deploy.stack import Function

Rule = dict[str, Any]

CLASS_OBJECTIVE = 0.99
LEAST_REQUESTS = 20
_SECONDS = {"5m": 300, "30m": 1800, "1h": 3600, "2h": 7200, "6h": 21_600, "1d": 86_400, "3d": 259_200}
WINDOWS = tuple(_SECONDS)
REFUSALS = "broken_off|deadline|internal|overloaded"
"""Codes of `edgecascade_rejections_total` for which the caller is not to blame."""

_CLASS_MISSES = "edgecascade:deadline_misses"
_TIER_MISSES, _TIER_REQUESTS = "edgecascade:tier_misses", "edgecascade:tier_requests"


@dataclass(frozen=True)
class Burn:
    """A budget that burns `factor` times as fast as it may, over the long window and still over the short one."""

    factor: float
    long: str
    short: str
    severity: str


BURNS = (
    Burn(14.4, "1h", "5m", "page"),
    Burn(6, "6h", "30m", "page"),
    Burn(3, "1d", "2h", "ticket"),
    Burn(1, "3d", "6h", "ticket"),
)


def groups(tiers: Sequence[Function]) -> dict[str, Any]:
    """A rule file's content: what `promtool check rules` reads, and a PrometheusRule's `spec`."""
    return {
        "groups": [
            _group("edgecascade-classes", [_class_misses(window) for window in WINDOWS]),
            _group("edgecascade-tiers", _tier_rules(tiers)),
            _group("edgecascade-demand", [rule for tier in tiers for rule in _demand(tier)]),
            _group("edgecascade-budgets", [*map(_class_alert, BURNS), *map(_tier_alert, BURNS)]),
            _group("edgecascade-states", _states(tiers)),
        ]
    }


def _group(name: str, rules: list[Rule]) -> dict[str, Any]:
    return {"name": name, "interval": "30s", "rules": rules}


def _class_misses(window: str) -> Rule:
    missed = f'sum by (deadline_class) (rate(edgecascade_deadlines_total{{outcome!="kept"}}[{window}]))'
    asked = f"sum by (deadline_class) (rate(edgecascade_deadlines_total[{window}]))"
    return {"record": f"{_CLASS_MISSES}:ratio_rate{window}", "expr": f"{missed}\n/ {asked}"}


def _tier_rules(tiers: Sequence[Function]) -> list[Rule]:
    """A group's rules are evaluated in their order: requests before the share that was missed."""
    both = (_tier_requests, _tier_misses)
    return [rule(tier, window) for tier in tiers for window in WINDOWS for rule in both]


def _tier_requests(tier: Function, window: str) -> Rule:
    """Those that were answered and those that were refused."""
    who = f'{FUNCTION_LABEL}="{tier.name}"'
    answered = f"sum(rate(edgecascade_request_seconds_count{{{who}}}[{window}]))"
    refused = f'sum(rate(edgecascade_rejections_total{{{who},code=~"{REFUSALS}"}}[{window}]))'
    expression = f"{answered}\n+ ({refused} or vector(0))"
    return {"record": f"{_TIER_REQUESTS}:rate{window}", "expr": expression, "labels": {FUNCTION_LABEL: tier.name}}


def _tier_misses(tier: Function, window: str) -> Rule:
    who = f'{FUNCTION_LABEL}="{tier.name}"'
    within = f'{who},le="{slo_seconds(tier)}"'
    in_time = f"sum by ({FUNCTION_LABEL}) (rate(edgecascade_request_seconds_bucket{{{within}}}[{window}]))"
    expression = f"1 - {in_time}\n/ {_TIER_REQUESTS}:rate{window}{{{who}}}"
    return {"record": f"{_TIER_MISSES}:ratio_rate{window}", "expr": expression, "labels": {FUNCTION_LABEL: tier.name}}


def _demand(tier: Function) -> list[Rule]:
    who = f'{{{FUNCTION_LABEL}="{tier.name}"}}'
    buckets = f"sum by (le) (rate(edgecascade_request_seconds_bucket{who}[5m]))"
    labels = {FUNCTION_LABEL: tier.name}
    return [
        {"record": "edgecascade:tier_demand:requests", "expr": demand(tier), "labels": labels},
        {
            "record": "edgecascade:request_seconds:p95_rate5m",
            "expr": f"histogram_quantile(0.95, {buckets})",
            "labels": labels,
        },
    ]


def _class_alert(burn: Burn) -> Rule:
    asked = f"sum by (deadline_class) (increase(edgecascade_deadlines_total[{burn.long}]))"
    says = "Deadlines of {{ $labels.deadline_class }} are missed: {{ $value | humanizePercentage }} of the last " + (
        burn.long
    )
    expression = _burning(_CLASS_MISSES, burn, CLASS_OBJECTIVE, asked, "deadline_class")
    return _alert("EdgecascadeDeadlinesMissed", expression, burn, says)


def _tier_alert(burn: Burn) -> Rule:
    asked = f"{_SECONDS[burn.long]} * {_TIER_REQUESTS}:rate{burn.long}"
    says = (
        f"The tier {{{{ $labels.{FUNCTION_LABEL} }}}} is too slow, or refuses: "
        f"{{{{ $value | humanizePercentage }}}} of the last {burn.long}"
    )
    expression = _burning(_TIER_MISSES, burn, PERCENTILE, asked, FUNCTION_LABEL)
    return _alert("EdgecascadeTierMisses", expression, burn, says)


def _burning(series: str, burn: Burn, objective: float, asked: str, label: str) -> str:
    limit = f"{burn.factor * (1 - objective):.4g}"
    return (
        f"{series}:ratio_rate{burn.long} > {limit}\n"
        f"and {series}:ratio_rate{burn.short} > {limit}\n"
        f"and on ({label}) {asked} >= {LEAST_REQUESTS}"
    )


def _alert(name: str, expression: str, burn: Burn, summary: str) -> Rule:
    labels = {"severity": burn.severity, "window": burn.long}
    return {"alert": name, "expr": expression, "labels": labels, "annotations": {"summary": summary}}


def _states(tiers: Sequence[Function]) -> list[Rule]:
    names = "|".join(tier.name for tier in tiers)
    ready = f'edgecascade_ready{{{FUNCTION_LABEL}=~"{names}"}}'
    by = f"by ({FUNCTION_LABEL})"
    fallbacks = 'sum by (node_id) (rate(edgecascade_requests_total{route="fallback"}[15m]))'
    answers = f'sum by (node_id) (rate(edgecascade_requests_total{{{FUNCTION_LABEL}="dispatcher"}}[15m]))'
    at_most = f"count {by} ({ready} == 1) >= {MAX_REPLICAS}"
    return [
        _state(
            "EdgecascadeTierNotReady",
            f"max {by} ({ready}) == 0",
            "5m",
            "page",
            f"No replica of {{{{ $labels.{FUNCTION_LABEL} }}}} takes requests",
        ),
        _state(
            "EdgecascadeTierAtItsMost",
            f"{at_most}\nand on ({FUNCTION_LABEL}) {_TIER_MISSES}:ratio_rate30m > {1 - PERCENTILE:.4g}",
            "15m",
            "ticket",
            f"{{{{ $labels.{FUNCTION_LABEL} }}}} runs as many replicas as it may, and is too slow",
        ),
        _state(
            "EdgecascadeFallbacks",
            f"{fallbacks} / {answers} > 0.1",
            "15m",
            "ticket",
            "{{ $labels.node_id }} answers {{ $value | humanizePercentage }} without a model",
        ),
        _state(
            "EdgecascadeBreakerOpen",
            "max by (node_id, tier) (edgecascade_breaker_open) == 1",
            "15m",
            "ticket",
            "{{ $labels.node_id }} has left the tier {{ $labels.tier }} alone for 15 minutes",
        ),
        _state(
            "EdgecascadeScalerBlind",
            "time() - max by (function, namespace) (edgecascade_scaler_last_success_timestamp_seconds) > 120",
            "3m",
            "ticket",
            "The scaler has no signals of {{ $labels.function }}: KEDA's fallback holds",
        ),
        _state(
            "EdgecascadePolicyRefused",
            "sum by (node_id) (increase(edgecascade_policy_refused_total[30m])) > 0",
            "0m",
            "ticket",
            "{{ $labels.node_id }} was given a policy that is none; the old one holds",
        ),
    ]


def _state(name: str, expression: str, lasting: str, severity: str, summary: str) -> Rule:
    return {
        "alert": name,
        "expr": expression,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }
