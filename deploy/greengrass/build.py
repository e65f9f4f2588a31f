"""The folder that `render` writes and `publish` reads: recipes/NAME-VERSION.yaml and artifacts/NAME/VERSION/….

The layout is that of `gdk component build` and of the local deployment commands of both nuclei (`greengrass-cli
deployment create`, `ggl-cli deploy`), which therefore take it as it is.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from deploy.errors import RecipeError
from deploy.greengrass import recipe as recipes
from deploy.greengrass.lint import lint
from deploy.greengrass.recipe import ARCHITECTURES, MOST_MODEL_FILES, File, Naming, Parts
from deploy.greengrass.wheels import LOCK, Gather, lock, sha256
from deploy.stack import Stack

RECIPES, ARTIFACTS = "recipes", "artifacts"
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Component:
    """One component of a rendered folder: its recipe's text, and its artifacts (address in the bucket → file)."""

    name: str
    version: str
    recipe: str
    artifacts: Mapping[str, Path]
    defaults: Mapping[str, Any]


def render(
    stack: Stack, models: Mapping[str, Path], gather: Gather, naming: Naming, out: Path,
    architectures: Sequence[str] = ARCHITECTURES,
) -> list[Component]:  # fmt: skip
    """Write recipe and artifacts of each function; `models` has the tier's folder of those that hold one.

    All or nothing: `out` is replaced at the end, and only if a rendering of ours lies there or nothing.
    Raises `RecipeError`.
    """
    with _replacing(out) as folder:
        for function in stack.functions.values():
            home = folder / ARTIFACTS / naming.component(function.name) / naming.version
            home.mkdir(parents=True)
            apps = {a: _app(function.name, a, gather, home) for a in architectures}
            parts = Parts(apps, *_model(function.name, models, home))
            made = recipes.text(recipes.make(function, parts, naming, tuple(stack.functions)))
            refuse(naming.component(function.name), made)
            path = folder / RECIPES / f"{naming.component(function.name)}-{naming.version}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(made, "utf-8")
    return read(out)


def read(folder: Path) -> list[Component]:
    """Read a rendered folder, a tier before those that depend on it; raises `RecipeError`."""
    paths = sorted((folder / RECIPES).glob("*.yaml"))
    if not paths:
        raise RecipeError(f"{folder} holds no recipes; make them: edgecascade greengrass render --out {folder}")
    found = [_component(folder, path) for path in paths]
    return sorted(found, key=lambda component: ("ComponentDependencies" in component.recipe, component.name))


def lint_folder(folder: Path) -> dict[Path, list[str]]:
    """What is wrong with each recipe of a rendered folder, or with one recipe's file; raises `RecipeError`."""
    paths = [folder] if folder.is_file() else sorted((folder / RECIPES).glob("*.yaml"))
    if not paths:
        raise RecipeError(f"{folder} is no recipe and holds none under {RECIPES}/")
    try:
        return {path: lint(path.read_text("utf-8")) for path in paths}
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"a recipe of {folder} cannot be read: {error}") from error


def refuse(name: str, text: str) -> None:
    """Raise `RecipeError` for a recipe that a nucleus would reject."""
    problems = lint(text)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RecipeError(f"the recipe of {name} would be rejected: {problems[0]}{more}")


def _component(folder: Path, path: Path) -> Component:
    text = path.read_text("utf-8")
    refuse(path.stem, text)
    recipe = yaml.safe_load(text)
    name, version = recipe["ComponentName"], recipe["ComponentVersion"]
    artifacts = {}
    for manifest in recipe["Manifests"]:
        for artifact in manifest.get("Artifacts", []):
            key = artifact["Uri"].removeprefix("s3://").partition("/")[2]
            file = folder / ARTIFACTS / name / version / key.rpartition("/")[2]
            if not file.is_file() or not sha256(file).startswith(key.partition("/")[0]):
                raise RecipeError(f"{file} is not what its recipe was made for; render again")
            artifacts[key] = file
    return Component(name, version, text, artifacts, recipe["ComponentConfiguration"]["DefaultConfiguration"])


def _app(function: str, architecture: str, gather: Gather, home: Path) -> File:
    """A zip of wheels and their lock; stored, because wheels are compressed already."""
    path = home / f"app-{architecture}.zip"
    with TemporaryDirectory(dir=home) as name:
        content = Path(name)
        wheels = content / "wheels"
        wheels.mkdir()
        gather(function, architecture, wheels)
        (content / LOCK).write_text(lock(wheels), "utf-8")
        _zip(content, path)
    return File(path.name, sha256(path))


def _model(function: str, models: Mapping[str, Path], home: Path) -> tuple[list[File], File | None]:
    """The tier's files as they are or, where they are too many for a recipe, in one stored zip."""
    if function not in models:
        return [], None
    folder = models[function]
    names = _files_of(folder)
    if len(names) > MOST_MODEL_FILES:
        path = home / "model.zip"
        _zip(folder, path, names)
        return [], File(path.name, sha256(path))
    for name in names:
        shutil.copyfile(folder / name, home / name)
    return [File(name, sha256(home / name)) for name in names], None


def _files_of(folder: Path) -> list[str]:
    """The manifest of a tier and the files that it lists."""
    try:
        listed = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{folder} holds no tier; make one with 'edgecascade build', or name it: --model") from error
    names = ["manifest.json", *sorted(listed)]
    names += [name for name in ("manifest.sig",) if (folder / name).is_file()]
    missing = [name for name in names if "/" in name or not (folder / name).is_file()]
    if missing:
        raise RecipeError(f"the tier in {folder} lacks {missing[0]}; build it again")
    return names


def _zip(folder: Path, path: Path, names: Sequence[str] | None = None) -> None:
    """Files of a folder in a fixed order and with a fixed time: the same files give the same zip."""
    names = names or sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o100644 << 16
            entry.file_size = (folder / name).stat().st_size  # zip64 only where it must be
            with (folder / name).open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` if all goes well."""
    if out.exists() and not (out / RECIPES).is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} holds something else; name an empty folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        made = Path(name) / "made"
        made.mkdir()
        yield made
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
