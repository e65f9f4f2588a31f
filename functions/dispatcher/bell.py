"""Wakes a thread that polls sockets, from any other thread."""

from __future__ import annotations

import socket
from contextlib import suppress
from types import TracebackType
from typing import Self


class Bell:
    """One waiter's; a context manager. `heard` is readable from `ring` on until `answered`."""

    def __init__(self) -> None:
        self.heard, self._cord = socket.socketpair()
        self.heard.setblocking(False)  # noqa: FBT003  # the standard library's signature
        self._cord.setblocking(False)  # noqa: FBT003

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.heard.close()
        self._cord.close()

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
