"""A tier that refused a connection is left alone until a probe reached it: a dead edge costs no request any time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="probe", daemon=True).start()


class Cooldown:
    """Open after a failed connection; closed by a probe alone, at most one every `interval_s`.

    No request waits for a probe. They are started by requests that ask `allows`, so an idle function sends none.
    """

    def __init__(
        self,
        probe: Callable[[], bool],
        interval_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Callable[[], None]], None] = _in_background,
    ) -> None:
        self._probe = probe
        self._interval_s = interval_s
        self._clock = clock
        self._start = start
        self._lock = threading.Lock()
        self._next_probe: float | None = None  # None: the tier is taken to be up

    def failed(self) -> None:
        """A connection failed: leave the tier alone."""
        with self._lock:
            if self._next_probe is None:
                self._next_probe = self._clock() + self._interval_s

    def allows(self) -> bool:
        """Whether the tier may be asked; when it may not and a probe is due, one is started."""
        with self._lock:
            if self._next_probe is None:
                return True
            due = self._clock() >= self._next_probe
            if due:
                self._next_probe = self._clock() + self._interval_s
        if due:
            self._start(self._try)
        return False

    def _try(self) -> None:
        if self._probe():
            with self._lock:
                self._next_probe = None
