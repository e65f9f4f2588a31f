"""Wakes a thread that polls sockets, from any other thread."""

from __future__ import annotations

import socket
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Bell:
    """One waiter's. `heard` is readable from `ring` on until `answered`."""

    def __init__(self) -> None:
        self.heard, self._cord = socket.socketpair()
        self.heard.setblocking(False)  # noqa: FBT003  # the standard library's signature
        self._cord.setblocking(False)  # noqa: FBT003

    def ring(self) -> None:
        """Wake the waiter; one who has gone, or has not looked yet, needs no more."""
        with suppress(OSError):
            self._cord.send(b"!")

    def answered(self) -> bool:
        """Whether it rang since the last time; it is silent again."""
        try:
            return bool(self.heard.recv(4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Let go of it."""
        self.heard.close()
        self._cord.close()


class Bells:
    """As many bells as wait at once; they are used again, which is faster than making them. For several threads."""

    def __init__(self) -> None:
        self._idle: deque[Bell] = deque()
        self._busy: set[Bell] = set()
        weakref.finalize(self, _close_all, self._idle)

    @contextmanager
    def one(self) -> Iterator[Bell]:
        """A bell for the length of a block. It may ring for who had it before: look, and wait on."""
        try:
            bell = self._idle.pop()
        except IndexError:
            bell = Bell()
        self._busy.add(bell)
        try:
            yield bell
        finally:
            self._busy.discard(bell)
            self._idle.append(bell)

    def ring(self) -> None:
        """Ring all that somebody waits for."""
        for bell in self._busy.copy():
            bell.ring()


def _close_all(bells: deque[Bell]) -> None:
    while bells:
        bells.pop().close()
