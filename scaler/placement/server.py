"""`edgecascade rebalance`: looks at the shards at an interval, until it is told to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
from kubernetes import client
from prometheus_client import CollectorRegistry, Counter, start_http_server
from urllib3.exceptions import HTTPError

from scaler import kubernetes_api
from scaler.errors import SettingsError, SourceError
from scaler.placement.apply import KubernetesApplier, Shard
from scaler.placement.controller import Controller
from scaler.placement.pages import PrometheusPages, ShardPages, trigger
from scaler.placement.plan import place
from scaler.placement.rebalance import Policy, State
from scaler.placement.values import Goal, Problem
from scaler.placement.watch import Placed, Watch
from scaler.stopping import stop_on_signals

LINK_PORT, FUNCTION_PORT = 5051, 8080
PAGE_TIMEOUT_S, LIST_TIMEOUT_S = 2.0, 3.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Which shards, how often to look at them (`interval_s`), over what time to measure, where to show metrics."""

    function: str = "edge"
    namespace: str = "openfaas-fn"
    shards: int = 2
    prometheus: str = ""
    interval_s: float = 2.0
    window_s: float = 20.0
    metrics_port: int = 6002
    dry_run: bool = False

    @property
    def names(self) -> list[str]:
        """The functions of the shards, in the model's order, as the manifests name them."""
        return [self.function, *(f"{self.function}-shard-{n}" for n in range(1, self.shards))]


class KubernetesShards:
    """The pods of the shards; those on their way out count no more."""

    def __init__(self, api: Any, namespace: str, names: list[str]) -> None:
        self._api, self._namespace, self._names = api, namespace, names

    def shards(self) -> list[Placed]:
        """List them; raises `SourceError`."""
        try:
            found = self._api.list_namespaced_pod(
                self._namespace,
                label_selector=f"faas_function in ({','.join(self._names)})",
                resource_version="0",
                _request_timeout=LIST_TIMEOUT_S,
            )
            pods = [pod for pod in found.items if pod.metadata.deletion_timestamp is None and pod.spec.node_name]
            return [Placed(pod.spec.node_name, _address(pod.status.pod_ip or "")) for pod in pods]
        except client.ApiException as error:
            raise SourceError(f"Kubernetes does not list the pods of '{self._namespace}' ({error.status})") from error
        except (HTTPError, OSError) as error:
            raise SourceError(f"Kubernetes' API did not answer ({type(error).__name__})") from error


def _address(host: str) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{FUNCTION_PORT}" if host else ""


class Loop:
    """Looks and steps; what cannot be looked at is logged once, counted, and changes nothing."""

    def __init__(self, watch: Watch, controller: Controller, registry: CollectorRegistry) -> None:
        self._watch, self._controller = watch, controller
        self._looks = Counter("edgecascade_rebalance_looks", "Looks at the shards.", ("outcome",), registry=registry)
        self._said = ""

    def step(self, now_s: float) -> None:
        """Look once, and decide."""
        try:
            seen = self._watch.look(self._controller.state, now_s)
        except SourceError as error:
            self._looks.labels("failed").inc()
            if str(error) != self._said:
                _LOG.warning("the shards cannot be looked at, and the plan stays: %s", error)
            self._said = str(error)
            return
        self._looks.labels("answered").inc()
        self._said = ""
        self._controller.step(seen)

    def run(self, stop: threading.Event, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Step at an interval until told to stop; the next step waits for the one before."""
        while not stop.is_set():
            began_s = clock()
            self.step(began_s)
            stop.wait(max(0.0, interval_s - (clock() - began_s)))


def serve(problem: Problem, goal: Goal, policy: Policy, options: Options) -> None:
    """Keep a plan in force in Kubernetes until SIGTERM or Ctrl-C; raises `ScalerError`. For the main thread."""
    stop = stop_on_signals()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each look is too much
    registry, api = CollectorRegistry(), kubernetes_api.connect()
    names = options.names
    applier = KubernetesApplier(
        client.AppsV1Api(api), options.namespace, [Shard(name, f"{name}:{LINK_PORT}") for name in names]
    )
    controller = Controller(State(problem, place(problem, goal)), policy, applier, registry, dry_run=options.dry_run)
    wanted = trigger(options.function, options.namespace, options.window_s, options.prometheus)
    with httpx.Client(timeout=PAGE_TIMEOUT_S, trust_env=False, follow_redirects=False) as http:
        pages = PrometheusPages.of(http, wanted, names) if options.prometheus else ShardPages(http, wanted)
        watch = Watch(KubernetesShards(client.CoreV1Api(api), options.namespace, names), pages)
        server = _shown(registry, options.metrics_port)
        _LOG.info("looking at %s every %g s%s", ", ".join(names), options.interval_s, _says(options))
        Loop(watch, controller, registry).run(stop, options.interval_s)
        server.shutdown()
        server.server_close()


def _says(options: Options) -> str:
    return "; a dry run, nothing is applied" if options.dry_run else ""


def _shown(registry: CollectorRegistry, port: int) -> Any:
    try:
        server, _ = start_http_server(port, registry=registry)
    except OSError as error:
        raise SettingsError(f"--metrics-port {port} cannot be used ({error.strerror}); choose another") from error
    return server
