"""Log lines of many processes on one terminal."""

from __future__ import annotations

import threading
from typing import TextIO

_COLOURS = (36, 32, 33, 35, 34)  # ANSI: cyan, green, yellow, magenta, blue


class Console:
    """Writes `name | line`, one colour a name on a terminal; safe from several threads."""

    def __init__(self, out: TextIO, names: list[str]) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._width = max(map(len, names), default=0)
        self._colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)} if out.isatty() else {}

    def __call__(self, name: str, line: str) -> None:
        """Write one line."""
        prefix = f"{name:<{self._width}} |"
        if name in self._colours:
            prefix = f"\x1b[{self._colours[name]}m{prefix}\x1b[0m"
        with self._lock:
            self._out.write(f"{prefix} {line}\n")
            self._out.flush()
