"""Who gets in: so many at work, so many waiting in order of arrival, everyone else is refused at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from functions.serving.errors import ApiError, ClientLeftError, OverloadedError

_RETRY_AFTER_S = 1
_LOOK_EVERY_S = 0.1
"""How often one who waits looks whether the caller is still there."""


class Gate:
    """Admits `max_inflight` requests, lets `queue_limit` wait, refuses the rest with 429."""

    def __init__(self, max_inflight: int, queue_limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._free = max_inflight
        self._max_inflight = max_inflight
        self._queue_limit = queue_limit
        self._clock = clock
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @property
    def inflight(self) -> int:
        """Requests admitted."""
        return self._max_inflight - self._free

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """True when the next request would be refused."""
        return self._free == 0 and len(self._queue) >= self._queue_limit

    @contextmanager
    def admitted(self, expires: float, gone: Callable[[], bool] = lambda: False) -> Iterator[float]:
        """Hold a place while the block runs; gives the seconds it waited.

        `expires` is when, on the clock, waiting is of no more use. Raises `OverloadedError` when the queue is full
        (at once) or the time is up, and `ClientLeftError` once the caller is `gone`.
        """
        waited_s = self._enter(expires, gone)
        try:
            if gone():
                raise ClientLeftError
            yield waited_s
        finally:
            self._leave()

    def _enter(self, expires: float, gone: Callable[[], bool]) -> float:
        with self._lock:
            if self._free:
                self._free -= 1
                return 0.0
            if len(self._queue) >= self._queue_limit:
                raise _overloaded(429, "too many requests; come back later", "overloaded")
            turn = threading.Event()
            self._queue.append(turn)
        began = self._clock()
        error: ApiError = _overloaded(503, "the deadline passed while the request waited", "deadline")
        while (left_s := expires - self._clock()) > 0:
            if turn.wait(min(left_s, _LOOK_EVERY_S)):
                return self._clock() - began
            if gone():
                error = ClientLeftError()
                break
        return self._give_up(turn, began, error)

    def _give_up(self, turn: threading.Event, began: float, error: ApiError) -> float:
        with self._lock:
            if turn.is_set():  # handed over in the last moment
                return self._clock() - began
            self._queue.remove(turn)
        raise error

    def _leave(self) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().set()  # the place goes straight to whoever waited longest
            else:
                self._free += 1


def _overloaded(status: int, message: str, code: str) -> OverloadedError:
    return OverloadedError(status, message, code=code, retry_after_s=_RETRY_AFTER_S)
