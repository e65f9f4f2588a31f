"""Values out of the kernel's one-value files. Whatever is missing, unreadable or no number is None."""

from __future__ import annotations

import math
from pathlib import Path

_LIMIT_BYTES = 4096  # a page: sysfs files are no longer


def text(path: Path) -> str | None:
    """The file's content without white space around it."""
    try:
        with path.open("rb") as file:
            return file.read(_LIMIT_BYTES).decode("utf-8", "replace").strip()
    except OSError:  # not there, or the driver has no value now (ENODATA, ENODEV, EIO)
        return None


def number(path: Path) -> float | None:
    """The file's content as a finite number."""
    content = text(path)
    try:
        value = float(content) if content else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def children(folder: Path, pattern: str = "*") -> list[Path]:
    """What is in a folder, in order of names; nothing if there is none."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []
