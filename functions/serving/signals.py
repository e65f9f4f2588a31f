"""SIGTERM: readiness says 503 at once, then the server's own handler stops accepting and lets requests finish.

Between the two the function lingers, if it is told to: of-watchdog hands SIGTERM on at once but goes on accepting for
its `healthcheck_interval`, and a cluster sends requests until its endpoints are up to date. Who stopped accepting in
the first moment would fail those.
"""

from __future__ import annotations

import signal
from types import FrameType

from functions.serving.lifecycle import Drain


def drain_on_sigterm(drain: Drain, linger_s: float = 0.0) -> None:
    """Put `drain` in front of the server's handler; for a worker process's main thread, at start.

    A second SIGTERM ends the lingering.
    """
    servers_own = signal.getsignal(signal.SIGTERM)
    if not callable(servers_own):
        return
    finish = servers_own

    def stop(_number: int, frame: FrameType | None) -> None:
        lingers = linger_s > 0 and not drain.draining
        drain.start()
        if lingers:
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, linger_s)
        else:
            signal.setitimer(signal.ITIMER_REAL, 0)
            finish(signal.SIGTERM, frame)

    signal.signal(signal.SIGTERM, stop)
