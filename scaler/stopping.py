"""How a process in the foreground is told to end."""

from __future__ import annotations

import os
import signal
import threading


def stop_on_signals() -> threading.Event:
    """An event that SIGINT or SIGTERM sets, once and for the whole process. For the main thread.

    The handler only writes to a pipe, and a thread sets the event: `Event.set` takes the lock that the main thread may
    hold when the signal interrupts its `wait`, and would then wait for itself.
    """
    stop = threading.Event()
    reader, writer = os.pipe()

    def listen() -> None:
        os.read(reader, 1)
        stop.set()

    threading.Thread(target=listen, name="signals", daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.write(writer, b"."))
    return stop
