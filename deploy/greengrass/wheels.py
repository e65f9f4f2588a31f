"""What a function needs on a core device, as wheels with their hashes: gathered by pip, installed without a network."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from deploy.errors import RecipeError

LOCK = "requirements.lock"
# The extra of pyproject.toml that each function's image installs too; and what publishes its status.
EXTRAS = {"dispatcher": "dispatcher", "device": "tier", "edge": "tier", "federation": "federation"}
IPC_EXTRA = "greengrass-ipc"
_MACHINES = {"amd64": "x86_64", "aarch64": "aarch64"}
# The oldest glibc that is served, for which llguidance has wheels (2.31: Debian 11, Ubuntu 20.04), down to what the
# oldest wheels are for.
_GLIBC_MINORS = range(31, 4, -1)
# One moment for all, so that the same source gives the same wheel: 1980-01-01, where zip's calendar begins.
_EPOCH = "315532800"
_CHUNK_BYTES = 1 << 20


class Gather(Protocol):
    """Puts the wheels that a function needs on an architecture into a folder."""

    def __call__(self, function: str, architecture: str, folder: Path) -> None:
        """Raises `RecipeError` if one cannot be had."""


@dataclass(frozen=True)
class PipGather:
    """pip downloads what constraints.txt names; `own` is this project's wheel, `python` the devices' version (3.11).

    With `found_in` it takes wheels from that folder and asks nobody.
    """

    own: Path
    constraints: Path
    python: str
    found_in: Path | None = None

    def __call__(self, function: str, architecture: str, folder: Path) -> None:
        """Gather them; raises `RecipeError` with pip's own last word."""
        machine = _MACHINES[architecture]
        platforms = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC_MINORS] + [f"manylinux2014_{machine}"]
        wanted = f"edgecascade[{EXTRAS[function]},{IPC_EXTRA}] @ {self.own.absolute().as_uri()}"
        source = ["--no-index", "--find-links", str(self.found_in)] if self.found_in else []
        words = [
            *("download", "--dest", str(folder), "--only-binary", ":all:", "--constraint", str(self.constraints)),
            *("--implementation", "cp", "--python-version", self.python, *source),
            *(word for platform in platforms for word in ("--platform", platform)),
            wanted,
        ]
        _pip(words, f"the wheels of '{function}' for {architecture} and Python {self.python} cannot be gathered")


def build_own(root: Path, copies: Sequence[str], folder: Path) -> Path:
    """Build this project's wheel from what the images are built from; the same source gives the same bytes.

    Raises `RecipeError`.
    """
    with TemporaryDirectory(prefix="edgecascade-") as name:
        source = Path(name)
        for copy in copies:  # a copy of the source: an old build/ beside it would find its way into the wheel
            path = root / copy
            if path.is_dir() and (path / "__init__.py").is_file():
                shutil.copytree(path, source / copy, ignore=shutil.ignore_patterns("__pycache__", "tiers"))
            elif path.is_file():
                shutil.copy2(path, source / copy)
        _pip(["wheel", "--no-deps", "--wheel-dir", str(folder), str(source)], "our own wheel cannot be built")
    return next(iter(sorted(folder.glob("edgecascade-*.whl"))))


def lock(folder: Path) -> str:
    """Each wheel of a folder pinned to its version and hash, for `pip install --require-hashes`."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise RecipeError(f"{folder} holds no wheels")
    return "".join(f"{_requirement(wheel.name)} --hash=sha256:{sha256(wheel)}\n" for wheel in wheels)


def sha256(path: Path) -> str:
    """The digest of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _requirement(wheel: str) -> str:
    """`Flask_Cors-1.0-py3-none-any.whl` → `flask-cors==1.0` (binary distribution format, PEP 427; names, PEP 503)."""
    name, version = wheel.split("-")[:2]
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


def _pip(words: Sequence[str], failed: str) -> None:
    done = subprocess.run(  # noqa: S603 - the words are ours
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words],
        env={**os.environ, "SOURCE_DATE_EPOCH": _EPOCH},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise RecipeError(f"{failed}: pip says '{said[-1].removeprefix('ERROR: ') if said else 'nothing'}'")
