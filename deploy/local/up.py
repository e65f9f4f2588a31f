"""`edgecascade up`: the bundle in the foreground."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from deploy.errors import StartError
from deploy.local.bundle import Bundle, Settings
from deploy.local.console import Console
from deploy.stack import Stack
from scaler.placement.rebalance import Action, Decision, Reason
from scaler.stopping import stop_on_signals

if TYPE_CHECKING:
    from deploy.local.autoscale import Autoscale
    from deploy.local.rebalance import Rebalance


def serve(stack: Stack, settings: Settings) -> None:
    """Run until Ctrl-C or SIGTERM; raises `StartError`. Call it from the main thread."""
    stop, log = stop_on_signals(), Console(sys.stdout, [*stack.functions, "gateway", "up"])
    with Bundle(stack, settings, log) as bundle:
        _watch(bundle, stop, log)


def serve_autoscaled(stack: Stack, settings: Settings, options: Autoscale) -> None:
    """As `serve`, with some functions as many times as the scaler says."""
    from deploy.local.autoscale import autoscaled  # gRPC is needed only here

    stop, log = stop_on_signals(), Console(sys.stdout, [*stack.functions, "gateway", "scaler", "autoscale", "up"])
    with autoscaled(stack, settings, options, log, ended=stop.set) as (bundle, running):
        _watch(bundle, stop, log)
        if running.failure is not None:
            raise StartError(f"the autoscaler ended: {running.failure!r}") from running.failure


def serve_rebalanced(stack: Stack, settings: Settings, options: Rebalance) -> None:
    """As `serve`, with one function in shards where a plan has them; raises what `rebalanced` raises."""
    from deploy.local.rebalance import rebalanced  # the parser of metrics is needed only here

    logs = [*stack.functions, *(f"{options.function}-{node.name}-1" for node in options.problem.nodes)]
    stop, log = stop_on_signals(), Console(sys.stdout, [*logs, "gateway", "rebalance", "up"])

    def told(decision: Decision) -> None:
        if decision.action is not Action.KEEP or decision.reason is not Reason.STEADY:
            log("rebalance", f"{decision.action.value} ({decision.reason.value}): {decision.sentence}")

    with rebalanced(stack, settings, options, log, told) as (bundle, running):
        for stage in running.controller.state.plan.stages:
            log("rebalance", f"layers {stage.layers} on {', '.join(stage.nodes)}")
        for node in options.problem.nodes:
            log("rebalance", f"how slow {node.name} is says {running.chain.slowdown_file(node.name)}")
        _watch(bundle, stop, log)
        if running.failure is not None:
            raise StartError(f"the rebalancer ended: {running.failure!r}") from running.failure


def _watch(bundle: Bundle, stop: threading.Event, log: Console) -> None:
    log("up", f"ready at {bundle.url}; try: edgecascade ask 'wake me at six' --url {bundle.url}")
    bundle.watch(stop)
    log("up", "stopping")
