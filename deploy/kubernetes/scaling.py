"""A ScaledObject for each tier of the stack: pure.

Two kinds of triggers: `external` asks our scaler, which computes replicas itself (AverageValue, target 1, so
desired = value); `prometheus` is for clusters without it and scales on the requests in a tier, per slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deploy.kubernetes.workloads import FUNCTION_LABEL, PART_OF, Manifest
from deploy.stack import Function, Stack

SCALER = "edgecascade-scaler"
CLIENT_SECRET = "edgecascade-keda-tls"  # noqa: S105 - the name of one
SCALER_PORT = 6000
PERCENTILE = 0.95
MIN_REPLICAS, MAX_REPLICAS = 1, 5
"""Bounds of OpenFaaS' community edition: it wakes nothing from zero by itself, and takes no more than five."""
FALLBACK_REPLICAS = 2
POLLING_S = 15
TARGET_SHARE = 0.7
"""How full a replica's slots may be where there is no model of its queue."""
_SLO_SECONDS = {"device": 0.1, "edge": 2.0}
_DEFAULT_SLO_SECONDS = 1.0


@dataclass(frozen=True)
class Place:
    """Where a cluster has its functions and its Prometheus."""

    namespace: str
    prometheus: str

    @property
    def scaler(self) -> str:
        """Where KEDA, in a namespace of its own, finds the scaler; the certificate bears this name."""
        return f"{SCALER}.{self.namespace}.svc:{SCALER_PORT}"


def tiers(stack: Stack) -> list[Function]:
    """The functions that hold a model: any number of replicas of one answers alike."""
    return [function for function in stack.functions.values() if "TIER_NAME" in function.environment]


def slo_seconds(tier: Function) -> float:
    """Within what time `PERCENTILE` of its requests are to be answered; a bucket's bound, for the alerts count it."""
    return _SLO_SECONDS.get(tier.name, _DEFAULT_SLO_SECONDS)


def slots(tier: Function) -> int:
    """The requests that one replica answers at once."""
    return int(tier.environment["MAX_INFLIGHT"])


def by_scaler(scaled: list[Function], place: Place) -> list[Manifest]:
    """ScaledObjects that ask our scaler, and how KEDA proves to it who it is."""
    return [_authentication(), *(_scaled_object(tier, _external(tier, place)) for tier in scaled)]


def by_prometheus(scaled: list[Function], place: Place) -> list[Manifest]:
    """ScaledObjects that need KEDA and Prometheus only."""
    return [_scaled_object(tier, _query(tier, place)) for tier in scaled]


def demand(tier: Function) -> str:
    """PromQL: the requests in a tier, at work or waiting, over the last minute."""
    who = f'{{{FUNCTION_LABEL}="{tier.name}"}}'
    series = ("edgecascade_inflight_requests", "edgecascade_waiting_requests")
    return " + ".join(f"sum(avg_over_time({one}{who}[1m]))" for one in series)


def _external(tier: Function, place: Place) -> dict[str, Any]:
    return {
        "type": "external",
        "metricType": "AverageValue",
        "metadata": {
            "scalerAddress": place.scaler,
            "enableTLS": "true",
            "function": tier.name,
            "namespace": place.namespace,
            "sloSeconds": str(slo_seconds(tier)),
            "percentile": str(PERCENTILE),
            "minReplicas": str(MIN_REPLICAS),
            "maxReplicas": str(MAX_REPLICAS),
            "slots": str(slots(tier)),
            "coldStartSeconds": "15",
            "prometheusAddress": place.prometheus,
            "windowSeconds": "60",
            "staleSeconds": "30",
        },
        "authenticationRef": {"name": SCALER},
    }


def _query(tier: Function, place: Place) -> dict[str, Any]:
    return {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": place.prometheus,
            "query": demand(tier),
            "threshold": str(math.floor(10 * TARGET_SHARE * slots(tier)) / 10),
            "ignoreNullValues": "false",  # no data is an error, never a zero
        },
    }


def _scaled_object(tier: Function, trigger: dict[str, Any]) -> Manifest:
    up = {"type": "Pods", "value": MAX_REPLICAS, "periodSeconds": 15}
    down = {"type": "Pods", "value": 1, "periodSeconds": 60}
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": tier.name, "labels": {"app.kubernetes.io/part-of": PART_OF}},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": tier.name},
            "pollingInterval": POLLING_S,
            "minReplicaCount": MIN_REPLICAS,
            "maxReplicaCount": MAX_REPLICAS,
            "fallback": {
                "failureThreshold": 3,
                "replicas": FALLBACK_REPLICAS,
                "behavior": "currentReplicasIfHigher",
            },
            "advanced": {
                "horizontalPodAutoscalerConfig": {
                    "behavior": {
                        "scaleUp": {"stabilizationWindowSeconds": 0, "selectPolicy": "Max", "policies": [up]},
                        "scaleDown": {"stabilizationWindowSeconds": 300, "selectPolicy": "Max", "policies": [down]},
                    }
                }
            },
            "triggers": [trigger],
        },
    }


def _authentication() -> Manifest:
    """Certificates come from a Secret that is never part of the manifests; docs/kubernetes.md makes it."""
    files = {"caCert": "ca.crt", "tlsClientCert": "tls.crt", "tlsClientKey": "tls.key"}
    references = [{"parameter": name, "name": CLIENT_SECRET, "key": key} for name, key in files.items()]
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "TriggerAuthentication",
        "metadata": {"name": SCALER, "labels": {"app.kubernetes.io/part-of": PART_OF}},
        "spec": {"secretTargetRef": references},
    }
