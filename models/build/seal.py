"""Seal an artifact: every file but the manifest under a fresh data key, the manifest signed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from models.artifact.keys import PUBLIC, SEALING, SIGNING, KeyWrapper, key_text, public_key_of, sign_manifest
from models.artifact.manifest import Manifest, Sealed
from models.artifact.sealing import KEY_BYTES, NONCE_BYTES, Binding, seal
from models.artifact.store import Artifact, ArtifactWriter, write_artifact
from models.build.progress import Report
from models.errors import KeyUnavailableError, SealError


def seal_artifact(source: Artifact, out: Path, keys: KeyWrapper, signing_key: bytes | None, report: Report) -> Artifact:
    """Write `source` sealed to `out`, whole or not at all, and return it opened.

    Raises `SealError` if it is sealed already, `ArtifactError` if it is altered, or `out` something else or not to be
    written.
    """
    manifest = source.manifest
    if manifest.sealed:
        raise SealError(f"{source.path} is sealed already; seal the artifact that it was made from")
    data_key = os.urandom(KEY_BYTES)
    wrapped = Sealed(keys.provider, keys.key_id, keys.wrap(data_key, manifest.key_context))

    def add_files(writer: ArtifactWriter) -> Manifest:
        for number, name in enumerate(manifest.files):
            report(number, len(manifest.files), name)
            binding = Binding(manifest.model_id, manifest.model_version, name)
            writer.add_bytes(name, seal(source.read(name), data_key, binding, os.urandom(NONCE_BYTES)))
        report(len(manifest.files), len(manifest.files), "")
        return replace(manifest, sealed=wrapped)

    write_artifact(out, add_files, _signer(signing_key))
    return Artifact.open(out, keys=keys)


def _signer(signing_key: bytes | None) -> Callable[[bytes], bytes] | None:
    return None if signing_key is None else lambda manifest: sign_manifest(manifest, signing_key)


KEY_FILES = ("seal.key", "sign.key", "sign.pub")
"""What seals and opens, what signs, and what checks signatures."""


def write_keys(folder: Path, names: tuple[str, str, str] = KEY_FILES) -> list[Path]:
    """Make a sealing key, a signing key and its public key in `folder`; the first two for the owner's eyes only.

    Raises `KeyUnavailableError` rather than replace a key, and if they cannot be written.
    """
    signing_key = os.urandom(KEY_BYTES)
    seals, signs, checks = names
    made = {
        seals: (key_text(SEALING, os.urandom(KEY_BYTES)), 0o600),
        signs: (key_text(SIGNING, signing_key), 0o600),
        checks: (key_text(PUBLIC, public_key_of(signing_key)), 0o644),
    }
    there = next((folder / name for name in made if (folder / name).exists()), None)
    if there:
        raise KeyUnavailableError(f"{there} exists and is not replaced; name another folder")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, (text, mode) in made.items():
            with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
                file.write(text + "\n")
    except OSError as error:
        raise KeyUnavailableError(f"{folder} cannot be written ({error.strerror})") from error
    return [folder / name for name in made]
