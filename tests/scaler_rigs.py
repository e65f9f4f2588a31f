"""What the scaler's tests share: a client made from the .proto alone, and stand-ins for whom the scaler asks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from prometheus_client.parser import text_string_to_metric_families

from scaler.replicas import Found, Replica
from scaler.server import Scaler
from scaler.settings import Settings
from scaler.values import Decision, Reading, Target

ROOT = Path(__file__).parents[1]
PROTO = "scaler/externalscaler.proto"


@cache
def compiled() -> descriptor_pb2.FileDescriptorProto:
    """The .proto file, compiled now."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        words = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT), f"--descriptor_set_out={out}", PROTO]
        subprocess.run(words, check=True)
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]


class ProtoClient:
    """Calls every method; knows the .proto file and none of our code."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        pool = descriptor_pool.DescriptorPool()
        pool.Add(compiled())
        self.service = pool.FindServiceByName("externalscaler.ExternalScaler")

    def __call__(self, method: str, request: Mapping[str, Any], timeout: float = 10.0) -> Any:
        """One answer, or for `StreamIsActive` a stream of them."""
        found = self.service.methods_by_name[method]
        sent, received = map(message_factory.GetMessageClass, (found.input_type, found.output_type))
        path = f"/{self.service.full_name}/{method}"
        made = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        call = made(path, request_serializer=sent.SerializeToString, response_deserializer=received.FromString)
        return call(sent(**request), timeout=timeout)


def reference(**metadata: str) -> dict[str, Any]:
    """A ScaledObjectRef as KEDA sends it."""
    defaults = {"scalerAddress": "scaler:6000", "function": "edge", "sloSeconds": "2", "maxReplicas": "20"}
    return {"name": "edge", "namespace": "openfaas-fn", "scalerMetadata": {**defaults, **metadata}}


@dataclass
class LittlesLaw:
    """A stand-in for capacity: arrivals × service time, and whoever is in flight."""

    target: Target

    def decide(self, reading: Reading) -> Decision:
        load = max(reading.arrivals_per_s * (reading.service_s or 0.0), reading.in_flight) / self.target.slots
        wanted = -int(-load // 1)
        return Decision(min(self.target.maximum, max(self.target.minimum, wanted)), f"{load:.2f} busy")


@dataclass
class FixedReplicas:
    """Says what it is told to."""

    found: Found = field(default_factory=lambda: Found([Replica("", ready=True)]))

    def of(self, function: str, namespace: str) -> Found:
        return self.found


@dataclass
class Page:
    """A `/metrics` page: what a function and its gateway would say."""

    started: int = 0
    answered: int = 0
    refused: int = 0
    waiting: int = 0
    inflight: int = 0
    service_s: float = 0.2
    queue_s: float = 0.09
    function: str = "edge.openfaas-fn"
    gateway: bool = True
    own: bool = True

    def text(self) -> str:
        lines = []
        if self.gateway:
            lines += [
                "# TYPE gateway_function_invocation_started counter",
                f'gateway_function_invocation_started{{function_name="{self.function}"}} {self.started}',
                'gateway_function_invocation_started{function_name="other.openfaas-fn"} 77',
                "# TYPE gateway_function_invocation_total counter",
                f'gateway_function_invocation_total{{function_name="{self.function}",code="200"}} {self.answered}',
                "# TYPE gateway_service_count gauge",
                f'gateway_service_count{{function_name="{self.function}"}} 1',
            ]
        if self.own:
            n, total = self.answered, self.service_s + self.queue_s
            site = 'node_id="n",shard_id="whole",model_version="v"'
            lines += [
                "# TYPE edgecascade_requests_total counter",
                f'edgecascade_requests_total{{{site},route="edge",reason="ok"}} {n}',
                f'edgecascade_rejections_total{{{site},code="overloaded"}} {self.refused}',
                f'edgecascade_rejections_total{{{site},code="invalid_json"}} 500',
                f'edgecascade_tokens_total{{{site},kind="completion"}} {n * 8}',
                f'edgecascade_tokens_total{{{site},kind="prompt"}} {n * 99}',
                f"edgecascade_inflight_requests{{{site}}} {self.inflight}",
                f"edgecascade_waiting_requests{{{site}}} {self.waiting}",
                f"edgecascade_request_seconds_sum{{{site}}} {n * total}",
                f"edgecascade_request_seconds_count{{{site}}} {n}",
                f"edgecascade_queue_seconds_sum{{{site}}} {n * self.queue_s}",
                f"edgecascade_queue_seconds_count{{{site}}} {n}",
            ]
            for name, seconds in (("request", total), ("prefill", self.service_s / 2), ("decode", self.service_s / 2)):
                for bound in (0.1, 0.2, 0.3, 0.5, 1.0, "+Inf"):
                    upto = n if float(bound) >= seconds else 0
                    lines.append(f'edgecascade_{name}_seconds_bucket{{{site},le="{bound}"}} {upto}')
        return "\n".join(lines) + "\n"


class _Handler(BaseHTTPRequestHandler):
    """Closes after each answer, so that a server that was stopped answers nobody."""

    def do_GET(self) -> None:
        status, body = self.server.answer(self.path)  # type: ignore[attr-defined]
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def http_server(answer: Any, port: int = 0) -> Iterator[str]:
    """Serve `answer(path) -> (status, body)` on loopback; gives its address."""
    ThreadingHTTPServer.allow_reuse_address = True
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.daemon_threads = True
    server.answer = answer  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class StandInPrometheus:
    """Answers the queries of ours as Prometheus does, from what it was told to scrape; knows no other PromQL."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[float, float]]] = {}
        self.clock_s: float | None = None
        self.kept = 8

    def now(self) -> float:
        return time.time() if self.clock_s is None else self.clock_s

    def scrape(self, text: str, **labels: str) -> None:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                # The parser puts `_total` to a counter that has none; Prometheus does not.
                name = family.name if family.name.endswith("_started") else sample.name
                key = name, tuple(sorted({**sample.labels, **labels}.items()))
                self.samples.setdefault(key, []).append((self.now(), sample.value))
                del self.samples[key][: -self.kept]

    def answer(self, path: str) -> tuple[int, str]:
        (query,) = parse_qs(urlsplit(path).query)["query"]
        if query == "time()":
            return 200, json.dumps(
                {"status": "success", "data": {"resultType": "scalar", "result": [0, str(self.now())]}}
            )
        matchers, window = re.fullmatch(r"\{(.*)\}\[(\d+)s\]", query).groups()  # type: ignore[union-attr]
        wanted = re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers)
        result = []
        for (name, labels), samples in self.samples.items():
            values = {"__name__": name, **dict(labels)}
            if all(re.fullmatch(v if op == "=~" else re.escape(v), values.get(k, "")) for k, op, v in wanted):
                kept = [[at, str(value)] for at, value in samples if at > self.now() - int(window)]
                if kept:
                    result.append({"metric": values, "values": kept})
        return 200, json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}})


@contextmanager
def running(settings: Settings, **handed: Any) -> Iterator[Scaler]:
    """A scaler for the length of a block."""
    scaler = Scaler(settings, **handed)
    scaler.start()
    try:
        yield scaler
    finally:
        scaler.stop()
