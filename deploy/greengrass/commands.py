"""`edgecascade greengrass …`: render, check, publish, deploy and look."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.errors import RecipeError

if TYPE_CHECKING:
    from deploy.greengrass.target import Result
    from deploy.stack import Stack

ROOT = Path(__file__).parents[2]
OUT = Path("greengrass-build")
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
PREFIX = "com.example.edgecascade"

Folder = Annotated[Path, typer.Argument(help="What `render` wrote.")]
Region = Annotated[str, typer.Option(help="The AWS region; by default boto3's own.")]
Profile = Annotated[str, typer.Option(help="The profile of ~/.aws; by default boto3's own.")]
Target = Annotated[str, typer.Option(help="A thing group, arn:aws:iot:REGION:ACCOUNT:thinggroup/NAME, or a thing.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read, say what would be done, and do nothing.")]

app = typer.Typer(help="Run the stack on AWS IoT Greengrass v2 core devices.", no_args_is_help=True)


@app.command()
def render(
    out: Annotated[Path, typer.Option(help="The folder to write; a rendering there is replaced.")] = OUT,
    site: Annotated[str, typer.Option(help="The functions of this site: device, or edge.")] = "device",
    only: Annotated[
        list[str] | None, typer.Option(help="This function, whatever its site; may be given again.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="FUNCTION=FOLDER: a tier, sealed for instance, instead of the one we ship.")
    ] = None,
    arch: Annotated[list[str] | None, typer.Option(help="amd64, aarch64; both by default.")] = None,
    python: Annotated[str, typer.Option(help="The core devices' Python.")] = PYTHON,
    wheels: Annotated[Path | None, typer.Option(help="Take wheels from this folder, and ask no index.")] = None,
    version: Annotated[str, typer.Option(help="Of all components; by default this project's.")] = "",
    prefix: Annotated[str, typer.Option(help="Of the components' names.")] = PREFIX,
    publisher: Annotated[str, typer.Option(help="Who publishes them.")] = "edgecascade",
) -> None:
    """Write recipes and artifacts of stack.yml's functions: recipes/NAME-VERSION.yaml, artifacts/NAME/VERSION/….

    Examples: edgecascade greengrass render --out greengrass-build
              edgecascade greengrass render --out build/gg --model device=var/sealed --arch aarch64 --version 1.2.0
    """
    from deploy.greengrass.build import render as write
    from deploy.greengrass.recipe import ARCHITECTURES, Naming
    from deploy.greengrass.wheels import PipGather, build_own
    from deploy.stack import load

    unknown = set(arch or ()) - set(ARCHITECTURES)
    if unknown:
        raise RecipeError(f"--arch {unknown.pop()}: known are {', '.join(ARCHITECTURES)}")
    stack = load(ROOT / "stack.yml", os.environ)
    stack = stack.only(tuple(only)) if only else _site(stack, site)
    naming = Naming(prefix, version or installed_version("edgecascade"), publisher, python)
    with TemporaryDirectory(prefix="edgecascade-") as name:
        own = build_own(ROOT, stack.copies, Path(name))
        gather = PipGather(own, ROOT / "constraints.txt", python, wheels)
        built = write(stack, _models(stack, model or []), gather, naming, out, tuple(arch or ARCHITECTURES))
    for component in built:
        size = sum(path.stat().st_size for path in component.artifacts.values())
        typer.echo(f"{component.name} {component.version}: {len(component.artifacts)} artifacts, {size} bytes")


@app.command()
def lint(
    path: Annotated[Path, typer.Argument(help="What `render` wrote, or one recipe.")] = OUT,
) -> None:
    """Say what a nucleus, classic or lite, would reject; status 1 if there is anything.

    Example: edgecascade greengrass lint greengrass-build
    """
    from deploy.greengrass.build import lint_folder

    problems = lint_folder(path)
    for file, found in problems.items():
        _lines(f"{file.name}: {problem}" for problem in found or ["both nuclei take it"])
    if any(problems.values()):
        raise SystemExit(1)


@app.command()
def publish(
    folder: Folder = OUT,
    bucket: Annotated[str, typer.Option(help="The S3 bucket, in the components' region.")] = "",
    wait: Annotated[int, typer.Option(min=0, help="Seconds to wait until a component can be deployed.")] = 120,
    dry_run: DryRun = False,
    region: Region = "",
    profile: Profile = "",
) -> None:
    """Send artifacts to S3 and make the component versions; what is there already stays.

    Example: edgecascade greengrass publish greengrass-build --bucket my-components --dry-run
    """
    from deploy.greengrass.build import read
    from deploy.greengrass.cloud import connect
    from deploy.greengrass.publish import plan
    from deploy.greengrass.publish import publish as do

    if not bucket:
        raise RecipeError("name the bucket: --bucket my-components")
    built = read(folder)
    cloud = connect(region, profile)
    steps = plan(built, cloud, bucket)
    if dry_run:
        _lines(step.says for step in steps)
        return
    do(steps, cloud, typer.echo, wait)


@app.command()
def deploy(
    target: Target,
    folder: Folder = OUT,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="COMPONENT.KEY=VALUE for all devices of the target.")
    ] = None,
    reset: Annotated[list[str] | None, typer.Option(help="COMPONENT.KEY back to the recipe's default.")] = None,
    previous: Annotated[
        bool, typer.Option("--previous", help="Back to what these components were in the revision before.")
    ] = False,
    on_failure: Annotated[
        str, typer.Option(help="ROLLBACK or DO_NOTHING: what a device does that fails.")
    ] = "ROLLBACK",
    wait: Annotated[int, typer.Option(min=0, help="Seconds to wait for the devices.")] = 600,
    dry_run: DryRun = False,
    region: Region = "",
    profile: Profile = "",
) -> None:
    """Deploy what was published, beside what the target runs already; say how each core device took it.

    Examples: edgecascade greengrass deploy --target arn:aws:iot:eu-west-1:123456789012:thinggroup/kiosks --dry-run
              edgecascade greengrass deploy --target arn:aws:iot:eu-west-1:123456789012:thinggroup/kiosks \
                --set dispatcher.EDGE_URL=https://store.example/function/edge
    """
    from deploy.greengrass import merge, rollout
    from deploy.greengrass import target as targets
    from deploy.greengrass.build import read
    from deploy.greengrass.cloud import connect

    if on_failure not in merge.ON_FAILURE:
        raise RecipeError(f"--on-failure {on_failure}: known are {', '.join(merge.ON_FAILURE)}")
    built = read(folder)
    changes = merge.changes(settings or [], reset or [], {one.name: one.defaults for one in built})
    if previous and changes:
        raise RecipeError("--previous takes configurations as they were; leave --set and --reset out")
    cloud = connect(region, profile)
    targets.check(target, cloud)
    planned = (
        rollout.back(built, target, cloud, on_failure)
        if previous
        else rollout.plan(built, changes, target, cloud, on_failure)
    )
    _lines(planned.says)
    if dry_run:
        return
    deployment_id = rollout.start(planned, cloud)
    _report(target, deployment_id, targets.watch(target, deployment_id, cloud, wait), as_json=False)


@app.command()
def status(
    target: Target,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a pipe.")] = False,
    region: Region = "",
    profile: Profile = "",
) -> None:
    """Say what the target should run, and how each core device took it; status 1 if one failed.

    Example: edgecascade greengrass status --target arn:aws:iot:eu-west-1:123456789012:thinggroup/kiosks
    """
    from deploy.greengrass import target as targets
    from deploy.greengrass.cloud import connect

    cloud = connect(region, profile)
    targets.check(target, cloud)
    had = targets.latest(target, cloud)
    if had is None:
        raise RecipeError(f"nothing was ever deployed to {target}")
    if not as_json:
        for name, spec in sorted(had.get("components", {}).items()):
            typer.echo(f"{name} {spec['componentVersion']}")
    _report(target, had["deploymentId"], targets.results(target, had["deploymentId"], cloud), as_json=as_json)


def _report(target: str, deployment_id: str, found: list[Result], *, as_json: bool) -> None:
    """Each device and the verdict; status 1 if a device failed."""
    from deploy.greengrass.target import ENDED_BADLY, verdict

    if as_json:
        devices: list[dict[str, Any]] = [
            {"device": r.device, "status": r.status, "reason": r.reason, "errors": r.errors} for r in found
        ]
        typer.echo(json.dumps({"target": target, "deployment": deployment_id, "devices": devices}))
    else:
        _lines([*(result.line for result in found), f"deployment {deployment_id}: {verdict(found)}"])
    if any(result.status in ENDED_BADLY for result in found):
        raise SystemExit(1)


def _lines(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


def _site(stack: Stack, site: str) -> Stack:
    names = tuple(name for name, function in stack.functions.items() if function.labels.get("site") == site)
    if not names:
        raise RecipeError(f"--site {site}: no function of stack.yml has that label")
    return stack.only(names)


def _models(stack: Stack, named: list[str]) -> dict[str, Path]:
    """Where the tier of each function lies that holds one."""
    from deploy.local.bundle import site

    folders = site(ROOT, os.environ).folders
    found = {
        name: folders[path]
        for name, function in stack.functions.items()
        if (path := function.environment.get("MODEL_PATH", "")) in folders
    }
    for word in named:
        name, equals, folder = word.partition("=")
        if not equals or name not in found:
            raise RecipeError(
                f"--model {word} must look like FUNCTION=FOLDER; tiers are in {', '.join(found) or 'none'}"
            )
        found[name] = Path(folder)
    return found
