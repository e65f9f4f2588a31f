"""Autoscaling on this machine: the real scaler, asked over gRPC just as KEDA asks it, and the HPA's arithmetic.

KEDA: each `poll_s` it calls IsActive and GetMetrics and keeps the value for the HPA (`useCachedMetrics`);
StreamIsActive stays open (`external-push`); 0 → 1 when active, N → 0 when inactive for `cooldown_s`. The HPA looks
each `sync_s`. An error changes nothing.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families

from deploy.errors import StartError
from deploy.local.bundle import Bundle, Settings
from deploy.local.gateway_metrics import NAMESPACE, REPLICA_INFLIGHT
from deploy.local.hpa import Behaviour, Hpa
from deploy.local.plan import Command, function_command, passed_on
from deploy.local.process import Process, Sink, listen
from deploy.local.replicas import ReplicaSet, write_list
from deploy.stack import Function, Stack
from scaler import externalscaler_pb2 as wire
from scaler.errors import SourceError
from scaler.externalscaler_pb2_grpc import ExternalScalerStub
from scaler.signals.pages import PageSource
from scaler.trigger import parse

TICK_S = 0.1
RPC_TIMEOUT_S = 3.0
START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Timing:
    """Shorter than a cluster's (poll 30 s, sync 15 s, down 300 s, cool-down 300 s), so that a demonstration ends."""

    poll_s: float = 1.0
    sync_s: float = 1.0
    down_window_s: float = 30.0
    cooldown_s: float = 60.0
    scaler_poll_s: float = 0.5
    window_s: float = 10.0
    cold_start_s: float = 3.0
    record_s: float = 1.0


@dataclass(frozen=True)
class Autoscale:
    """Which functions, what they hold, between how many replicas; `record` gets a line of JSON each second."""

    functions: tuple[str, ...]
    slo_s: float = 2.0
    percentile: float = 0.95
    minimum: int = 1
    maximum: int = 5
    timing: Timing = field(default_factory=Timing)
    record: Path | None = None


@dataclass
class Scaled:
    """One function under KEDA: what the scaler last said of it."""

    replicas: ReplicaSet
    hpa: Hpa
    reference: wire.ScaledObjectRef
    metric: str
    value: float | None = None
    active: bool = False
    fault: str = ""
    last_active_s: float = -math.inf
    pushed: threading.Event = field(default_factory=threading.Event)


class Autoscaler:
    """The loop. It runs in the thread that calls `run`, to which the replicas are tied."""

    def __init__(
        self, scaled: list[Scaled], options: Autoscale, stub: ExternalScalerStub, look: Look, out: Out
    ) -> None:
        self._scaled = scaled
        self._options = options
        self._stub = stub
        self._look = look
        self._out = out
        self._next_poll_s = self._next_sync_s = self._next_record_s = -math.inf
        self._listed: list[list[dict[str, str]]] | None = None

    def run(self, stop: threading.Event, clock: Callable[[], float] = time.monotonic) -> None:
        """Step until told to stop, then stop every replica."""
        streams = [self._open_stream(one) for one in self._scaled]
        try:
            while not stop.is_set():
                self.step(clock())
                stop.wait(TICK_S)
        finally:
            for stream in streams:
                stream.cancel()
            for one in self._scaled:
                one.replicas.kill()

    def step(self, now_s: float) -> None:
        """One tick: ask if it is time, scale if it is time, let the replicas follow."""
        if now_s >= self._next_poll_s or any(one.pushed.is_set() for one in self._scaled):
            for one in self._scaled:
                one.pushed.clear()
                self._poll(one, now_s)
            self._next_poll_s = now_s + self._options.timing.poll_s
        if now_s >= self._next_sync_s:
            for one in self._scaled:
                self._sync(one, now_s)
            self._next_sync_s = now_s + self._options.timing.sync_s
        inflight = self._look.inflight()
        for one in self._scaled:
            one.replicas.step(now_s, inflight)
        self._write()
        if now_s >= self._next_record_s:
            self._record(now_s)
            self._next_record_s = now_s + self._options.timing.record_s

    def _poll(self, one: Scaled, now_s: float) -> None:
        """What KEDA does: activity and value; it scales between 0 and 1 itself."""
        request = wire.GetMetricsRequest(scaledObjectRef=one.reference, metricName=one.metric)
        try:
            one.active = self._stub.IsActive(one.reference, timeout=RPC_TIMEOUT_S).result
            (metric,) = self._stub.GetMetrics(request, timeout=RPC_TIMEOUT_S).metricValues
            one.value, one.fault = metric.metricValueFloat or float(metric.metricValue), ""
        except grpc.RpcError as error:
            self._failed(one, error)
            return
        if one.active:
            one.last_active_s = now_s
        if one.active and one.replicas.wanted == 0:
            self._scale(one, max(1, self._options.minimum), "woken: it is active")
        elif not one.active and one.replicas.wanted > 0 and self._options.minimum == 0:
            if one.last_active_s == -math.inf:
                one.last_active_s = now_s
            if now_s - one.last_active_s >= self._options.timing.cooldown_s:
                self._scale(one, 0, f"inactive for {self._options.timing.cooldown_s:g} s")

    def _sync(self, one: Scaled, now_s: float) -> None:
        """What the HPA does; it sleeps at zero replicas, and without a value."""
        if one.replicas.wanted == 0 or one.value is None or one.fault:
            return
        desired = one.hpa.desired(now_s, one.replicas.current, one.value)
        if desired != one.replicas.wanted:
            self._scale(one, desired, f"the scaler asks for {one.value:g}")

    def _scale(self, one: Scaled, wanted: int, why: str) -> None:
        self._out.say(f"{one.replicas.name}: {one.replicas.wanted} → {wanted} replicas ({why})")
        one.replicas.wanted = wanted

    def _failed(self, one: Scaled, error: grpc.RpcError) -> None:
        code, details = error.code(), error.details()
        if one.fault != code.name:
            self._out.say(f"{one.replicas.name}: the scaler says {code.name}, {details}; its replicas stay")
        one.fault = code.name

    def _open_stream(self, one: Scaled) -> Stream:
        stream = Stream(self._stub, one)
        stream.start()
        return stream

    def _write(self) -> None:
        listed = [one.replicas.listed() for one in self._scaled]
        if listed != self._listed:
            write_list(self._look.listing, [one.replicas for one in self._scaled])
            self._listed = listed

    def _record(self, now_s: float) -> None:
        for one in self._scaled:
            line = {
                "time_s": round(now_s, 3),
                "function": one.replicas.name,
                "wanted": one.replicas.wanted,
                "replicas": one.replicas.current,
                "ready": one.replicas.ready,
                "value": one.value,
                "fault": one.fault,
                **self._look.gauges(one.replicas.name, now_s),
            }
            self._out.record(json.dumps(line))


