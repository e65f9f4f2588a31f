"""Replicas as Kubernetes' API tells them. What it may do: list pods in the functions' namespace.

Where edge nodes say how many replicas their battery and power allow, it may list nodes, too.
"""

from __future__ import annotations

from typing import Any

from kubernetes import client
from urllib3.exceptions import HTTPError

from scaler import kubernetes_api
from scaler.errors import SourceError
from scaler.replicas import Found, Replica

TIMEOUT_S = 3.0
CEILING = "edgecascade.io/power-ceiling"
"""A node's annotation: how many replicas its battery and power allow now."""
FUNCTION_PORT = 8080
"""The watchdog's: it passes `/metrics` on to the function."""
_OVER = frozenset({"Succeeded", "Failed"})


class KubernetesReplicas:
    """Pods with the label that faas-netes gives them; with `nodes` (a label selector) what their power allows."""

    def __init__(self, api: Any, nodes: str = "") -> None:
        self._api = api
        self._nodes = nodes

    def of(self, function: str, namespace: str) -> Found:
        """List the function's pods; those on their way out count no more. Raises `SourceError`."""
        try:
            pods = self._api.list_namespaced_pod(
                namespace,
                label_selector=f"faas_function={function}",
                resource_version="0",  # what the API server has in memory will do
                _request_timeout=TIMEOUT_S,
            )
            return Found([_replica(pod) for pod in pods.items if not _leaves(pod)], self._ceiling())
        except client.ApiException as error:
            raise SourceError(f"Kubernetes does not list the pods of '{namespace}' ({error.status})") from error
        except (HTTPError, OSError) as error:
            raise SourceError(f"Kubernetes' API did not answer ({type(error).__name__})") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise SourceError("Kubernetes' API answered with something else than pods") from error

    def _ceiling(self) -> int | None:
        """The sum of what the nodes allow; None if nobody asks, or while one of them does not say."""
        if not self._nodes:
            return None
        try:
            found = self._api.list_node(
                label_selector=self._nodes, resource_version="0", _request_timeout=TIMEOUT_S
            ).items
        except client.ApiException as error:
            raise SourceError(f"Kubernetes does not list the nodes '{self._nodes}' ({error.status})") from error
        allowed = [_allowed(node) for node in found]
        said = [count for count in allowed if count is not None]
        return sum(said) if said and len(said) == len(allowed) else None


def connect(nodes: str = "") -> KubernetesReplicas:
    """As `kubernetes_api.connect`; raises `SettingsError`."""
    return KubernetesReplicas(client.CoreV1Api(kubernetes_api.connect()), nodes)


def _leaves(pod: Any) -> bool:
    return pod.metadata.deletion_timestamp is not None or pod.status.phase in _OVER


def _replica(pod: Any) -> Replica:
    ready = any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or ())
    host = pod.status.pod_ip or ""
    host = f"[{host}]" if ":" in host else host
    return Replica(f"http://{host}:{FUNCTION_PORT}" if host else "", ready)


def _allowed(node: Any) -> int | None:
    """Replicas that a node's power allows; none on a cordoned or unready one. What is no number says nothing."""
    ready = any(c.type == "Ready" and c.status == "True" for c in node.status.conditions or ())
    if node.spec.unschedulable or not ready:
        return 0
    text = (node.metadata.annotations or {}).get(CEILING, "")
    return int(text) if text.isascii() and text.isdigit() else None
