"""Seal a file: the STREAM layout of age with AES-256-GCM. Pure, and without options.

    sealed file   header, then chunks
    header        "ECSEAL", version (2 bytes), nonce (16 random bytes)
    chunk         64 KiB of the file encrypted, then its tag (16 bytes); the last chunk may be shorter, and is empty
                  only in an empty file
    file key      HKDF-SHA-256 of the artifact's data key; salt: the nonce; info: a label, then the binding
    chunk nonce   the chunk's number (11 bytes, big-endian), then 1 for the last chunk and 0 for any other
    chunk AAD     the header, then the binding
    binding       model id, model version and file name, each behind its length (4 bytes, big-endian)

A chunk that is changed, moved, left out or taken from another file, artifact or model fails its tag; so does a file
that ends early, since its last chunk is not marked as one. Sources: the age-encryption.org/v1 payload; Hoang et al.,
"Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance" (CRYPTO 2015); RFC 5869; NIST SP 800-38D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from models.errors import SealError

MAGIC, VERSION = b"ECSEAL", 1
KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 16, 16
CHUNK_BYTES = 64 * 1024
_PREFIX = MAGIC + VERSION.to_bytes(2, "big")
HEADER_BYTES = len(_PREFIX) + NONCE_BYTES
_SEALED_CHUNK_BYTES = CHUNK_BYTES + TAG_BYTES
_LABEL = b"edgecascade sealed file 1\n"
_CHUNKS_AT_ONCE = 4
"""Chunks that are read together: few calls, and what was hashed is still in the cache when it is decrypted."""

Fill = Callable[[memoryview], None]
"""Fills the whole buffer with the next bytes of a file, or raises."""


@dataclass(frozen=True)
class Binding:
    """What a sealed file belongs to; it opens as nothing else."""

    model_id: str
    model_version: str
    file_name: str

    def encoded(self) -> bytes:
        """Return the three parts, unambiguously."""
        parts = (part.encode() for part in (self.model_id, self.model_version, self.file_name))
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def sealed_size(plain_bytes: int) -> int:
    """Size of a sealed file in bytes."""
    return HEADER_BYTES + plain_bytes + TAG_BYTES * max(1, -(-plain_bytes // CHUNK_BYTES))


def plain_size(sealed_bytes: int) -> int:
    """Size in bytes of what a sealed file holds; raises `SealError` for a size that no sealed file has."""
    body = sealed_bytes - HEADER_BYTES
    plain = body - TAG_BYTES * -(-body // _SEALED_CHUNK_BYTES)
    if plain < 0 or sealed_size(plain) != sealed_bytes:
        raise SealError(f"no sealed file has {sealed_bytes} bytes: it was cut")
    return plain


def seal(plaintext: bytes | memoryview, data_key: bytes, binding: Binding, nonce: bytes) -> bytearray:
    """Return the sealed file; `nonce` is 16 bytes that were drawn for this file alone."""
    header = _PREFIX + nonce
    cipher, bound = _cipher(data_key, nonce, binding), header + binding.encoded()
    sealed = bytearray(sealed_size(len(plaintext)))
    sealed[:HEADER_BYTES] = header
    source, target, at = memoryview(plaintext), memoryview(sealed), HEADER_BYTES
    for chunk in _chunks(len(plaintext)):
        stop = at + chunk.size + TAG_BYTES
        cipher.encrypt_into(chunk.nonce, source[chunk.start : chunk.start + chunk.size], bound, target[at:stop])
        at = stop
    return sealed


def unseal(fill: Fill, sealed_bytes: int, data_key: bytes, binding: Binding) -> bytearray:
    """Return what a sealed file of `sealed_bytes` holds, decrypted as it is read into one buffer.

    Nothing is returned before the last chunk's tag is verified. Raises `SealError`.
    """
    plain = bytearray(plain_size(sealed_bytes))
    header = bytearray(HEADER_BYTES)
    fill(memoryview(header))
    if not header.startswith(_PREFIX):
        raise SealError("it does not begin as a sealed file of this version does")
    cipher, bound = _cipher(data_key, bytes(header[len(_PREFIX) :]), binding), header + binding.encoded()
    target, window = memoryview(plain), memoryview(bytearray(_CHUNKS_AT_ONCE * _SEALED_CHUNK_BYTES))
    chunks, left = _chunks(len(plain)), sealed_bytes - HEADER_BYTES
    while left:
        piece = window[: min(left, len(window))]
        fill(piece)
        left -= len(piece)
        for at in range(0, len(piece), _SEALED_CHUNK_BYTES):
            chunk = next(chunks)
            try:
                cipher.decrypt_into(
                    chunk.nonce,
                    piece[at : at + chunk.size + TAG_BYTES],
                    bound,
                    target[chunk.start : chunk.start + chunk.size],
                )
            except InvalidTag as error:
                raise SealError("it was altered, or sealed for another model, file or key") from error
    return plain


@dataclass(frozen=True)
class _Chunk:
    start: int
    size: int
    nonce: bytes


def _chunks(plain_bytes: int) -> Iterator[_Chunk]:
    last = max(0, plain_bytes - 1) // CHUNK_BYTES
    for number in range(last + 1):
        start = number * CHUNK_BYTES
        nonce = number.to_bytes(11, "big") + bytes([number == last])
        yield _Chunk(start, min(CHUNK_BYTES, plain_bytes - start), nonce)


def _cipher(data_key: bytes, nonce: bytes, binding: Binding) -> AESGCM:
    derived = HKDF(SHA256(), KEY_BYTES, salt=nonce, info=_LABEL + binding.encoded())
    return AESGCM(derived.derive(data_key))
