"""A rendering without pip: the stack's functions with wheels of a few bytes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from deploy.greengrass.build import Component, render
from deploy.greengrass.recipe import Naming
from deploy.stack import Stack, load

ROOT = Path(__file__).parents[1]
PREFIX = "com.example.edgecascade"
DEVICE, DISPATCHER = f"{PREFIX}.Device", f"{PREFIX}.Dispatcher"


def stack(*names: str) -> Stack:
    """The functions of stack.yml, these alone."""
    return load(ROOT / "stack.yml", {}).only(names)


class Wheels:
    """Stands in for pip; `content` is what each wheel holds."""

    def __init__(self, content: str = "1", size_bytes: int = 0) -> None:
        self.content, self.size_bytes = content, size_bytes

    def __call__(self, function: str, architecture: str, folder: Path) -> None:
        """Write one wheel."""
        with zipfile.ZipFile(folder / "edgecascade-0.1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo("x"), f"{function} {architecture} {self.content}")
            wheel.writestr(zipfile.ZipInfo("y"), bytes(self.size_bytes))


def tier(folder: Path, files: int = 3) -> Path:
    """A folder that looks like a tier."""
    folder.mkdir(parents=True)
    names = [f"layer-{number:03}.safetensors" for number in range(files)]
    for name in names:
        (folder / name).write_text(name)
    (folder / "manifest.json").write_text(json.dumps({"files": {name: {} for name in names}}))
    return folder


def rendered(
    out: Path, version: str = "1.0.0", content: str = "1", only: Sequence[str] = ("dispatcher", "device"), **more: int
) -> list[Component]:
    """Render the device site into `out`."""
    model = out.parent / "tier"
    models = {"device": model if model.exists() else tier(model)}
    return render(stack(*only), models, Wheels(content, **more), Naming(PREFIX, version, "tests", "3.11"), out)
