"""Requests at a constant rate for as long as something else goes on: open loop, whatever comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.chaos import Shot

_AT_ONCE = 128


@dataclass(frozen=True)
class Timed:
    """One request; `sent_s` and `done_s` on the monotonic clock."""

    sent_s: float
    done_s: float
    shot: Shot


@dataclass
class Steady:
    """A run in the background; `timed` is whole once the block has ended."""

    timed: list[Timed] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def send(self, ask: Callable[[int], Shot], rate: float) -> None:
        """Send the nth request when it is due."""
        futures: list[Future[Timed]] = []
        began = time.monotonic()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            while not self._stop.wait(max(0.0, began + len(futures) / rate - time.monotonic())):
                futures.append(pool.submit(_timed, ask, len(futures)))
        self.timed = [future.result() for future in futures]

    def stop(self) -> None:
        """Send no more."""
        self._stop.set()


@contextmanager
def steadily(ask: Callable[[int], Shot], rate: float) -> Iterator[Steady]:
    """Send `rate` requests a second for the length of a block, and wait for the last answer."""
    steady = Steady()
    thread = threading.Thread(target=steady.send, args=(ask, rate), name="steady")
    thread.start()
    try:
        yield steady
    finally:
        steady.stop()
        thread.join()


def between(timed: Sequence[Timed], since_s: float, until_s: float) -> list[Shot]:
    """What was sent and done within a span of time."""
    return [t.shot for t in timed if since_s <= t.sent_s and t.done_s <= until_s]


def _timed(ask: Callable[[int], Shot], number: int) -> Timed:
    sent_s = time.monotonic()
    shot = ask(number)
    return Timed(sent_s, time.monotonic(), shot)
