"""A target, a thing or a thing group: what it should run, and how each of its core devices took it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.errors import CloudError
from deploy.greengrass.cloud import Cloud, MissingError, asked, pages
from deploy.greengrass.publish import Sleep

ENDED_WELL = frozenset({"SUCCEEDED", "COMPLETED"})
ENDED_BADLY = frozenset({"FAILED", "TIMED_OUT", "CANCELED", "REJECTED"})
NOT_HEARD = "NOT HEARD"
POLL_S = 3.0
_TARGET = re.compile(r"^arn:[^:]*:iot:(?P<region>[^:]*):(?P<account>\d+):(?P<kind>thing|thinggroup)/(?P<name>.+)$")


@dataclass(frozen=True)
class Result:
    """How one core device took a deployment; `errors` is the stack, the outermost first."""

    device: str
    status: str
    reason: str = ""
    errors: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """One line."""
        stack = f" [{' > '.join(self.errors)}]" if self.errors else ""
        return f"{self.device}: {self.status}{f' ({self.reason})' if self.reason else ''}{stack}"


def check(target: str, cloud: Cloud) -> None:
    """Raise `CloudError` for what is no target, or one of another account or region."""
    found = _TARGET.match(target)
    if not found:
        raise CloudError(f"--target '{target}' must look like arn:aws:iot:REGION:ACCOUNT:thinggroup/NAME (or :thing/)")
    if (found["region"], found["account"]) != (cloud.region, cloud.account):
        here = f"{cloud.region} of account {cloud.account}"
        raise CloudError(f"--target is in {found['region']} of account {found['account']}, but we are in {here}")


def revisions(target: str, cloud: Cloud) -> list[dict[str, Any]]:
    """The target's deployments, the newest first; raises `CloudError`."""
    with asked(f"listing the deployments of {target}"):
        found = pages(cloud.greengrass, "list_deployments", "deployments", targetArn=target, historyFilter="ALL")
    return sorted(found, key=lambda one: (bool(one.get("isLatestForTarget")), one["creationTimestamp"]), reverse=True)


def revision(deployment_id: str, cloud: Cloud) -> dict[str, Any]:
    """One deployment as it was asked for; raises `CloudError`."""
    with asked(f"reading the deployment {deployment_id}"):
        found: dict[str, Any] = cloud.greengrass.get_deployment(deploymentId=deployment_id)
    return found


def latest(target: str, cloud: Cloud) -> dict[str, Any] | None:
    """The revision that the target should run; None if there is none yet. Raises `CloudError`."""
    found = revisions(target, cloud)
    return revision(found[0]["deploymentId"], cloud) if found else None


def create(made: dict[str, Any], cloud: Cloud) -> str:
    """Make the deployment; returns its id. Raises `CloudError`."""
    with asked(f"deploying to {made['targetArn']}"):
        return str(cloud.greengrass.create_deployment(**made)["deploymentId"])


def results(target: str, deployment_id: str, cloud: Cloud) -> list[Result]:
    """How each core device of the target took the deployment, by name; raises `CloudError`."""
    return [_result(device, deployment_id, cloud) for device in sorted(_devices(target, cloud))]


def watch(target: str, deployment_id: str, cloud: Cloud, wait_s: float, sleep: Sleep = time.sleep) -> list[Result]:
    """Wait until every core device has ended one way or the other, at most `wait_s`; raises `CloudError`."""
    waited_s = 0.0
    while True:
        found = results(target, deployment_id, cloud)
        if waited_s >= wait_s or all(result.status in ENDED_WELL | ENDED_BADLY for result in found):
            return found
        sleep(POLL_S)
        waited_s += POLL_S


def verdict(found: Sequence[Result]) -> str:
    """A sentence on all devices."""
    well = sum(result.status in ENDED_WELL for result in found)
    badly = sum(result.status in ENDED_BADLY for result in found)
    return f"{well} of {len(found)} core devices succeeded, {badly} failed, {len(found) - well - badly} not ended"


def _devices(target: str, cloud: Cloud) -> list[str]:
    found = _TARGET.match(target)
    if found and found["kind"] == "thing":
        return [found["name"]]
    with asked(f"listing the core devices of {target}"):
        devices = pages(cloud.greengrass, "list_core_devices", "coreDevices", thingGroupArn=target)
    return [device["coreDeviceThingName"] for device in devices]


def _result(device: str, deployment_id: str, cloud: Cloud) -> Result:
    try:
        with asked(f"asking how {device} took the deployment"):
            found = pages(
                cloud.greengrass, "list_effective_deployments", "effectiveDeployments", coreDeviceThingName=device
            )
    except MissingError:  # a thing that never connected as a core device
        return Result(device, NOT_HEARD)
    for one in found:
        if one["deploymentId"] == deployment_id:
            stack = tuple(one.get("statusDetails", {}).get("errorStack", ()))
            return Result(device, one["coreDeviceExecutionStatus"], one.get("reason", ""), stack)
    return Result(device, NOT_HEARD)
