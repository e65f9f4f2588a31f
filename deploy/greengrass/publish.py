"""Sends a rendered folder to AWS: artifacts to S3, then each component's version; what is there already stays.

What is to be done is found out first, by reading alone, and then done step by step: a dry run prints the same steps.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.errors import CloudError
from deploy.greengrass.build import Component, refuse
from deploy.greengrass.cloud import Cloud, ConflictError, MissingError, asked
from deploy.greengrass.recipe import BUCKET
from deploy.greengrass.wheels import sha256

DIGEST_TAG = "edgecascade:recipe-sha256"
DIGEST_FIELD = "sha256"
DEPLOYABLE = "DEPLOYABLE"
IN_THE_MAKING = frozenset({"REQUESTED", "INITIATED"})
POLL_S = 2.0
Say = Callable[[str], None]
Sleep = Callable[[float], None]


@dataclass(frozen=True)
class Upload:
    """An artifact that the bucket lacks."""

    bucket: str
    key: str
    path: Path

    @property
    def says(self) -> str:
        """One line."""
        return f"upload s3://{self.bucket}/{self.key} ({self.path.stat().st_size} bytes)"


@dataclass(frozen=True)
class Create:
    """A component version that is to be made of a recipe; `digest` is the recipe's, and so that of all artifacts."""

    arn: str
    name: str
    version: str
    recipe: str
    digest: str

    @property
    def says(self) -> str:
        """One line."""
        return f"create {self.name} {self.version} (recipe {self.digest[:16]})"


@dataclass(frozen=True)
class Kept:
    """Something that is there as it should be."""

    says: str


Step = Upload | Create | Kept


def plan(built: Sequence[Component], cloud: Cloud, bucket: str) -> list[Step]:
    """What `publish` has to do: reads only. Raises `CloudError`, also for a version whose content is another."""
    _check_bucket(cloud, bucket)
    creates = [_create(component, cloud, bucket) for component in built]  # a conflict ends it before any upload
    artifacts = {key: path for component in built for key, path in component.artifacts.items()}
    return [*(_upload(cloud, bucket, key, path) for key, path in artifacts.items()), *creates]


def publish(steps: Sequence[Step], cloud: Cloud, say: Say, wait_s: float, sleep: Sleep = time.sleep) -> None:
    """Do the steps, telling each, and wait until every component can be deployed; raises `CloudError`."""
    for step in steps:
        if isinstance(step, Upload):
            _send(step, cloud)
        elif isinstance(step, Create):
            _make(step, cloud, wait_s, sleep)
        say(step.says)


def state(cloud: Cloud, name: str, version: str) -> dict[str, Any] | None:
    """What the cloud says of a component version; None if there is none. Raises `CloudError`."""
    try:
        with asked(f"looking for {name} {version}"):
            found: dict[str, Any] = cloud.greengrass.describe_component(arn=cloud.component_arn(name, version))
    except MissingError:
        return None
    return found


def failure(name: str, version: str, status: dict[str, Any]) -> CloudError:
    """One sentence on a component version that cannot be deployed."""
    reasons = "; ".join([status.get("message", ""), *status.get("errors", {}).values()]).strip("; ")
    said = f"{name} {version} is {status.get('componentState')} in the cloud: {reasons or 'no reason is given'}"
    return CloudError(f"{said}; delete that version or raise --version, and nothing is deployed until then")


def _check_bucket(cloud: Cloud, bucket: str) -> None:
    with asked(f"looking for the bucket '{bucket}'"):
        region = cloud.s3.head_bucket(Bucket=bucket).get("BucketRegion", cloud.region)
    if region != cloud.region:
        raise CloudError(f"the bucket '{bucket}' is in {region}, the components in {cloud.region}; they must be in one")


def _upload(cloud: Cloud, bucket: str, key: str, path: Path) -> Step:
    digest = sha256(path)
    try:
        with asked(f"looking for s3://{bucket}/{key}"):
            there = cloud.s3.head_object(Bucket=bucket, Key=key)
    except MissingError:
        return Upload(bucket, key, path)
    if there.get("Metadata", {}).get(DIGEST_FIELD) != digest or there["ContentLength"] != path.stat().st_size:
        raise CloudError(f"s3://{bucket}/{key} is not what we sent there; take another bucket, or remove it")
    return Kept(f"keep s3://{bucket}/{key}")


def _create(component: Component, cloud: Cloud, bucket: str) -> Step:
    recipe = component.recipe.replace(f"s3://{BUCKET}/", f"s3://{bucket}/")
    refuse(component.name, recipe)  # the bucket's name makes it longer
    digest = hashlib.sha256(recipe.encode("utf-8")).hexdigest()
    arn = cloud.component_arn(component.name, component.version)
    wanted = Create(arn, component.name, component.version, recipe, digest)
    there = state(cloud, component.name, component.version)
    if there is None:
        return wanted
    _same(wanted, there)
    found = there["status"]["componentState"]
    if found in IN_THE_MAKING:  # by a run that was cut off: asking again with the same token is the same request
        return wanted
    if found != DEPLOYABLE:
        raise failure(component.name, component.version, there["status"])
    return Kept(f"keep {component.name} {component.version}")


def _same(wanted: Create, there: dict[str, Any]) -> None:
    if there.get("tags", {}).get(DIGEST_TAG) != wanted.digest:
        raise ConflictError(
            f"{wanted.name} {wanted.version} is published with other content; render with a higher --version"
        )


def _send(step: Upload, cloud: Cloud) -> None:
    extra = {"Metadata": {DIGEST_FIELD: sha256(step.path)}, "ChecksumAlgorithm": "SHA256"}
    with asked(f"uploading s3://{step.bucket}/{step.key}"):
        cloud.s3.upload_file(str(step.path), step.bucket, step.key, ExtraArgs=extra)


def _make(step: Create, cloud: Cloud, wait_s: float, sleep: Sleep) -> None:
    """Create the version; the token makes a repeated call the same call. Somebody else's equal one is as good."""
    try:
        with asked(f"creating {step.name} {step.version}"):
            cloud.greengrass.create_component_version(
                inlineRecipe=step.recipe.encode("utf-8"), clientToken=step.digest, tags={DIGEST_TAG: step.digest}
            )
    except ConflictError:
        _same(step, state(cloud, step.name, step.version) or {})
    waited_s = 0.0
    while True:
        there = state(cloud, step.name, step.version) or {"status": {"componentState": "REQUESTED"}}
        found = there["status"]["componentState"]
        if found == DEPLOYABLE:
            return
        if found not in IN_THE_MAKING:
            raise failure(step.name, step.version, there["status"])
        if waited_s >= wait_s:
            raise CloudError(f"{step.name} {step.version} is still {found} after {wait_s:.0f} s; repeat the command")
        sleep(POLL_S)
        waited_s += POLL_S
