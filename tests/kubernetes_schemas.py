"""The custom resources that our manifests use, as far as they use them.

Written by hand from the documents of KEDA 2.17 and later (ScaledObject, TriggerAuthentication, the external and the
Prometheus scaler) and of the Prometheus operator (PrometheusRule, PodMonitor); no field beyond those that we use is
allowed, so that a misspelt one is found. Validation by a cluster's own CRDs is another thing.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"}
DURATION: Schema = {"type": "string", "pattern": r"^(0|(\d+d)?(\d+h)?(\d+m)?(\d+s)?)$", "minLength": 1}
SECONDS: Schema = {"type": "integer", "minimum": 1}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^[-\w.]{0,63}$"}}


def closed(required: str, **properties: Schema) -> Schema:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "required": required.split(),
        "additionalProperties": False,
        "properties": properties,
    }


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def resource(api_version: str, kind: str, spec: Schema) -> Schema:
    metadata = closed("name namespace", name=NAME, namespace=NAME, labels=LABELS)
    return closed(
        "apiVersion kind metadata spec",
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


POLICY = closed(
    "type value periodSeconds",
    type={"enum": ["Pods", "Percent"]},
    value=SECONDS,
    periodSeconds={**SECONDS, "maximum": 1800},
)
DIRECTION = closed(
    "policies",
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
    selectPolicy={"enum": ["Max", "Min", "Disabled"]},
    policies=listed(POLICY),
)
# All values of a trigger's metadata are texts, numbers and truths too.
EXTERNAL = closed(
    "scalerAddress function namespace sloSeconds percentile minReplicas maxReplicas prometheusAddress",
    **dict.fromkeys(
        (
            *("scalerAddress", "enableTLS", "unsafeSsl", "function", "namespace", "sloSeconds", "percentile"),
            *("minReplicas", "maxReplicas", "slots", "coldStartSeconds", "prometheusAddress", "windowSeconds"),
            "staleSeconds",
        ),
        TEXT,
    ),
)
PROMETHEUS = closed(
    "serverAddress query threshold",
    **dict.fromkeys(("serverAddress", "query", "threshold", "activationThreshold", "ignoreNullValues"), TEXT),
)
TRIGGER: Schema = {
    "oneOf": [
        closed(
            "type metricType metadata authenticationRef",
            type={"const": "external"},
            metricType={"const": "AverageValue"},
            metadata=EXTERNAL,
            authenticationRef=closed("name", name=NAME),
        ),
        closed(
            "type metricType metadata",
            type={"const": "prometheus"},
            metricType={"const": "AverageValue"},
            metadata=PROMETHEUS,
        ),
    ]
}
SCALED_OBJECT = resource(
    "keda.sh/v1alpha1",
    "ScaledObject",
    closed(
        "scaleTargetRef triggers",
        scaleTargetRef=closed("name", apiVersion=TEXT, kind={"enum": ["Deployment", "StatefulSet"]}, name=NAME),
        pollingInterval=SECONDS,
        minReplicaCount={"type": "integer", "minimum": 0},
        maxReplicaCount=SECONDS,
        fallback=closed(
            "failureThreshold replicas",
            failureThreshold=SECONDS,
            replicas={"type": "integer", "minimum": 0},
            behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]},
        ),
        advanced=closed(
            "horizontalPodAutoscalerConfig",
            horizontalPodAutoscalerConfig=closed(
                "behavior", behavior=closed("scaleUp scaleDown", scaleUp=DIRECTION, scaleDown=DIRECTION)
            ),
        ),
        triggers=listed(TRIGGER),
    ),
)
TRIGGER_AUTHENTICATION = resource(
    "keda.sh/v1alpha1",
    "TriggerAuthentication",
    closed(
        "secretTargetRef",
        secretTargetRef=listed(
            closed(
                "parameter name key",
                parameter={"enum": ["caCert", "tlsClientCert", "tlsClientKey"]},
                name=NAME,
                key=TEXT,
            )
        ),
    ),
)
RECORDING = closed("record expr", record={"type": "string", "pattern": r"^[a-z_][\w:]*$"}, expr=TEXT, labels=LABELS)
ALERT = closed(
    "alert expr labels annotations",
    alert={"type": "string", "pattern": r"^[A-Z]\w+$"},
    expr=TEXT,
    labels=closed("severity", severity={"enum": ["page", "ticket"]}, window=TEXT),
    annotations=closed("summary", summary=TEXT),
    **{"for": DURATION},
)
PROMETHEUS_RULE = resource(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    closed(
        "groups",
        groups=listed(
            closed("name interval rules", name=NAME, interval=DURATION, rules=listed({"oneOf": [RECORDING, ALERT]}))
        ),
    ),
)
ENDPOINT = closed(
    "path interval",
    port=NAME,
    portNumber=SECONDS,
    path=TEXT,
    interval=DURATION,
    relabelings=listed(closed("sourceLabels targetLabel", sourceLabels=listed(TEXT), targetLabel=TEXT)),
)
POD_MONITOR = resource(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    closed("selector podMetricsEndpoints", selector={"type": "object"}, podMetricsEndpoints=listed(ENDPOINT)),
)
CUSTOM = {
    "ScaledObject": SCALED_OBJECT,
    "TriggerAuthentication": TRIGGER_AUTHENTICATION,
    "PrometheusRule": PROMETHEUS_RULE,
    "PodMonitor": POD_MONITOR,
}
