"""The gateway of a local bundle; it behaves like OpenFaaS CE's, so that what works here works there.

`/function/NAME/PATH` goes to the function, `/v1/*`, `POST /`, `/healthz` and `/openapi.json` to the dispatcher.
As the real one it sends bodies on in chunks, adds X-Call-Id and X-Start-Time, buffers every answer, and streams only
where Accept starts with `text/event-stream`. Of a function with several replicas the least busy one gets a request;
while there is none (scaled to zero), requests are held.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from prometheus_client import start_http_server
from werkzeug.datastructures import Headers
from werkzeug.wrappers import Request, Response

from deploy.errors import StackError
from deploy.local.balance import Balance, Place
from deploy.local.gateway_metrics import GatewayMetrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
        "upgrade", "host", "content-length", "expect",
    }
)  # fmt: skip
CHUNK_BYTES = 64 * 1024
_NO_WORD = "without sending a response"
"""How httpcore tells a connection that was closed from an answer that is none."""


@dataclass(frozen=True)
class Config:
    """Where each function listens (name → address), and the bounds of a request.

    `replicas` is the list of functions with several replicas or none (see `balance`); metrics are shown on a port of
    their own, as the real gateway's, for requests that wait may take up all threads of the other.
    """

    routes: Mapping[str, str]
    replicas: Path | None = None
    metrics_port: int | None = None
    front: str = "dispatcher"
    timeout_s: float = 60.0
    connect_timeout_s: float = 2.0
    max_body_bytes: int = 16 * 1024 * 1024
    max_discard_bytes: int = 64 * 1024 * 1024

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Config:
        """Read `GATEWAY_ROUTES`, `name=http://…` parted by commas, and its siblings; raises `StackError`."""
        routes = {}
        for part in filter(None, environment.get("GATEWAY_ROUTES", "").split(",")):
            name, _, address = part.partition("=")
            if not name or not address.startswith(("http://", "https://")):
                raise StackError(f"GATEWAY_ROUTES: '{part}' is not name=http://address")
            routes[name] = address
        replicas, port = environment.get("GATEWAY_REPLICAS"), environment.get("GATEWAY_METRICS_PORT")
        return cls(routes, Path(replicas) if replicas else None, int(port) if port else None)


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """An answer that the gateway gives itself."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class _SilentError(Exception):
    """The connection was closed before the head of an answer came."""

    def __init__(self, cause: httpx.TransportError) -> None:
        super().__init__()
        self.cause = cause


class Gateway:
    """A WSGI application in front of the functions."""

    def __init__(self, config: Config, client: httpx.Client, balance: Balance, metrics: GatewayMetrics) -> None:
        self._config = config
        self._client = client
        self._balance = balance
        self._metrics = metrics

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Forward one request."""
        request = Request(environ)
        trace = {
            "X-Call-Id": request.headers.get("X-Call-Id") or str(uuid.uuid4()),
            "X-Start-Time": str(time.time_ns()),
        }
        try:
            response = self._forward(request, trace)
        except Refusal as refusal:
            response = _refuse(refusal)
        response.headers.update(trace)
        return response(environ, start_response)

    def _forward(self, request: Request, trace: Mapping[str, str]) -> Response:
        name, path = self._target(request)
        names = self._balance.names()
        if name not in names:
            known = ", ".join(names) or "none"
            raise Refusal(404, "function_not_found", f"function '{name}' is not deployed here; deployed: {known}")
        began_s = time.perf_counter()
        self._metrics.exist(names)
        self._metrics.started(name)
        status = 500
        try:
            response = self._ask(name, path, request, trace)
            status = response.status_code
        except Refusal as refusal:
            status = refusal.status
            raise
        finally:
            streams = status == HTTPStatus.OK and _wants_stream(request)
            if not streams:
                self._metrics.ended(name, status, time.perf_counter() - began_s)
        if streams:
            response.call_on_close(lambda: self._metrics.ended(name, status, time.perf_counter() - began_s))
        return response

    def _ask(self, name: str, path: str, request: Request, trace: Mapping[str, str]) -> Response:
        """Ask a replica; one that takes no connection was not asked, so that another may be.

        One that closes the connection before the head of its answer is asked once more, by a new connection: it may
        have been closing just then. The functions answer the same question twice without harm.
        """
        body = self._body(request)
        headers = [*_passed_on(request.headers.items()), *trace.items(), ("X-Forwarded-Host", request.host)]
        refused: dict[str, httpx.TransportError] = {}
        silent: set[str] = set()
        while True:
            place = self._balance.place(name, self._config.timeout_s, frozenset(refused))
            if place is None:
                raise _nobody(name, next(iter(refused.values()), None))
            content = _chunks(body) if body else None
            sent = self._client.build_request(request.method, place.address + path, headers=headers, content=content)
            try:
                return self._send(name, sent, place, streams=_wants_stream(request))
            except httpx.ConnectError as error:
                refused[place.address] = error
            except _SilentError as error:
                if place.address in silent:
                    refused[place.address] = error.cause
                silent.add(place.address)

    def _send(self, name: str, sent: httpx.Request, place: Place, *, streams: bool) -> Response:
        """One exchange; the place is free when the answer has been passed on.

        Raises `httpx.ConnectError`, or `_SilentError`.
        """
        kept = False
        try:
            answer = self._begin(sent)
            if streams:
                response = _streamed(answer)
                response.call_on_close(place.free)
                kept = True
                return response
            return _buffered(answer)
        except httpx.ConnectError:
            raise
        except httpx.TimeoutException as error:
            raise Refusal(
                504, "timeout", f"function '{name}' did not answer in {self._config.timeout_s:.0f} s"
            ) from error
        except httpx.TransportError as error:
            raise _unreachable(name) from error
        finally:
            if not kept:
                place.free()

    def _begin(self, sent: httpx.Request) -> httpx.Response:
        """Send the request and read the answer's head; raises `_SilentError` if the connection closes before that."""
        try:
            return self._client.send(sent, stream=True)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
            if isinstance(error, httpx.RemoteProtocolError) and _NO_WORD not in str(error):
                raise
            raise _SilentError(error) from error

    def _target(self, request: Request) -> tuple[str, str]:
        """Which function, and the path and query it sees."""
        path = request.environ.get("RAW_URI") or request.full_path.rstrip("?")
        bare = path.partition("?")[0]
        if bare.startswith("/function/"):
            name, slash, rest = path.removeprefix("/function/").partition("/")
            name, question, query = name.partition("?")
            return name, f"/{rest}" if slash else f"/{question}{query}"
        front = (
            bare.startswith("/v1/")
            or bare in {"/healthz", "/openapi.json"}
            or (bare == "/" and request.method == "POST")
        )
        if not front:
            hint = "use /function/NAME, /v1/…, POST /, /healthz or /openapi.json"
            raise Refusal(404, "not_found", f"{request.method} {bare} is not known; {hint}")
        return self._config.front, path

    def _body(self, request: Request) -> bytes:
        """The whole body; one over the bound is read to its end (up to a bound), else the client never sees why."""
        limit = self._config.max_body_bytes
        parts: list[bytes] = []
        size = 0
        while chunk := request.stream.read(CHUNK_BYTES):
            size += len(chunk)
            if size <= limit:
                parts.append(chunk)
            elif size > self._config.max_discard_bytes:
                break
        if size > limit:
            raise Refusal(413, "body_too_large", f"the body has more than {limit} bytes; send a smaller one")
        return b"".join(parts)


