"""A slower machine, for benches: each forward pass lasts a multiple of its own time. Knows nothing of models."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class SlowedSession:
    """An onnxruntime session; after each run it sleeps until the run took `factor` times as long.

    It sleeps in the caller's turn, so the cost grows with the work as on a slower machine, and leaves the processor to
    the other tiers. What a sleep lasts too long (tens of microseconds each, which many short graphs add up) is taken
    off those after it. The factor is asked for at each run: a machine may get slower while it serves. `work` is the
    clock of what is multiplied: for one thread its processor's time, so that what interrupts it is not slept off too.
    """

    def __init__(
        self,
        session: Any,
        factor: float | Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
        work: Callable[[], float] | None = None,
    ) -> None:
        self._session, self._clock, self._sleep, self._work = session, clock, sleep, work or clock
        self._factor = factor if callable(factor) else lambda: factor
        self._overslept_s = 0.0

    def run_with_iobinding(self, *args: Any) -> None:
        """As onnxruntime's."""
        self._slowed(self._session.run_with_iobinding, *args)

    def run_with_ort_values(self, *args: Any) -> Any:
        """As onnxruntime's."""
        return self._slowed(self._session.run_with_ort_values, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def _slowed(self, run: Callable[..., Any], *args: Any) -> Any:
        began = self._work()
        result = run(*args)
        worked_s, slept = self._work() - began, self._clock()
        pause_s = (self._factor() - 1) * worked_s - self._overslept_s
        self._sleep(max(0.0, pause_s))
        self._overslept_s = max(0.0, self._clock() - slept - pause_s)
        return result


@dataclass
class Throttle:
    """A factor that a file holds, looked at again when it has changed; until it can be read, `factor`."""

    path: Path
    factor: float = 1.0
    _changed: tuple[int, int] = (0, 0)

    def __call__(self) -> float:
        """The factor now."""
        try:
            found = self.path.stat()
            if (stamp := (found.st_ino, found.st_mtime_ns)) != self._changed:
                self.factor = max(1.0, float(self.path.read_text("ascii")))
                self._changed = stamp
        except (OSError, ValueError):
            pass  # half written, or not there yet: what was said last holds
        return self.factor
