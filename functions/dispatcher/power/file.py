"""A file that says how the battery is: for tests, demonstrations, and machines with a script of their own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from functions.dispatcher.power import message
from functions.dispatcher.power.source import Clock
from routing.power import Reading


@dataclass(frozen=True)
class FileSource:
    """Reads the file anew each time; what stands in it holds now, however old the file is."""

    path: Path
    clock: Clock = time.monotonic
    name: str = "file"

    def read(self) -> Reading | None:
        """None where there is no file, or nothing in it that makes sense."""
        try:
            with self.path.open("rb") as file:
                content = file.read(message.LIMIT_BYTES + 1)
        except OSError:
            return None
        return message.parse(content, self.name, self.clock())

    def close(self) -> None:
        """Nothing is held open."""