def _unreachable(name: str) -> Refusal:
    return Refusal(502, "function_unreachable", f"function '{name}' cannot be reached; look at its log")


def _nobody(name: str, cause: httpx.TransportError | None) -> Refusal:
    if cause is None:
        return Refusal(503, "no_replica", f"no replica of function '{name}' got ready in time; look at its log")
    refusal = _unreachable(name)
    refusal.__cause__ = cause
    return refusal


def _wants_stream(request: Request) -> bool:
    return request.headers.get("Accept", "").startswith("text/event-stream")


def _passed_on(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        (k, v) for k, v in headers if k.lower() not in HOP_BY_HOP and k.lower() not in {"x-call-id", "x-start-time"}
    ]


def _chunks(body: bytes) -> Iterator[bytes]:
    """An iterator has no length, so httpx sends it chunked, as the real gateway does."""
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]


def _streamed(answer: httpx.Response) -> Response:
    """Pass on each piece as it comes; closing the response frees the function at once."""

    def pieces() -> Iterator[bytes]:
        try:
            yield from answer.iter_raw()
        finally:
            answer.close()

    response = Response(pieces(), answer.status_code, Headers(_passed_on(answer.headers.multi_items())))
    response.call_on_close(answer.close)
    return response


def _buffered(answer: httpx.Response) -> Response:
    try:
        body = b"".join(answer.iter_raw())
    finally:
        answer.close()
    return Response(body, answer.status_code, Headers(_passed_on(answer.headers.multi_items())))


def _refuse(refusal: Refusal) -> Response:
    error = {"message": str(refusal), "type": "gateway_error", "code": refusal.kind, "param": None}
    headers = {"Content-Type": "application/json", "X-OpenFaaS-Internal": "gateway"}
    return Response(json.dumps({"error": error}), refusal.status, headers)


def create_app(config: Config | None = None) -> WSGIApplication:
    """Wire the gateway; reads the environment if no config is given."""
    config = config or Config.from_environment(os.environ)
    client = httpx.Client(
        timeout=httpx.Timeout(config.timeout_s, connect=config.connect_timeout_s),
        # Functions keep idle connections for 75 s: let go before they do, or a request meets a closing one.
        limits=httpx.Limits(max_connections=512, max_keepalive_connections=64, keepalive_expiry=30.0),
        trust_env=False,
    )
    balance = Balance(config.routes, config.replicas)
    metrics = GatewayMetrics(balance.inflight)
    metrics.exist(balance.names())
    if config.metrics_port is not None:
        start_http_server(config.metrics_port, "127.0.0.1", metrics.registry)
    return Gateway(config, client, balance, metrics)
