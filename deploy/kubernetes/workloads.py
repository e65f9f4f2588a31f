"""The functions as ordinary Deployments and Services: pure.

For clusters without OpenFaaS, and for those whose network reaches Services only (KubeEdge's EdgeMesh). The images are
the same; gunicorn listens itself, without the watchdog, so the probes ask the function and not a lock file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.errors import StackError
from deploy.local.plan import BIND, PEER, WATCHDOG_KEYS
from deploy.stack import SECRETS_FOLDER, Function, Stack

Manifest = dict[str, Any]

PART_OF = "edgecascade"
FUNCTION_LABEL = "faas_function"
"""OpenFaaS puts it on a function's pods; ours bear it too, so that one selector and one query do for both."""
SITE_LABEL = "edgecascade.io/site"
DEVICE_SITE = "device-site"
PORT = 8080
# Endpoints are told of a pod's end while it still gets requests: it goes on for so long before it stops accepting.
LEAVE_S = 5


def plain(stack: Stack) -> list[Manifest]:
    """A Deployment and a Service for each function."""
    made = []
    for function in stack.functions.values():
        made += [deployment(function), service(function)]
    return made


def at_the_edge(stack: Stack) -> list[Manifest]:
    """As `plain`, but the functions of the device site share one pod on each of its nodes.

    They talk over the pod's loopback, so a node that is cut off from everything goes on answering. Only the first of
    them has a Service; on the node it is at 127.0.0.1:8080 too.
    """
    device_site = [f for f in stack.functions.values() if site_of(f) == "device"]
    others = Stack({f.name: f for f in stack.functions.values() if f not in device_site}, stack.copies)
    made = [_daemon_set(device_site), service(device_site[0])] if device_site else []
    return [*made, *plain(others)]


def deployment(function: Function) -> Manifest:
    """A function as a Deployment.

    `replicas` is left out: it belongs to whoever scales, and a manifest that names it would set it back.
    """
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": function.name, "labels": {**_labels(function.name), SITE_LABEL: site_of(function)}},
        "spec": {
            "selector": {"matchLabels": {FUNCTION_LABEL: function.name}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": _pod(function.name, site_of(function), [_container(function, PORT, {})], [function]),
        },
    }


def site_of(function: Function) -> str:
    """`device` or `edge`; raises `StackError` where stack.yml does not say."""
    site = function.labels.get("site", "")
    if site not in {"device", "edge"}:
        raise StackError(f"function '{function.name}' needs the label 'site: device' or 'site: edge' in stack.yml")
    return site


def service(function: Function) -> Manifest:
    """A ClusterIP Service with a named port: what EdgeMesh serves and service meshes read."""
    port = {"name": "http", "port": PORT, "targetPort": "http", "appProtocol": "http"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": function.name, "labels": _labels(function.name)},
        "spec": {"type": "ClusterIP", "selector": {FUNCTION_LABEL: function.name}, "ports": [port]},
    }


def _daemon_set(functions: Sequence[Function]) -> Manifest:
    """One pod a node; the first function is the one that is asked."""
    first = functions[0]
    ports = {function.name: PORT + number for number, function in enumerate(functions)}
    containers = [_container(function, ports[function.name], ports) for function in functions]
    containers[0]["ports"][0] |= {"hostPort": PORT, "hostIP": "127.0.0.1"}
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": DEVICE_SITE, "labels": {**_labels(DEVICE_SITE), SITE_LABEL: "device"}},
        "spec": {
            "selector": {"matchLabels": {FUNCTION_LABEL: first.name}},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
            "template": _pod(first.name, "device", containers, functions),
        },
    }


def _pod(name: str, site: str, containers: list[Manifest], functions: Sequence[Function]) -> Manifest:
    volumes: list[Manifest] = [{"name": "tmp", "emptyDir": {}}, *map(_secrets, (f for f in functions if f.secrets))]
    return {
        "metadata": {"labels": {**_labels(name), FUNCTION_LABEL: name, SITE_LABEL: site}},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 75,  # the five seconds of leaving, then the 60 of gunicorn's drain
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "fsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": containers,
            "volumes": volumes,
        },
    }


def _container(function: Function, port: int, beside: Mapping[str, int]) -> Manifest:
    """A function in its pod; those `beside` it are on the pod's loopback, on the port named."""
    named = "http" if port == PORT else f"http-{port}"
    mounts: list[Manifest] = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - the one place where the image may write
    if function.secrets:
        mounts.append({"name": _secrets(function)["name"], "mountPath": SECRETS_FOLDER.rstrip("/"), "readOnly": True})
    return {
        "name": function.name,
        "image": function.image,
        "imagePullPolicy": "IfNotPresent",  # the model is in the image: a node that is cut off starts from its own copy
        "command": _words(function, port),
        "env": _environment(function, beside),
        "ports": [{"name": named, "containerPort": port}],
        # Loading is told apart from working: only once the model is there do the other two count. A full queue is no
        # reason to take a pod out of its Service, hence readiness asks for health.
        "startupProbe": _probe("/_/ready", named, period=2, failures=90),
        "readinessProbe": _probe("/healthz", named, period=5, failures=2),
        "livenessProbe": _probe("/healthz", named, period=10, failures=6),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVE_S)]}}},
        "resources": {"requests": dict(function.requests), "limits": dict(function.limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _secrets(function: Function) -> Manifest:
    """The volume of one function's secrets: another in the same pod does not see them."""
    sources = [{"secret": {"name": secret}} for secret in function.secrets]
    return {"name": f"{function.name}-secrets", "projected": {"defaultMode": 0o440, "sources": sources}}


def _probe(path: str, port: str, period: int, failures: int) -> Manifest:
    asked = {"path": path, "port": port}
    return {"httpGet": asked, "periodSeconds": period, "timeoutSeconds": 2, "failureThreshold": failures}


def _words(function: Function, port: int) -> list[str]:
    words = function.fprocess.split()
    if BIND not in words[:-1]:
        raise StackError(f"the fprocess of '{function.name}' has no '{BIND} ADDRESS'; the pod's port is put there")
    words[words.index(BIND) + 1] = f"0.0.0.0:{port}"
    return words


def _environment(function: Function, beside: Mapping[str, int]) -> list[Manifest]:
    """What stack.yml says, less the watchdog's settings; peers by their Service; the node's name from the node."""
    values = {key: value for key, value in function.environment.items() if key not in WATCHDOG_KEYS}
    made: list[Manifest] = []
    for key, value in values.items():
        if key == "NODE_ID":
            made.append({"name": key, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}})
        else:
            made.append({"name": key, "value": _peers(value, beside)})
    return made


def _peers(value: str, beside: Mapping[str, int]) -> str:
    def address(found: re.Match[str]) -> str:
        name = found["name"]
        return f"http://127.0.0.1:{beside[name]}" if name in beside else f"http://{name}:{PORT}"

    return PEER.sub(address, value)


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": PART_OF}