class Stream(threading.Thread):
    """StreamIsActive, opened again whenever it breaks; wakes the loop at each push."""

    def __init__(self, stub: ExternalScalerStub, one: Scaled) -> None:
        super().__init__(name=f"push-{one.replicas.name}", daemon=True)
        self._stub = stub
        self._one = one
        self._cancelled = threading.Event()
        self._call: grpc.Call | None = None

    def run(self) -> None:
        """Follow the stream."""
        while not self._cancelled.is_set():
            with suppress(grpc.RpcError):
                call = self._stub.StreamIsActive(self._one.reference)
                self._call = call
                for _ in call:
                    self._one.pushed.set()
            self._cancelled.wait(1.0)

    def cancel(self) -> None:
        """End it."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()
        self.join()


class Look:
    """What the gateway's page says, for draining and for the record."""

    def __init__(self, listing: Path, page: str, options: Autoscale) -> None:
        self.listing = listing
        self._page = page
        self._percentile = options.percentile
        self._client = httpx.Client(trust_env=False, timeout=2.0)
        metadata = {"sloSeconds": "1", "metricsAddress": page, "windowSeconds": "5"}
        self._sources = {
            name: PageSource(self._client, parse({**metadata, "function": name}, NAMESPACE))
            for name in options.functions
        }

    def inflight(self) -> Mapping[str, int]:
        """Requests at each replica; while the gateway does not answer, one at each that was ever asked for."""
        try:
            text = self._client.get(self._page).text
        except httpx.TransportError:
            return _Everywhere()
        families = text_string_to_metric_families(text)
        return {s.labels["address"]: int(s.value) for f in families if f.name == REPLICA_INFLIGHT for s in f.samples}

    def gauges(self, function: str, now_s: float) -> dict[str, float | None]:
        """Requests in flight, and the latency at the percentile over the last five seconds."""
        try:
            window = self._sources[function].read([], now_s)
        except SourceError:
            return {"in_flight": None, "latency_ms": None}
        started = window.latest("gateway_function_invocation_started") or 0.0
        latency_s = window.buckets("gateway_functions_seconds").quantile(self._percentile)
        return {
            "in_flight": started - (window.latest("gateway_function_invocation_total") or 0.0),
            "latency_ms": None if latency_s is None else round(1000 * latency_s, 1),
        }


class _Everywhere(dict[str, int]):
    """Something everywhere: nobody is stopped on a guess."""

    def get(self, _address: str, _default: object = None) -> int:
        return 1


@dataclass(frozen=True)
class Out:
    """Where sentences and records go."""

    sink: Sink
    file: TextIO | None = None

    def say(self, text: str) -> None:
        """One sentence for people."""
        self.sink("autoscale", text)

    def record(self, line: str) -> None:
        """One line of the recording."""
        if self.file is not None:
            self.file.write(line + "\n")
            self.file.flush()


