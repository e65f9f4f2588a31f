"""How often something was done and how long it took altogether, counted from any thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Spent:
    """So many `times`, and the `seconds` of all of them."""

    times: int = 0
    seconds: float = 0.0


class Tally:
    """Adds up; `spent` is what came together since the start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.spent = Spent()

    def add(self, seconds: float) -> None:
        """Count one more."""
        with self._lock:
            self.spent = Spent(self.spent.times + 1, self.spent.seconds + seconds)
