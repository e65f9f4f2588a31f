"""`edgecascade up`: the bundle in the foreground."""

from __future__ import annotations

import signal
import sys
import threading
from typing import TYPE_CHECKING

from deploy.errors import StartError
from deploy.local.bundle import Bundle, Settings
from deploy.local.console import Console
from deploy.stack import Stack

if TYPE_CHECKING:
    from deploy.local.autoscale import Autoscale


def serve(stack: Stack, settings: Settings) -> None:
    """Run until Ctrl-C or SIGTERM; raises `StartError`. Call it from the main thread."""
    stop, log = _stop_on_signals(), Console(sys.stdout, [*stack.functions, "gateway", "up"])
    with Bundle(stack, settings, log) as bundle:
        _watch(bundle, stop, log)


def serve_autoscaled(stack: Stack, settings: Settings, options: Autoscale) -> None:
    """As `serve`, with some functions as many times as the scaler says."""
    from deploy.local.autoscale import autoscaled  # gRPC is needed only here

    stop, log = _stop_on_signals(), Console(sys.stdout, [*stack.functions, "gateway", "scaler", "autoscale", "up"])
    with autoscaled(stack, settings, options, log, ended=stop.set) as (bundle, running):
        _watch(bundle, stop, log)
        if running.failure is not None:
            raise StartError(f"the autoscaler ended: {running.failure!r}") from running.failure


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _watch(bundle: Bundle, stop: threading.Event, log: Console) -> None:
    log("up", f"ready at {bundle.url}; try: edgecascade ask 'wake me at six' --url {bundle.url}")
    bundle.watch(stop)
    log("up", "stopping")
