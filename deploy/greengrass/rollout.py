"""Plans a deployment to a target, and starts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.errors import CloudError
from deploy.greengrass import merge, target
from deploy.greengrass.build import Component
from deploy.greengrass.cloud import Cloud
from deploy.greengrass.merge import Change
from deploy.greengrass.publish import DEPLOYABLE, IN_THE_MAKING, failure, state

_EARLIER = 2


@dataclass(frozen=True)
class Plan:
    """`request` for CreateDeployment, or None where the target has it all as revision `deployment_id`."""

    request: dict[str, Any] | None
    deployment_id: str
    says: Sequence[str]


def plan(built: Sequence[Component], changes: Mapping[str, Change], to: str, cloud: Cloud, on_failure: str) -> Plan:
    """What deploying the components to a target changes: reads only. Raises `CloudError`."""
    for component in built:
        _deployable(component.name, component.version, cloud)
    had = target.latest(to, cloud)
    running = (had or {}).get("components", {})
    ours = {one.name: merge.spec(one.version, running.get(one.name), changes.get(one.name, Change())) for one in built}
    return _plan(to, had, ours, on_failure)


def back(built: Sequence[Component], to: str, cloud: Cloud, on_failure: str) -> Plan:
    """What taking the components back to the target's revision before changes: reads only. Raises `CloudError`."""
    found = target.revisions(to, cloud)
    if len(found) < _EARLIER:
        raise CloudError(f"{to} has no revision before this one to go back to")
    had, before = (target.revision(one["deploymentId"], cloud) for one in found[:_EARLIER])
    ours = {one.name: before.get("components", {}).get(one.name) for one in built}
    for name, spec in ours.items():
        if spec is not None:
            _deployable(name, spec["componentVersion"], cloud)
    return _plan(to, had, ours, on_failure)


def start(planned: Plan, cloud: Cloud) -> str:
    """Make the deployment if there is one to make; returns the id of the revision that holds. Raises `CloudError`."""
    return target.create(planned.request, cloud) if planned.request else planned.deployment_id


def _plan(
    to: str, had: Mapping[str, Any] | None, ours: Mapping[str, Mapping[str, Any] | None], on_failure: str
) -> Plan:
    made = merge.request(to, had, ours, on_failure)
    deployment_id = (had or {}).get("deploymentId", "")
    if made is None:
        return Plan(None, deployment_id, [f"{to} has it all, by deployment {deployment_id}: nothing to change"])
    return Plan(made, deployment_id, [f"deploy to {to}", *merge.differences(had, made)])


def _deployable(name: str, version: str, cloud: Cloud) -> None:
    there = state(cloud, name, version)
    if there is None:
        raise CloudError(f"{name} {version} is not published; publish it first: edgecascade greengrass publish")
    found = there["status"]["componentState"]
    if found in IN_THE_MAKING:
        raise CloudError(f"{name} {version} is still being made ({found}); repeat the command in a minute")
    if found != DEPLOYABLE:
        raise failure(name, version, there["status"])
