"""Put a plan into force: shard by shard, each told its layers; the platform drains the sessions of what it replaces.

Shards have names and addresses in the order of the model, which stay; what changes is which layers each runs, on which
nodes, and whether another comes after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kubernetes import client
from urllib3.exceptions import HTTPError

from scaler import kubernetes_api
from scaler.errors import SettingsError
from scaler.placement.errors import ApplyError
from scaler.placement.values import Plan

LAYERS, NEXT = "SHARD_LAYERS", "SHARD_NEXT"
"""The environment variables that tell a shard its layers, `first-last`, and where those after it listen, or nothing."""
MANAGER = "edgecascade-placement"
"""Who owns the fields that are applied, as Kubernetes keeps book of it."""
HOSTNAME = "kubernetes.io/hostname"
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Shard:
    """One shard of the bundle; `address` is where it listens for the one before it, as `SHARD_NEXT` has it."""

    name: str
    address: str = ""


@dataclass(frozen=True)
class Assignment:
    """What one shard is to be: `layers` as `SHARD_LAYERS` has them, on each of `nodes`; without any it stops.

    `next` is the address of the shard after it, empty where it ends the model.
    """

    shard: str
    layers: str
    nodes: tuple[str, ...]
    next: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """What the shard is told."""
        return {LAYERS: self.layers, NEXT: self.next}


class Applier(Protocol):
    """Something that runs shards."""

    def apply(self, plan: Plan) -> None:
        """Let the shards be as planned, and return when they are; raises `ApplyError`."""

    def drifted(self, plan: Plan) -> bool:
        """Whether what runs is not the plan, because somebody else changed it; raises `ApplyError`."""


def assignments(plan: Plan, shards: Sequence[Shard]) -> list[Assignment]:
    """What each shard is to be; those that are not needed stop. Raises `ApplyError` where there are too few."""
    if len(plan.stages) > len(shards):
        raise ApplyError(
            f"the plan has {len(plan.stages)} ranges of layers and the bundle {len(shards)} shards; "
            f"add {len(plan.stages) - len(shards)} to stack.yml, or exclude nodes"
        )
    after = [*(shard.address for shard in shards[1 : len(plan.stages)]), ""]
    used = zip(shards, plan.stages, after, strict=False)
    found = [Assignment(shard.name, stage.layers, stage.nodes, address) for shard, stage, address in used]
    return found + [Assignment(shard.name, "", ()) for shard in shards[len(plan.stages) :]]


class KubernetesApplier:
    """Shards that are Deployments, as faas-netes makes them: of the shard's name, with one container of that name.

    Fields are changed by server-side apply under `MANAGER`: layers and successor in the environment, how many replicas,
    and the nodes they may run on, spread one a node. Nothing else is touched. A rolling update starts the new pod
    before it ends the old one, whose SIGTERM drains its sessions.
    """

    def __init__(
        self,
        api: Any,
        namespace: str,
        shards: Sequence[Shard],
        ready_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._api, self._namespace, self._shards = api, namespace, tuple(shards)
        self._ready_s, self._clock, self._sleep = ready_s, clock, sleep

    def apply(self, plan: Plan) -> None:
        """Change all Deployments, the last shard's first, and wait until their pods are ready.

        All changes are tried by the API server without effect before the first one is made.
        """
        wanted = assignments(plan, self._shards)
        for assignment in wanted:
            self._patch(assignment, dry_run="All")
        for assignment in reversed(wanted):
            self._patch(assignment)
        give_up_s = self._clock() + self._ready_s
        for assignment in wanted:
            while not self._is_ready(assignment):
                if self._clock() >= give_up_s:
                    raise ApplyError(f"'{assignment.shard}' is not ready {self._ready_s:g} s after it was changed")
                self._sleep(1.0)

    def drifted(self, plan: Plan) -> bool:
        """Whether a Deployment says something else than the plan."""
        return any(self._said(self._read(a.shard), a) != a for a in assignments(plan, self._shards))

    def _said(self, deployment: Any, wanted: Assignment) -> Assignment:
        if not deployment.spec.replicas and not wanted.nodes:
            return wanted
        environment = {e.name: e.value for c in deployment.spec.template.spec.containers for e in c.env or ()}
        selected = _selected(deployment.spec.template.spec.affinity)
        same = deployment.spec.replicas == len(wanted.nodes) and set(selected) == set(wanted.nodes)
        layers, after = (environment.get(key) or "" for key in (LAYERS, NEXT))
        return Assignment(wanted.shard, layers, wanted.nodes if same else selected, after)

    def _is_ready(self, assignment: Assignment) -> bool:
        found = self._read(assignment.shard)
        status, replicas = found.status, len(assignment.nodes)
        seen = (status.observed_generation or 0) >= found.metadata.generation
        counts = (status.updated_replicas or 0, status.ready_replicas or 0, status.replicas or 0)
        return seen and counts == (replicas,) * 3

    def _read(self, name: str) -> Any:
        return self._asked(name, lambda: self._api.read_namespaced_deployment(name, self._namespace, **_BOUND))

    def _patch(self, assignment: Assignment, **options: str) -> None:
        self._asked(
            assignment.shard,
            lambda: self._api.patch_namespaced_deployment(
                assignment.shard,
                self._namespace,
                deployment(assignment),
                field_manager=MANAGER,
                force=True,
                _content_type="application/apply-patch+yaml",
                **_BOUND,
                **options,
            ),
        )

    def _asked(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except client.ApiException as error:
            what = _STATUS.get(error.status or 0, f"refused the change ({error.status})")
            raise ApplyError(f"Kubernetes {what}: Deployment '{name}' in '{self._namespace}'") from error
        except (HTTPError, OSError) as error:
            raise ApplyError(f"Kubernetes' API did not answer ({type(error).__name__})") from error


_BOUND = {"_request_timeout": TIMEOUT_S}
_STATUS = {404: "knows no such shard, deploy it first", 403: "does not let this account change or read it"}


def deployment(assignment: Assignment) -> dict[str, Any]:
    """The fields that placement owns of a shard's Deployment, as server-side apply takes them."""
    found: dict[str, Any] = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": assignment.shard},
        "spec": {"replicas": len(assignment.nodes)},
    }
    if assignment.nodes:
        terms = [{"matchExpressions": [{"key": HOSTNAME, "operator": "In", "values": list(assignment.nodes)}]}]
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        spread = {
            "maxSkew": 1,
            "topologyKey": HOSTNAME,
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"faas_function": assignment.shard}},
            "matchLabelKeys": ["pod-template-hash"],  # the pods that a rolling update replaces do not count
        }
        environment = [{"name": name, "value": value} for name, value in assignment.environment.items()]
        container = {"name": assignment.shard, "env": environment}
        pod = {"affinity": {"nodeAffinity": required}, "topologySpreadConstraints": [spread], "containers": [container]}
        found["spec"]["template"] = {"spec": pod}
    return found


def _selected(affinity: Any) -> tuple[str, ...]:
    """The nodes that a pod may run on, as `deployment` writes them."""
    required = (
        affinity
        and affinity.node_affinity
        and affinity.node_affinity.required_during_scheduling_ignored_during_execution
    )
    terms = required.node_selector_terms if required else ()
    return tuple(
        value for term in terms for e in term.match_expressions or () if e.key == HOSTNAME for value in e.values or ()
    )


def connect(namespace: str, shards: Sequence[Shard]) -> KubernetesApplier:
    """As `kubernetes_api.connect`; raises `ApplyError` where there is no connection."""
    try:
        return KubernetesApplier(client.AppsV1Api(kubernetes_api.connect()), namespace, shards)
    except SettingsError as error:
        raise ApplyError(str(error)) from error
