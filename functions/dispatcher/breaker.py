"""A tier that fails is left alone until a probe found its model ready: a sick tier costs no request any time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_FAILURES = 3
_LONGEST_S = 8.0


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="probe", daemon=True).start()


class Breaker:
    """Open after a refused connection, or three failures in a row; closed by a probe alone.

    Probes go out at most one every `interval_s`, and half as often each time the tier fails again right after one. No
    request waits for a probe. They are started by requests that ask `allows`, so an idle function sends none.
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
        self._pause_s = interval_s
        self._reopened = False
        self._clock = clock
        self._start = start
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._next_probe: float | None = None  # None: the tier is taken to be up
        self.opened = 0

    @property
    def is_open(self) -> bool:
        """Whether the tier is left alone."""
        return self._next_probe is not None

    def refused(self) -> None:
        """A connection failed: leave the tier alone."""
        with self._lock:
            self._open()

    def failed(self) -> None:
        """The tier took a request and gave no answer, or nonsense; some of these in a row and it is left alone."""
        with self._lock:
            self._in_a_row += 1
            if self._in_a_row >= _FAILURES:
                self._open()

    def answered(self) -> None:
        """The tier answered."""
        with self._lock:
            self._in_a_row, self._pause_s, self._reopened = 0, self._interval_s, False

    def allows(self) -> bool:
        """Whether the tier may be asked; when it may not and a probe is due, one is started."""
        if self._next_probe is None:  # as nearly always: needs no lock
            return True
        with self._lock:
            due = self._next_probe is not None and self._clock() >= self._next_probe
            if due:
                self._next_probe = self._clock() + self._pause_s
        if due:
            self._start(self._try)
        return False

    def _open(self) -> None:
        if self._next_probe is None:
            if self._reopened:
                self._pause_s = min(2 * self._pause_s, _LONGEST_S)
            self._reopened = True
            self._next_probe = self._clock() + self._pause_s
            self.opened += 1

    def _try(self) -> None:
        if self._probe():
            with self._lock:
                # One more failure opens it again, until it has answered.
                self._next_probe, self._in_a_row = None, _FAILURES - 1
