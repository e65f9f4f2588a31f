"""SIGTERM: readiness says 503 at once, then the server's own handler stops accepting and lets requests finish."""

from __future__ import annotations

import signal
from types import FrameType

from functions.serving.lifecycle import Drain


def drain_on_sigterm(drain: Drain) -> None:
    """Put `drain` in front of the server's handler; for a worker process's main thread, at start."""
    servers_own = signal.getsignal(signal.SIGTERM)
    if not callable(servers_own):
        return
    finish = servers_own

    def stop(number: int, frame: FrameType | None) -> None:
        drain.start()
        finish(number, frame)

    signal.signal(signal.SIGTERM, stop)
