"""The bundle with one tier cut over nodes by a plan, which is made anew when a node slows, falls silent or dies.

It is the very loop that runs beside the scaler in a cluster, with processes for Deployments.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
from prometheus_client import CollectorRegistry, start_http_server

from deploy.local.bundle import Bundle, Settings
from deploy.local.placed import Chain, Limits
from deploy.local.plan import function_command
from deploy.local.process import Process, Sink, free_ports, listen
from deploy.stack import Function, Stack
from scaler.placement.controller import Controller
from scaler.placement.pages import ShardPages, trigger
from scaler.placement.plan import place
from scaler.placement.rebalance import Decision, Policy, State
from scaler.placement.server import Loop
from scaler.placement.values import Goal, Problem
from scaler.placement.watch import Watch

PAGE_TIMEOUT_S = 0.5
NAMESPACE = "openfaas-fn"


@dataclass(frozen=True)
class Rebalance:
    """Which function is cut over which nodes, how slow these are, and when to plan anew; looks are `interval_s` apart.

    Decisions and predictions are shown on `metrics_port` (0: nowhere).
    """

    problem: Problem
    function: str = "edge"
    goal: Goal = Goal.LATENCY
    policy: Policy = field(default_factory=Policy)
    slowdown: Mapping[str, float] = field(default_factory=dict)
    interval_s: float = 1.0
    window_s: float = 5.0
    metrics_port: int = 0
    dry_run: bool = False
    ready_s: float = 120.0


class Rebalanced(threading.Thread):
    """The loop in a thread of its own, to which the shards are tied; `failure` is what ended it, if anything did."""

    def __init__(self, chain: Chain, controller: Controller, loop: Loop, interval_s: float) -> None:
        super().__init__(name="rebalance", daemon=True)
        self.chain, self.controller = chain, controller
        self._loop, self._interval_s = loop, interval_s
        self._stop_event, self._begun = threading.Event(), threading.Event()
        self.failure: Exception | None = None

    def run(self) -> None:
        """Put the first plan into force, then look and step until told to stop, then end the shards."""
        try:
            self.chain.apply(self.controller.state.plan)
            self._begun.set()
            self._loop.run(self._stop_event, self._interval_s)
        except Exception as error:  # noqa: BLE001  # whoever started it asks for it
            self.failure = error
        finally:
            self._begun.set()
            self.chain.stop()

    def wait_begun(self) -> None:
        """Return when the first plan is in force; raises what kept it from that."""
        self._begun.wait()
        if self.failure is not None:
            raise self.failure

    def throttle(self, node: str, factor: float) -> None:
        """Make a node so many times slower than this machine from now on."""
        self.chain.slowdown_file(node).write_text(f"{factor:g}", "ascii")

    def stop(self) -> None:
        """End it and its shards."""
        self._stop_event.set()
        self.join()


@contextmanager
def rebalanced(
    stack: Stack, settings: Settings, options: Rebalance, sink: Sink, told: Callable[[Decision], None] | None = None
) -> Iterator[tuple[Bundle, Rebalanced]]:
    """Run the bundle with one function in shards, for the while; raises `StackError`, `StartError`, `PlacementError`.

    `told` hears of each decision.
    """
    stack.only((options.function,))
    rest = replace(stack, functions={n: f for n, f in stack.functions.items() if n != options.function})
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="edgecascade-")))
        listing = folder / "replicas.json"
        listing.write_text(json.dumps({options.function: {"replicas": []}}))
        bundle = Bundle(rest, replace(settings, gateway_environment={"GATEWAY_REPLICAS": str(listing)}), sink)
        closing.enter_context(bundle)
        running = _running(stack.functions[options.function], bundle, settings, options, listing, sink, told, closing)
        for node in options.problem.nodes:
            running.throttle(node.name, options.slowdown.get(node.name, 1.0))
        running.start()
        try:
            running.wait_begun()
            yield bundle, running
        finally:
            bundle.stop()  # the gateway first, so that what runs finishes
            running.stop()


def _running(
    function: Function,
    bundle: Bundle,
    settings: Settings,
    options: Rebalance,
    listing: Path,
    sink: Sink,
    told: Callable[[Decision], None] | None,
    closing: ExitStack,
) -> Rebalanced:
    def spawn(name: str, environment: Mapping[str, str]) -> tuple[Process, str]:
        listener = listen()
        port = int(listener.getsockname()[1])
        told_so = replace(function, environment={**function.environment, **environment})
        command = function_command(told_so, bundle.ports, bundle.port, settings.site, settings.inherited)
        return Process(replace(command, name=name), listener, settings.site.root, sink), f"http://127.0.0.1:{port}"

    limits = Limits(options.ready_s, settings.stop_timeout_s)
    chain = Chain(function.name, spawn, lambda: free_ports(1)[0], listing, limits)
    registry = CollectorRegistry()
    plan = place(options.problem, options.goal)
    controller = Controller(
        State(options.problem, plan), options.policy, chain, registry, dry_run=options.dry_run, told=told
    )
    http = closing.enter_context(httpx.Client(timeout=PAGE_TIMEOUT_S, trust_env=False))
    pages = ShardPages(http, trigger(function.name, NAMESPACE, options.window_s))
    watch = Watch(chain, pages)
    if options.metrics_port:
        server, _ = start_http_server(options.metrics_port, "127.0.0.1", registry)
        closing.callback(server.server_close)
        closing.callback(server.shutdown)
    return Rebalanced(chain, controller, Loop(watch, controller, registry), options.interval_s)
