"""Which replica of a function a request goes to: the one with the fewest requests; while none serves, it waits.

Functions have one fixed address, or several that a list names: a JSON file that the autoscaler writes, the very one
that the scaler reads. It is looked at before each choice, so that from the moment it is written nobody is sent to a
replica that drains.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

WAIT_S = 0.02


@dataclass(frozen=True)
class Place:
    """One request at one replica, until it is freed."""

    address: str
    free: Callable[[], None]


@dataclass
class Balance:
    """Chooses; safe from several threads."""

    fixed: Mapping[str, str]
    listing: Path | None = None
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    _inflight: Counter[str] = field(default_factory=Counter)
    _listed: Mapping[str, list[str]] = field(default_factory=dict)
    _seen: tuple[int, int] = (0, 0)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> list[str]:
        """Every function there is, also those without a replica."""
        with self._lock:
            self._refresh()
            return [*self.fixed, *(name for name in self._listed if name not in self.fixed)]

    def place(self, name: str, timeout_s: float, without: frozenset[str] = frozenset()) -> Place | None:
        """A place at the least busy replica, none of `without`; None if no replica serves within `timeout_s`."""
        ends_s = self.clock() + timeout_s
        while True:
            with self._lock:
                self._refresh()
                addresses = [self.fixed[name]] if name in self.fixed else self._listed.get(name, [])
                usable = [address for address in addresses if address not in without]
                if usable:
                    return self._take(min(usable, key=lambda address: self._inflight[address]))
            if self.clock() >= ends_s or (addresses and without):
                return None
            self.pause(WAIT_S)

    def inflight(self) -> dict[str, int]:
        """Requests at each replica."""
        with self._lock:
            return {address: count for address, count in self._inflight.items() if count}

    def _take(self, address: str) -> Place:
        self._inflight[address] += 1
        freed = threading.Event()

        def free() -> None:
            with self._lock:
                if not freed.is_set():
                    freed.set()
                    self._inflight[address] -= 1

        return Place(address, free)

    def _refresh(self) -> None:
        """Read the list again if it was replaced; one that cannot be read changes nothing."""
        if self.listing is None:
            return
        try:
            found = self.listing.stat()
            stamp = (found.st_ino, found.st_mtime_ns)
            if stamp != self._seen:
                entries = json.loads(self.listing.read_text("utf-8"))
                self._listed = {name: list(_ready(entry)) for name, entry in entries.items()}
                self._seen = stamp
        except (OSError, ValueError):
            return


def _ready(entry: Mapping[str, list[dict[str, str]]]) -> Iterator[str]:
    return (replica["address"] for replica in entry["replicas"] if replica["state"] == "ready")
