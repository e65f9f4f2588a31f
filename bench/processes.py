"""Processes of this machine, as /proc tells of them (proc(5)): those of a group, their time, and a child's end."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_GROUP, _USER, _SYSTEM = 2, 11, 12
"""Where /proc/PID/stat has them, counted behind the name."""


def of_groups(groups: Collection[int]) -> Iterator[Path]:
    """The folders in /proc of the living processes of some groups."""
    return (folder for folder, _ in _stats(groups))


def cpu_s(groups: Collection[int]) -> float:
    """Processor time that the living processes of some groups have used so far; children that ended are left out."""
    ticks = sum(int(fields[_USER]) + int(fields[_SYSTEM]) for _, fields in _stats(groups))
    return ticks / os.sysconf("SC_CLK_TCK")


def die_with_parent() -> None:
    """Be killed when the process that started this one ends, even if this one is stopped then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stats(groups: Collection[int]) -> Iterator[tuple[Path, list[str]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            fields = (folder / "stat").read_text("ascii", "replace").rpartition(")")[2].split()
            if int(fields[_GROUP]) in groups:
                yield folder, fields
