"""A tier on disk: open it, read its tensors with their digests checked, write it whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.artifact.files import fill, opened, read_small
from models.artifact.manifest import ExitHeads, FileEntry, Manifest, parse_manifest
from models.artifact.names import EMBEDDINGS, EXITS, HEAD, LABELS, MANIFEST, SIGNATURE, TOKENIZER, file_of, in_range
from models.artifact.tensors import Array, read_tensors, tensor_pieces
from models.errors import ArtifactError, SealError

if TYPE_CHECKING:
    from models.artifact.keys import KeyWrapper

_MANIFEST_BYTES, _SIGNATURE_BYTES = 16 << 20, 64
_WEIGHTS_BYTES, _OTHER_BYTES = 16 << 30, 256 << 20
"""The largest files that are read."""
_PIECE_BYTES = 256 * 1024
_READERS = 4


@dataclass(frozen=True)
class Artifact:
    """An open artifact; each file's digest is checked when it is read, and its seal where there is one.

    `layers` are those whose files may be read.
    """

    path: Path
    manifest: Manifest
    layers: range
    _data_key: bytes | None = field(default=None, repr=False, compare=False)
    _kept: dict[str, memoryview] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(
        cls,
        path: Path,
        layers: range | None = None,
        keys: KeyWrapper | None = None,
        signer: bytes | None = None,
    ) -> Artifact:
        """Read the manifest; no other file is read before it is asked for.

        With a `signer`, an Ed25519 public key, the manifest's signature is verified before anything is parsed. With
        `keys` the artifact must be sealed; without, a sealed one opens, but none of its files can be read. `layers`
        narrows it to the files that running these needs. Raises `ArtifactError` if it is absent or not valid,
        `SealError` if a seal or signature does not hold, `KeyUnavailableError` if the keys are out of reach.
        """
        text = _manifest_bytes(path)
        try:
            if signer is not None:
                _check_signature(path, text, signer)
            manifest = parse_manifest(text.decode("utf-8"))
            data_key = _data_key(manifest, keys) if keys else None
            return cls(path, manifest, _range(manifest, layers), data_key)
        except ArtifactError as error:
            raise type(error)(f"{path}: {error}") from error
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{path} is not an artifact: its {MANIFEST} is not text") from error

    def keeping(self) -> Artifact:
        """Return the same artifact, which reads each file once and keeps its bytes for as long as it lives itself."""
        return replace(self, _kept={})

    @property
    def files(self) -> Sequence[str]:
        """Names of the files that may be read."""
        return [name for name in self.manifest.files if self._in_range(name)]

    def has(self, name: str) -> bool:
        """Whether the artifact lists the file."""
        return name in self.manifest.files

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises `ArtifactError` if it is absent or not what the manifest says."""
        return bytes(self._load(name))

    def tensors(self, *names: str) -> dict[str, Array]:
        """Return all tensors of some files, which are read in parallel, as read-only views on their bytes."""
        with ThreadPoolExecutor(_READERS) as pool:
            loaded = list(pool.map(self._load, names)) if len(names) > 1 else [self._load(name) for name in names]
        found: dict[str, Array] = {}
        for name, data in zip(names, loaded, strict=True):
            found |= read_tensors(data, str(self.path / name))
        return found

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

    def exit_heads(self) -> dict[str, Array]:
        """Weights of the exits' heads as they are stored, or nothing."""
        return self.tensors(EXITS) if self.manifest.exit_heads else {}

    def fault(self, name: str) -> str | None:
        """Read a file and say what is wrong with it, if anything; a seal only counts where the key was handed in."""
        try:
            self._read(name, unsealed=self._data_key is not None)
        except ArtifactError as error:
            return str(error)
        return None

    def recalibrated(self, calibration: Mapping[str, Any]) -> Artifact:
        """Write another calibration into the manifest, in one step, and return the artifact as it is then.

        Raises `ArtifactError` for a signed one, whose signature would not hold any more.
        """
        if (self.path / SIGNATURE).exists():
            raise ArtifactError(f"{self.path} is signed; calibrate the artifact it was sealed from, and seal that")
        return self._rewritten(replace(self.manifest, calibration=calibration))

    def with_exit_heads(self, heads: ExitHeads, tensors: Mapping[str, Array]) -> Artifact:
        """Write heads into the folder, in place of those there are, and return the artifact as it is then.

        Raises `ArtifactError` for a sealed or signed one.
        """
        if self.manifest.sealed or (self.path / SIGNATURE).exists():
            raise ArtifactError(f"{self.path} is sealed or signed; add exits to the artifact it was made from")
        part = self.path / f"{EXITS}.part"
        data = b"".join(tensor_pieces(tensors))
        part.write_bytes(data)
        part.replace(self.path / EXITS)
        files = {**self.manifest.files, EXITS: FileEntry(hashlib.sha256(data).hexdigest(), len(data))}
        return self._rewritten(replace(self.manifest, exit_heads=heads).with_files(files))

    def _rewritten(self, manifest: Manifest) -> Artifact:
        part = self.path / f"{MANIFEST}.part"
        part.write_text(manifest.as_json(), "utf-8")
        part.replace(self.path / MANIFEST)
        return replace(self, manifest=manifest)

    def _in_range(self, name: str) -> bool:
        return in_range(name, self.layers, self.manifest.architecture.n_layers, tied=not self.has(EMBEDDINGS))

    def _load(self, name: str) -> memoryview:
        """Return a file's bytes, unsealed."""
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        if self.manifest.sealed and self._data_key is None:
            raise SealError(f"{self.path} is sealed, and no key was handed in")
        data = self._read(name, unsealed=self.manifest.sealed is not None)
        if self._kept is not None:
            self._kept[name] = data
        return data

    def _read(self, name: str, *, unsealed: bool) -> memoryview:
        """Read a file once, piece by piece: each is hashed and, if it is sealed, decrypted while it is in the cache."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise ArtifactError(f"{self.path} has no file '{name}'")
        if not self._in_range(name):
            first, last = self.layers.start, self.layers.stop - 1
            raise ArtifactError(f"{self.path}: '{name}' is no part of layers {first} to {last}, which were opened")
        path, digest = self.path / name, hashlib.sha256()
        limit = _WEIGHTS_BYTES if name.endswith(".safetensors") else _OTHER_BYTES
        try:
            with opened(path, limit) as (file, size):
                if size != entry.size_bytes:
                    raise _altered(path, "its size is not the manifest's")

                def hashed(piece: memoryview) -> None:
                    fill(file, piece)
                    digest.update(piece)

                data = self._unsealed(hashed, name, size) if unsealed else _plain(hashed, size)
        except SealError as error:
            raise SealError(f"{path} cannot be unsealed: {error}") from error
        except EOFError as error:
            raise _altered(path, "it ended while it was read") from error
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror}); build the artifact again") from error
        if digest.hexdigest() != entry.sha256:
            raise _altered(path, "its digest is not the manifest's")
        return memoryview(data).toreadonly()

    def _unsealed(self, read: Callable[[memoryview], None], name: str, size: int) -> bytearray:
        from models.artifact.sealing import Binding, unseal  # cryptography is loaded for sealed artifacts only

        binding = Binding(self.manifest.model_id, self.manifest.model_version, name)
        return unseal(read, size, self._data_key or b"", binding)


def _plain(read: Callable[[memoryview], None], size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    for at in range(0, size, _PIECE_BYTES):
        read(view[at : at + _PIECE_BYTES])
    return data


def _altered(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path} was altered: {why}; build the artifact again")


def _manifest_bytes(path: Path) -> bytes:
    try:
        return read_small(path / MANIFEST, _MANIFEST_BYTES)
    except (OSError, EOFError) as error:
        raise ArtifactError(
            f"{path} is not an artifact ({MANIFEST} cannot be read); make one with 'edgecascade build'"
        ) from error


def _check_signature(path: Path, manifest: bytes, signer: bytes) -> None:
    from models.artifact.keys import check_signature

    try:
        signature = read_small(path / SIGNATURE, _SIGNATURE_BYTES)
    except FileNotFoundError as error:
        raise SealError(f"it is not signed ({SIGNATURE} is absent), and a signature is asked for") from error
    except (OSError, EOFError) as error:
        raise SealError(f"{SIGNATURE} cannot be read") from error
    check_signature(manifest, signature, signer)


def _data_key(manifest: Manifest, keys: KeyWrapper) -> bytes:
    sealed = manifest.sealed
    if sealed is None:
        raise SealError("it is not sealed, and a key was handed in to open a sealed one")
    if sealed.provider != keys.provider:
        raise SealError(f"its key is wrapped by '{sealed.provider}', and the key handed in is of '{keys.provider}'")
    try:
        return keys.unwrap(sealed.wrapped_key, manifest.key_context)
    except SealError as error:
        raise SealError(f"its data key, wrapped by key {sealed.key_id}, cannot be unwrapped: {error}") from error


def _range(manifest: Manifest, layers: range | None) -> range:
    n_layers = manifest.architecture.n_layers
    if layers is None:
        return range(n_layers)
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= n_layers:
        asked = f"{layers.start} to {layers.stop - 1}"
        raise ArtifactError(f"layers {asked} are not some of its layers 0 to {n_layers - 1}")
    return layers


class ArtifactWriter:
    """Collects the files of an artifact in a folder that is not in its place yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, FileEntry] = {}

    def add_bytes(self, name: str, data: bytes | bytearray) -> None:
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

    def finish(self, manifest: Manifest, sign: Callable[[bytes], bytes] | None) -> None:
        """Write the manifest, which lists all files added, and its signature."""
        text = manifest.with_files(self._files).as_json().encode()
        (self._folder / MANIFEST).write_bytes(text)
        if sign:
            (self._folder / SIGNATURE).write_bytes(sign(text))


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


def write_artifact(
    path: Path, add_files: Callable[[ArtifactWriter], Manifest], sign: Callable[[bytes], bytes] | None = None
) -> Artifact:
    """Write an artifact to `path`: `add_files` adds the files and returns the manifest; `sign` signs its bytes.

    Everything lands in a folder beside `path` first, which then takes its place; whatever goes wrong before leaves
    `path` as it was. Refuses, with `ArtifactError`, to replace a folder that is no artifact.
    """
    if path.exists() and not (path / MANIFEST).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} is there and is not an artifact; name another place or remove it")
    try:
        return _write(path, add_files, sign)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        why = "there is no space left; free some" if full else error.strerror
        raise ArtifactError(f"{path} cannot be written: {why}; what was there is as it was") from error


def _write(
    path: Path, add_files: Callable[[ArtifactWriter], Manifest], sign: Callable[[bytes], bytes] | None
) -> Artifact:
    with _folder_beside(path) as folder:
        fresh, old = folder / "new", folder / "old"
        fresh.mkdir()
        writer = ArtifactWriter(fresh)
        writer.finish(add_files(writer), sign)
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
