"""What the machine says of memory: peak use, the page cache, and how fast two threads can read."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GB = 1e9
KIB = 1024
SLICE = 1 << 20
"""Bytes that a thread reads per call; small enough to share the machine, large enough to hide the call."""


def peak_bytes() -> int:
    """The most memory that this process has held at once (VmHWM: file pages that it mapped and touched included)."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * KIB
    raise OSError("this kernel does not tell VmHWM")


def files_under(path: Path) -> list[Path]:
    """The file, or all files of the folder."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def drop_from_cache(files: Iterable[Path]) -> None:
    """Ask the kernel to forget what it cached of the files; pages that some process maps stay."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only clean pages are dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(files: Iterable[Path]) -> float:
    """The part of the files that lies in the page cache (mincore)."""
    held = total = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            whole = np.frombuffer(mapped, np.uint8)
            failed = _libc().mincore(ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(size), pages.ctypes)
            del whole  # a mapping that is looked at cannot be closed
            if failed:
                raise OSError(f"mincore does not say what is cached of {path}")
            held, total = held + int((pages & 1).sum()), total + len(pages)
    return held / total if total else 0.0


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def bring_into_cache(files: Iterable[Path]) -> None:
    """Read the files through, so that the next reader finds them in memory."""
    buffer = bytearray(SLICE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


class ReadTest:
    """A buffer far larger than any cache, read by several threads at once."""

    def __init__(self, threads: int, size_bytes: int, *, huge_pages: bool) -> None:
        self._map = mmap.mmap(-1, size_bytes)
        if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        values = np.frombuffer(self._map, np.float32)
        values[:] = 1
        self._parts = np.array_split(values, threads)
        self._pool = ThreadPoolExecutor(threads)

    def gb_per_s(self) -> float:
        """Read the buffer once; the rate of all threads together."""
        begun = time.perf_counter()
        list(self._pool.map(_read, self._parts))
        return sum(part.nbytes for part in self._parts) / GB / (time.perf_counter() - begun)


def _read(part: NDArray[np.float32]) -> None:
    """The largest value, found slice by slice: numpy does it with vector instructions and without the lock."""
    step = SLICE // part.itemsize
    for at in range(0, len(part), step):
        part[at : at + step].max()
