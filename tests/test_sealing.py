"""Sealed files: they come back as they were, an independent reading of the format agrees, and tampering fails."""

from __future__ import annotations

import io
import os
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact.sealing import (
    CHUNK_BYTES,
    HEADER_BYTES,
    NONCE_BYTES,
    TAG_BYTES,
    Binding,
    plain_size,
    seal,
    sealed_size,
    unseal,
)
from models.errors import SealError

KEY, NONCE = bytes(range(32)), bytes(range(100, 116))
BINDING = Binding("tiny", "int4-1", "layer-000.safetensors")
SEALED_CHUNK = CHUNK_BYTES + TAG_BYTES
BOUNDARIES = [n * CHUNK_BYTES + d for n in range(6) for d in (-1, 0, 1) if n * CHUNK_BYTES + d >= 0]
_PATTERN = b"".join(n.to_bytes(4, "big") for n in range(6 * CHUNK_BYTES // 4))
SIZES = st.sampled_from(BOUNDARIES) | st.integers(0, 5 * CHUNK_BYTES)


def opened(sealed: bytes, key: bytes = KEY, binding: Binding = BINDING, size: int | None = None) -> bytes:
    """Unseal from memory; a read that cannot be filled ends the file."""
    stream = io.BytesIO(sealed)

    def fill(buffer: memoryview) -> None:
        if stream.readinto(buffer) != len(buffer):
            raise EOFError

    return bytes(unseal(fill, len(sealed) if size is None else size, key, binding))


def oracle(sealed: bytes, key: bytes, parts: tuple[str, str, str]) -> bytes:
    """The format as its description has it, one chunk after the other; shares no code with the product."""
    assert sealed[:8] == b"ECSEAL\x00\x01"
    bound = b"".join(len(p.encode()).to_bytes(4, "big") + p.encode() for p in parts)
    info = b"edgecascade sealed file 1\n" + bound
    cipher = AESGCM(HKDF(SHA256(), 32, salt=sealed[8:24], info=info).derive(key))
    body, plain, number = sealed[24:], b"", 0
    while body:
        chunk, body = body[:65552], body[65552:]
        nonce = number.to_bytes(11, "big") + (b"\x00" if body else b"\x01")
        plain += cipher.decrypt(nonce, chunk, sealed[:24] + bound)
        number += 1
    return plain


def pattern(size: int) -> bytes:
    """Bytes that differ from chunk to chunk."""
    return _PATTERN[:size]


@settings(deadline=None, max_examples=40)
@given(SIZES, st.binary(min_size=32, max_size=32), st.tuples(st.text(), st.text(), st.text(max_size=40)))
def test_a_sealed_file_comes_back_and_the_oracle_agrees(size: int, key: bytes, parts: tuple[str, str, str]) -> None:
    plain, binding = pattern(size), Binding(*parts)
    sealed = bytes(seal(plain, key, binding, os.urandom(NONCE_BYTES)))
    assert len(sealed) == sealed_size(size)
    assert opened(sealed, key, binding) == plain
    assert oracle(sealed, key, parts) == plain


@given(st.integers(0, 10 * SEALED_CHUNK))
def test_a_size_is_that_of_one_file_or_of_none(sealed_bytes: int) -> None:
    try:
        plain = plain_size(sealed_bytes)
    except SealError:
        body = sealed_bytes - HEADER_BYTES
        assert body < TAG_BYTES or 0 < body % SEALED_CHUNK <= TAG_BYTES
    else:
        assert sealed_size(plain) == sealed_bytes


def test_what_is_sealed_shows_nothing_and_never_repeats() -> None:
    plain = bytes(3 * CHUNK_BYTES)
    one, two = (bytes(seal(plain, KEY, BINDING, os.urandom(NONCE_BYTES))) for _ in range(2))
    chunks = [s[HEADER_BYTES + n * SEALED_CHUNK :][:CHUNK_BYTES] for s in (one, two) for n in range(3)]
    assert len(set(chunks)) == 6
    assert all(len(set(chunk)) > 200 for chunk in chunks)


# ---- tampering ----

PLAIN = pattern(3 * CHUNK_BYTES + 100)
SEALED = bytes(seal(PLAIN, KEY, BINDING, NONCE))
CUTS = [HEADER_BYTES + n * SEALED_CHUNK for n in range(4)]
HEADER, CHUNKS = SEALED[:HEADER_BYTES], [SEALED[a:b] for a, b in zip(CUTS, [*CUTS[1:], len(SEALED)], strict=True)]
OTHER = bytes(seal(PLAIN, KEY, BINDING, bytes(NONCE_BYTES)))


def with_flip(at: int) -> bytes:
    return SEALED[:at] + bytes([SEALED[at] ^ 1]) + SEALED[at + 1 :]


def with_chunks(*numbers: int) -> bytes:
    return HEADER + b"".join(CHUNKS[n] for n in numbers)


def test_the_untouched_file_opens() -> None:
    assert opened(SEALED) == PLAIN
    assert with_chunks(0, 1, 2, 3) == SEALED


FLIPS = [*range(HEADER_BYTES), *(cut + 5 for cut in CUTS), *(cut - 1 for cut in CUTS[1:]), len(SEALED) - 1]


@pytest.mark.parametrize("at", FLIPS)
def test_a_flipped_bit_is_found(at: int) -> None:
    with pytest.raises(SealError):
        opened(with_flip(at))


ENDS = sorted({end + d for end in (0, 8, *CUTS) for d in (-1, 0, 1, TAG_BYTES, TAG_BYTES + 1) if end + d >= 0})


@pytest.mark.parametrize("end", [*ENDS, len(SEALED) - 1, len(SEALED) - TAG_BYTES])
def test_a_file_cut_short_is_found(end: int) -> None:
    with pytest.raises(SealError):
        opened(SEALED[:end])


@pytest.mark.parametrize("end", [*ENDS, len(SEALED) - 1])
def test_a_file_that_ends_while_it_is_read_is_found(end: int) -> None:
    with pytest.raises((SealError, EOFError)):
        opened(SEALED[:end], size=len(SEALED))


REARRANGED: dict[str, bytes] = {
    "two chunks change places": with_chunks(1, 0, 2, 3),
    "the last is not at the end": with_chunks(0, 1, 3, 2),
    "one comes twice": with_chunks(0, 1, 1, 2, 3),
    "the last comes twice": with_chunks(0, 1, 2, 3, 3),
    "one is left out": with_chunks(0, 2, 3),
    "the last is left out": with_chunks(0, 1, 2),
    "only the last": with_chunks(3),
    "another file's chunk": HEADER + CHUNKS[0] + OTHER[CUTS[1] : CUTS[2]] + CHUNKS[2] + CHUNKS[3],
    "another file's end": SEALED[: CUTS[3]] + OTHER[CUTS[3] :],
    "another file's header": OTHER[:HEADER_BYTES] + SEALED[HEADER_BYTES:],
    "an empty last chunk more": SEALED + bytes(TAG_BYTES),
    "bytes more": SEALED + b"more",
    "a whole chunk more": SEALED + bytes(SEALED_CHUNK),
    "not sealed": PLAIN,
}


@pytest.mark.parametrize("how", REARRANGED)
def test_rearranged_chunks_are_found(how: str) -> None:
    with pytest.raises(SealError):
        opened(REARRANGED[how])


FOREIGN: dict[str, Callable[[], bytes]] = {
    "key": lambda: opened(SEALED, key=bytes(32)),
    "model": lambda: opened(SEALED, binding=Binding("tinx", "int4-1", "layer-000.safetensors")),
    "version": lambda: opened(SEALED, binding=Binding("tiny", "int4-2", "layer-000.safetensors")),
    "file": lambda: opened(SEALED, binding=Binding("tiny", "int4-1", "layer-001.safetensors")),
    "boundaries": lambda: opened(SEALED, binding=Binding("tinyi", "nt4-1", "layer-000.safetensors")),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_nothing_else_opens_it(what: str) -> None:
    with pytest.raises(SealError):
        FOREIGN[what]()


@settings(deadline=None)
@given(st.data())
def test_any_change_anywhere_is_found(data: st.DataObject) -> None:
    small = bytes(seal(b"weights", KEY, BINDING, NONCE))
    at, bit = data.draw(st.integers(0, len(small) - 1)), data.draw(st.integers(0, 7))
    with pytest.raises(SealError):
        opened(small[:at] + bytes([small[at] ^ (1 << bit)]) + small[at + 1 :])
