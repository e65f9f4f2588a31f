"""Open files of a folder that may come from anywhere: plain files only, their sizes checked before they are read."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import ArtifactError

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""No link is followed, and a pipe does not make us wait."""


@contextmanager
def opened(path: Path, limit_bytes: int) -> Iterator[tuple[io.FileIO, int]]:
    """Open a plain file; yields it and its size in bytes.

    Raises `FileNotFoundError` and its like, and `ArtifactError` for a symbolic link, a file with a second name (which
    could change it or give away another), anything that is no file, and more than `limit_bytes`.
    """
    if path.is_symlink():
        raise ArtifactError(f"{path} is a symbolic link; an artifact holds plain files only")
    with io.FileIO(os.open(path, _FLAGS), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path} is not a plain file")
        if status.st_nlink > 1:
            raise ArtifactError(f"{path} is a hard link; an artifact's files have one name: copy the folder")
        if status.st_size > limit_bytes:
            raise ArtifactError(f"{path} has {status.st_size} bytes; at most {limit_bytes} are read")
        yield file, status.st_size


def fill(file: io.FileIO, buffer: memoryview) -> None:
    """Read until the buffer is full; raises `EOFError` if the file ends before."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError
        buffer = buffer[count:]


def read_small(path: Path, limit_bytes: int) -> bytes:
    """Return a whole file; raises what `opened` raises."""
    with opened(path, limit_bytes) as (file, size):
        data = bytearray(size)
        fill(file, memoryview(data))
        return bytes(data)
