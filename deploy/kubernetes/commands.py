"""`edgecascade kubernetes …`: manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.rooms import Rooms

app = typer.Typer(help="Manifests for Kubernetes, from stack.yml.", no_args_is_help=True)


@app.command("render")
def render(
    context: typer.Context,
    overlay: Annotated[str, typer.Option(help="A folder of deploy/kubernetes/overlays.")] = "k3s",
    out: Annotated[Path | None, typer.Option(help="Write there instead: OVERLAY.yaml, or the tree.")] = None,
    site: Annotated[str, typer.Option(help="The functions of this site only: device or edge.")] = "",
    kustomize: Annotated[
        bool, typer.Option("--kustomize", help="Write the files of the kustomize tree that follow from stack.yml.")
    ] = False,
) -> None:
    """Print an overlay's manifests, of stack.yml and the variables it takes.

    Examples: REGISTRY=registry.example TAG=1 edgecascade kubernetes render --overlay plain | kubectl apply -f -
              edgecascade kubernetes render --kustomize
    """
    from deploy.kubernetes.render import TREE, derived, of_site, whole, write
    from deploy.kubernetes.render import render as render_overlay
    from deploy.kubernetes.tree import dump

    rooms: Rooms = context.obj[Rooms]
    stack = of_site(rooms.checkout.stack(), site)
    if kustomize:
        texts = whole(stack) if out else derived(stack)
    else:
        texts = {f"{overlay}.yaml": dump(render_overlay(stack, overlay))}
        if out is None:
            typer.echo("".join(texts.values()), nl=False)
            return
    for path in write(texts, out or TREE):
        typer.echo(path)
