"""Images of the functions: the build context as faas-cli makes it, built by docker or podman."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from deploy.errors import ImageError
from deploy.stack import Function, Stack

ENGINES = ("docker", "podman")
_NOT_COPIED = frozenset({"build", "template"})  # of a handler's folder; faas-cli takes them for its own


def write_context(root: Path, stack: Stack, function: Function, out: Path) -> None:
    """Put the handler's folder into `out`, and what `configuration.copy` names beside it.

    As faas-cli's `CreateBuildContext` does for `lang: dockerfile`. Raises `ImageError`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((root / function.handler).iterdir()):
        if path.name not in _NOT_COPIED:
            _copy(path, out / path.name)
    for name in stack.copies:
        if not (root / name).exists():
            hint = "make them with: make sealed" if "sealed" in name else "stack.yml names it under configuration.copy"
            raise ImageError(f"{name} is not there; {hint}")
        _copy(root / name, out / name)


def build(
    root: Path, stack: Stack, engine: str, platform: str, report: Callable[[str, str], None] = lambda _name, _line: None
) -> None:
    """Build every function's image under the name that stack.yml gives it; raises `ImageError`.

    `platform` is one of docker's, such as `linux/arm64`; empty: this machine's.
    """
    for function in stack.functions.values():
        with tempfile.TemporaryDirectory(prefix="edgecascade-") as folder:
            write_context(root, stack, function, Path(folder))
            _run(command(function, engine, platform), Path(folder), partial(report, function.name))


def command(function: Function, engine: str, platform: str = "") -> list[str]:
    """The words that build a function's image in its context."""
    arguments = [word for pair in function.build_args.items() for word in ("--build-arg", "=".join(pair))]
    wanted = ["--platform", platform] if platform else []
    return [engine, "build", *arguments, *wanted, "--tag", function.image, "."]


def engine_here(named: str, found: Callable[[str], str | None] = shutil.which) -> str:
    """The engine that is named, or the first that is installed; raises `ImageError`."""
    for engine in (named,) if named else ENGINES:
        if engine not in ENGINES:
            raise ImageError(f"'{engine}' cannot build images; use {' or '.join(ENGINES)}")
        if found(engine):
            return engine
    raise ImageError(f"{named or ' or '.join(ENGINES)} is not installed, and images need one; or: faas-cli build")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _run(words: list[str], directory: Path, report: Callable[[str], None]) -> None:
    with subprocess.Popen(  # noqa: S603 - the words come from stack.yml
        words, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            report(line.rstrip("\n"))
    if process.returncode:
        raise ImageError(f"'{' '.join(words)}' ended with status {process.returncode}; see its log above")
