"""A tier cut over several nodes: pure.

The first shard keeps the tier's name and Service, and talks HTTP. Each of the others is a Deployment of its own behind
a headless Service: its name stands for all its replicas' addresses, so that the shard before picks one for each
session and goes on with another where one dies. A ClusterIP would pick anew at random, and hide who is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deploy.kubernetes.workloads import FUNCTION_LABEL, PART_OF, PORT, Manifest, deployment
from deploy.stack import Function

LINK_PORT = 5051
REPLICAS = 2
"""Of each shard but the first: one to go on with when the other dies."""
TLS_SECRET = "edgecascade-shard-tls"  # noqa: S105 - the name of one
SPIFFE_ID = "spiffe://edgecascade/edge"
_TLS = "/etc/edgecascade/shard"
_SHARD_LABEL = "edgecascade.io/shard-of"
_MONITORING = {
    "matchExpressions": [
        {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["monitoring", "observability"]}
    ]
}


def head_patch(tier: Function, cuts: Sequence[str]) -> Manifest:
    """What the tier's own Deployment is changed by to be the first shard; `cuts` are layers such as `0-14`."""
    name = tier.name
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "template": {
                "spec": {
                    "containers": [{"name": name, "env": _entries(tier, cuts, 0), "volumeMounts": [_mount()]}],
                    "volumes": [_volume()],
                }
            }
        },
    }


def others(tier: Function, cuts: Sequence[str]) -> list[Manifest]:
    """The shards after the first, their Services, and who may talk to whom."""
    made: list[Manifest] = []
    for number in range(1, len(cuts)):
        made += [_shard(tier, cuts, number), _headless(tier, number)]
    return [*made, _policy(tier, len(cuts))]


def _shard(tier: Function, cuts: Sequence[str], number: int) -> Manifest:
    environment = {**tier.environment, **{e["name"]: e["value"] for e in _entries(tier, cuts, number)}}
    made = deployment(replace(tier, name=_name(tier, number), environment=environment))
    made["spec"]["replicas"] = REPLICAS
    labels = {_SHARD_LABEL: tier.name}
    made["metadata"]["labels"] |= labels
    made["spec"]["template"]["metadata"]["labels"] |= labels
    pod = made["spec"]["template"]["spec"]
    pod["affinity"] = {"podAntiAffinity": _apart(_name(tier, number))}
    pod["volumes"].append(_volume())
    container = pod["containers"][0]
    container["ports"].append({"name": "grpc", "containerPort": LINK_PORT})
    container["volumeMounts"].append(_mount())
    return made


def _headless(tier: Function, number: int) -> Manifest:
    name = _name(tier, number)
    port = {"name": "grpc", "port": LINK_PORT, "targetPort": "grpc", "appProtocol": "grpc"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": PART_OF}},
        "spec": {"clusterIP": "None", "selector": {FUNCTION_LABEL: name}, "ports": [port]},
    }


def _policy(tier: Function, count: int) -> Manifest:
    """Policies add up: this one lets a tier, which else calls nobody, call its shards and ask for their addresses."""
    names = [tier.name, *(_name(tier, number) for number in range(1, count))]
    them = {"matchExpressions": [{"key": FUNCTION_LABEL, "operator": "In", "values": names}]}
    links = [{"port": LINK_PORT}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{PART_OF}-shards", "labels": {"app.kubernetes.io/part-of": PART_OF}},
        "spec": {
            "podSelector": them,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [{"podSelector": them}], "ports": links},
                {"from": [{"namespaceSelector": _MONITORING}], "ports": [{"port": PORT}]},
            ],
            "egress": [
                {"to": [{"podSelector": them}], "ports": links},
                {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
            ],
        },
    }


def _entries(tier: Function, cuts: Sequence[str], number: int) -> list[dict[str, str]]:
    values = {
        "SHARD_ID": str(number),
        "SHARD_LAYERS": cuts[number],
        "SHARD_LISTEN": str(LINK_PORT),
        "SHARD_TLS_CERT": f"{_TLS}/tls.crt",
        "SHARD_TLS_KEY": f"{_TLS}/tls.key",
        "SHARD_TLS_CA": f"{_TLS}/ca.crt",
        "SHARD_PEERS": SPIFFE_ID,
    }
    if number + 1 < len(cuts):
        values["SHARD_NEXT"] = f"{_name(tier, number + 1)}:{LINK_PORT}"
    return [{"name": key, "value": value} for key, value in values.items()]


def _apart(name: str) -> dict[str, Any]:
    """Replicas of a shard on nodes of their own, where there are enough."""
    term = {"labelSelector": {"matchLabels": {FUNCTION_LABEL: name}}, "topologyKey": "kubernetes.io/hostname"}
    return {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}


def _volume() -> dict[str, Any]:
    return {"name": "shard-tls", "secret": {"secretName": TLS_SECRET, "defaultMode": 0o440}}


def _mount() -> dict[str, Any]:
    return {"name": "shard-tls", "mountPath": _TLS, "readOnly": True}


def _name(tier: Function, number: int) -> str:
    return f"{tier.name}-shard-{number}"
