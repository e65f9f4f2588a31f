"""`edgecascade images` and `edgecascade compose`."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.rooms import Rooms


def images(
    context: typer.Context,
    engine: Annotated[str, typer.Option(help="docker or podman; by default the one that is installed.")] = "",
    platform: Annotated[str, typer.Option(help="Such as linux/arm64; by default this machine's.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="Build this function only; may be given again.")] = None,
) -> None:
    """Build the functions' images as faas-cli would, under the names that stack.yml gives them.

    Example: REGISTRY=registry.example TAG=1 edgecascade images --engine podman --only device
    """
    from deploy.images import build, engine_here

    rooms: Rooms = context.obj[Rooms]
    here = rooms.checkout
    stack = here.stack(tuple(only or ()))
    build(here.root, stack, engine_here(engine), platform, lambda name, line: typer.echo(f"{name} | {line}"))


def compose(context: typer.Context) -> None:
    """Print stack.yml as a file for docker compose.

    Example: edgecascade compose > deploy/compose/compose.yaml
    """
    from deploy.compose.render import render

    rooms: Rooms = context.obj[Rooms]
    typer.echo(render((rooms.checkout.root / "stack.yml").read_text("utf-8")), nl=False)
