"""A tier on disk: open it, read its tensors with their digests checked, write it whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models.artifact.manifest import FileEntry, Manifest, parse_manifest
from models.artifact.names import EMBEDDINGS, HEAD, LABELS, MANIFEST, TOKENIZER, file_of
from models.artifact.tensors import Array, read_tensors, tensor_pieces
from models.errors import ArtifactError


@dataclass(frozen=True)
class Artifact:
    """An open artifact; each file's digest is checked when it is read."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read the manifest; raises `ArtifactError` if it is absent or not valid."""
        try:
            text = (path / MANIFEST).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"{path} is not an artifact ({MANIFEST} cannot be read); make one with 'edgecascade build'"
            ) from error
        try:
            return cls(path, parse_manifest(text))
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error

    def has(self, name: str) -> bool:
        """Whether the artifact lists the file."""
        return name in self.manifest.files

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises `ArtifactError` if it is absent or not what the manifest says."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise ArtifactError(f"{self.path} has no file '{name}'")
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise ArtifactError(f"{self.path / name} cannot be read; build the artifact again") from error
        if len(data) != entry.size_bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ArtifactError(
                f"{self.path / name} was altered: its digest is not the manifest's; build the artifact again"
            )
        return data

    def tensors(self, name: str) -> dict[str, Array]:
        """Return all tensors of one file as read-only views on its bytes."""
        return read_tensors(self.read(name), str(self.path / name))

    def tokenizer_json(self) -> str:
        """Return the text of the tokenizer."""
        return self.read(TOKENIZER).decode("utf-8")

    def embeddings(self) -> dict[str, Array]:
        """Operands of the embedding table (`w`, or `q` and `scale`); the head's where the two are tied."""
        name, prefix = (EMBEDDINGS, "embeddings.") if self.has(EMBEDDINGS) else (HEAD, "head.")
        return {key.removeprefix(prefix): v for key, v in self.tensors(name).items() if key.startswith(prefix)}

    def labels(self) -> dict[str, Array]:
        """Label head and added inputs in fp32, or nothing for a tier without skills."""
        return {k: v.astype(np.float32) for k, v in self.tensors(LABELS).items()} if self.has(LABELS) else {}

    def recalibrated(self, calibration: Mapping[str, Any]) -> Artifact:
        """Write another calibration into the manifest, in one step, and return the artifact as it is then."""
        changed = replace(self.manifest, calibration=calibration)
        part = self.path / f"{MANIFEST}.part"
        part.write_text(changed.as_json(), "utf-8")
        part.replace(self.path / MANIFEST)
        return Artifact(self.path, changed)


class ArtifactWriter:
    """Collects the files of an artifact in a folder that is not in its place yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, FileEntry] = {}

    def add_bytes(self, name: str, data: bytes) -> None:
        """Write one file."""
        (self._folder / name).write_bytes(data)
        self._files[name] = FileEntry(hashlib.sha256(data).hexdigest(), len(data))

    def add_tensors(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Write one safetensors file, tensor by tensor."""
        digest, size_bytes = hashlib.sha256(), 0
        with (self._folder / name).open("wb") as file:
            for piece in tensor_pieces(tensors):
                digest.update(piece)
                size_bytes += file.write(piece)
        self._files[name] = FileEntry(digest.hexdigest(), size_bytes)

    def tensors(self, name: str) -> dict[str, Array]:
        """Read back one file that was added; nothing if there is none of that name."""
        return read_tensors((self._folder / name).read_bytes(), name) if name in self._files else {}

    def add_grouped(self, tensors: Mapping[str, Array]) -> None:
        """Write tensors, all of the files' contents at once, into the files that their names say."""
        groups: dict[str, dict[str, Array]] = {}
        for name, value in tensors.items():
            groups.setdefault(file_of(name), {})[name] = value
        for file, group in groups.items():
            self.add_tensors(file, group)

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, which lists all files added."""
        (self._folder / MANIFEST).write_text(manifest.with_files(self._files).as_json(), "utf-8")


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    fresh = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as held:
            yield Path(held)
    except BaseException:
        with suppress(OSError):  # somebody else may have put something there meanwhile
            for parent in fresh:
                parent.rmdir()
        raise


def write_artifact(path: Path, fill: Callable[[ArtifactWriter], Manifest]) -> Artifact:
    """Write an artifact to `path`: `fill` adds the files and returns the manifest.

    Everything lands in a folder beside `path` first, which then takes its place; whatever goes wrong before leaves
    `path` as it was. Refuses, with `ArtifactError`, to replace a folder that is no artifact.
    """
    if path.exists() and not (path / MANIFEST).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} is there and is not an artifact; name another place or remove it")
    try:
        return _write(path, fill)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise ArtifactError(
                f"there is no space left for {path}; nothing was written: free some and try again"
            ) from error
        raise


def _write(path: Path, fill: Callable[[ArtifactWriter], Manifest]) -> Artifact:
    with _folder_beside(path) as folder:
        fresh, old = folder / "new", folder / "old"
        fresh.mkdir()
        writer = ArtifactWriter(fresh)
        writer.finish(fill(writer))
        if path.exists():
            path.rename(old)
        try:
            fresh.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    return Artifact.open(path)
