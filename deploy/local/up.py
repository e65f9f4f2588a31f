"""`edgecascade up`: the bundle in the foreground."""

from __future__ import annotations

import signal
import sys
import threading

from deploy.local.bundle import Bundle, Settings
from deploy.local.console import Console
from deploy.stack import Stack


def serve(stack: Stack, settings: Settings) -> None:
    """Run until Ctrl-C or SIGTERM; raises `StartError`. Call it from the main thread."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    log = Console(sys.stdout, [*stack.functions, "gateway", "up"])
    with Bundle(stack, settings, log) as bundle:
        log("up", f"ready at {bundle.url}; try: edgecascade ask 'wake me at six' --url {bundle.url}")
        bundle.watch(stop)
        log("up", "stopping")
