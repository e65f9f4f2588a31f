"""Keys: how a data key is wrapped, how keys are written as text, and how a manifest is signed. No file is read here.

Each artifact has a data key of its own; the manifest holds it wrapped. Who wraps and unwraps it is handed in: a local
secret (`LocalKey`), or a provider outside `models` that speaks to a key service.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from models.errors import KeyUnavailableError, SealError

KEY_BYTES = 32
SEALING, SIGNING, PUBLIC = "edgecascade-sealing-key", "edgecascade-signing-key", "edgecascade-public-key"
"""What a key is for; its text begins with this word, so that none is taken for another."""
_NONCE_BYTES = 12
_MANIFEST_LABEL = b"edgecascade manifest 1\n"
"""Goes before what is signed: a signature over anything else is none over a manifest."""


class KeyWrapper(Protocol):
    """Keeps data keys safe; `context` says what the key is for, and must be the same when it is unwrapped."""

    @property
    def provider(self) -> str:
        """What kind of wrapper it is, such as `local`."""

    @property
    def key_id(self) -> str:
        """Which of its keys; tells them apart, and is no secret."""

    def wrap(self, data_key: bytes, context: Mapping[str, str]) -> bytes:
        """Return the data key wrapped; raises `KeyUnavailableError`."""

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return the data key; raises `SealError` if it is not of this key and context, or `KeyUnavailableError`."""


@dataclass(frozen=True)
class LocalKey:
    """Wraps with a secret of 32 bytes: AES-256-GCM under a key derived from it, the context as associated data."""

    secret: bytes = field(repr=False)
    provider: str = field(default="local", init=False)

    @property
    def key_id(self) -> str:
        """Derived one way from the secret."""
        return self._derived(b"key id", 8).hex()

    def wrap(self, data_key: bytes, context: Mapping[str, str]) -> bytes:
        """Return nonce, ciphertext and tag."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher().encrypt(nonce, data_key, _canonical(context))

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return the data key; raises `SealError`."""
        nonce, sealed = wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:]
        try:
            return self._cipher().decrypt(nonce, sealed, _canonical(context))
        except (InvalidTag, ValueError) as error:
            raise SealError(f"the local key {self.key_id} does not open it") from error

    def _cipher(self) -> AESGCM:
        return AESGCM(self._derived(b"wrap", KEY_BYTES))

    def _derived(self, purpose: bytes, n_bytes: int) -> bytes:
        return HKDF(SHA256(), n_bytes, salt=None, info=b"edgecascade local key 1\n" + purpose).derive(self.secret)


def _canonical(context: Mapping[str, str]) -> bytes:
    return json.dumps(dict(context), sort_keys=True).encode()


def key_text(purpose: str, key: bytes) -> str:
    """Return a key as one line: what it is for, a colon, base64."""
    return f"{purpose}:{base64.b64encode(key).decode()}"


def parse_key(purpose: str, text: str) -> bytes:
    """Read `key_text`; raises `KeyUnavailableError`, which does not repeat the text."""
    word, _, encoded = text.strip().partition(":")
    if word != purpose:
        raise KeyUnavailableError(f"it must be one line that begins with '{purpose}:' ('edgecascade keys' makes one)")
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise KeyUnavailableError(f"it must hold {KEY_BYTES} bytes in base64 after '{purpose}:'")
    return key


def public_key_of(signing_key: bytes) -> bytes:
    """Return the Ed25519 public key that checks what the signing key signs."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).public_key().public_bytes_raw()


def sign_manifest(manifest: bytes, signing_key: bytes) -> bytes:
    """Return the Ed25519 signature (RFC 8032) of a manifest's bytes."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).sign(_MANIFEST_LABEL + manifest)


def check_signature(manifest: bytes, signature: bytes, public_key: bytes) -> None:
    """Raise `SealError` unless the signature is of these very bytes by this key."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _MANIFEST_LABEL + manifest)
    except (InvalidSignature, ValueError) as error:
        raise SealError("the manifest's signature is not by the key that is trusted, or it was altered") from error