@contextmanager
def autoscaled(
    stack: Stack, settings: Settings, options: Autoscale, sink: Sink, ended: Callable[[], None] = lambda: None
) -> Iterator[tuple[Bundle, Running]]:
    """Run the bundle, some of its functions under the autoscaler; `ended` is called when that ends by itself too.

    Enter it in a thread that lives as long as the block. Raises `StackError` and `StartError`.
    """
    stack.only(options.functions)
    rest = replace(stack, functions={n: f for n, f in stack.functions.items() if n not in options.functions})
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="edgecascade-")))
        listing, metrics_port = folder / "replicas.json", _free_port()
        listing.write_text(json.dumps({name: {"replicas": []} for name in options.functions}))
        gateway = {"GATEWAY_REPLICAS": str(listing), "GATEWAY_METRICS_PORT": str(metrics_port)}
        bundle = Bundle(rest, replace(settings, gateway_environment=gateway), sink)
        closing.enter_context(bundle)
        stub = closing.enter_context(_scaler(settings, listing, options, sink))
        record = closing.enter_context(options.record.open("w", encoding="utf-8")) if options.record else None
        page = f"http://127.0.0.1:{metrics_port}/metrics"
        scaled = [
            _scaled(stack.functions[name], bundle, settings, options, page, stub, sink) for name in options.functions
        ]
        autoscaler = Autoscaler(scaled, options, stub, Look(listing, page, options), Out(sink, record))
        running = Running(autoscaler, ended)
        running.start()
        try:
            yield bundle, running
        finally:
            running.stop()


class Running(threading.Thread):
    """The loop in a thread of its own; `failure` is what ended it, if anything did."""

    def __init__(self, autoscaler: Autoscaler, ended: Callable[[], None]) -> None:
        super().__init__(name="autoscale", daemon=True)
        self._autoscaler = autoscaler
        self._ended = ended
        self._stop_event = threading.Event()
        self.failure: Exception | None = None

    def run(self) -> None:
        """Loop."""
        try:
            self._autoscaler.run(self._stop_event)
        except Exception as error:  # noqa: BLE001  # whoever started it asks for it
            self.failure = error
        self._ended()

    def stop(self) -> None:
        """End it and its replicas."""
        self._stop_event.set()
        self.join()


def _scaled(
    function: Function,
    bundle: Bundle,
    settings: Settings,
    options: Autoscale,
    page: str,
    stub: ExternalScalerStub,
    sink: Sink,
) -> Scaled:
    def spawn(name: str) -> tuple[Process, str]:
        listener = listen()
        port = int(listener.getsockname()[1])
        command = function_command(function, bundle.ports, bundle.port, settings.site, settings.inherited)
        return Process(replace(command, name=name), listener, settings.site.root, sink), f"http://127.0.0.1:{port}"

    timing = options.timing
    metadata = {
        "function": function.name,
        "sloSeconds": str(options.slo_s),
        "percentile": str(options.percentile),
        "minReplicas": str(options.minimum),
        "maxReplicas": str(options.maximum),
        "slots": function.environment.get("MAX_INFLIGHT", "1"),
        "coldStartSeconds": str(timing.cold_start_s),
        "windowSeconds": str(timing.window_s),
        "metricsAddress": "replicas",
        "gatewayAddress": page,
    }
    reference = wire.ScaledObjectRef(name=function.name, namespace=NAMESPACE, scalerMetadata=metadata)
    replicas = ReplicaSet(function.name, spawn, settings.stop_timeout_s, lambda text: sink("autoscale", text))
    replicas.wanted = options.minimum
    hpa = Hpa(max(1, options.minimum), options.maximum, Behaviour(down_window_s=timing.down_window_s))
    (spec,) = stub.GetMetricSpec(reference, timeout=RPC_TIMEOUT_S).metricSpecs
    return Scaled(replicas, hpa, reference, spec.metricName)


@contextmanager
def _scaler(settings: Settings, listing: Path, options: Autoscale, sink: Sink) -> Iterator[ExternalScalerStub]:
    """The scaler's own process, answering."""
    port = _free_port()
    environment = {
        **passed_on(settings.inherited),
        "SCALER_HOST": "127.0.0.1",
        "SCALER_PORT": str(port),
        "SCALER_METRICS_PORT": "0",
        "SCALER_REPLICAS": str(listing),
        "SCALER_POLL_MS": str(round(1000 * options.timing.scaler_poll_s)),
    }
    command = Command("scaler", (sys.executable, "-m", "edgecascade", "scaler"), environment)
    process = Process(command, None, settings.site.root, sink)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=START_TIMEOUT_S)
            except grpc.FutureTimeoutError as error:
                raise StartError(f"the scaler did not answer within {START_TIMEOUT_S:.0f} s; see its log") from error
            yield ExternalScalerStub(channel)  # type: ignore[no-untyped-call]
    finally:
        process.ask_to_stop()
        process.wait(settings.stop_timeout_s)


def _free_port() -> int:
    with listen() as listener:
        return int(listener.getsockname()[1])
