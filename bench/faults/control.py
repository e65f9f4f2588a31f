"""`edgecascade bench faults`: a fault proxy of its own process, told over HTTP what to do.

GET gives what was counted. PUT takes `{"both": {…}}`, `{"up": {…}, "down": {…}}`, `{"stop": true}` or
`{"resume": true}`; what is not named passes without a fault.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from bench.errors import BenchError
from bench.faults.proxy import HOST, FaultProxy
from bench.faults.values import NO_FAULTS, Faults

_MOST_BYTES = 1 << 16
_KEYS = {"both", "up", "down", "stop", "resume"}


def parse(text: str) -> Mapping[str, Any]:
    """Read a JSON object; raises `BenchError`."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise BenchError('the faults are no JSON object; example: {"both": {"latency_ms": 50}}')
    return values


def tell(proxy: FaultProxy, orders: Mapping[str, Any]) -> None:
    """Do what the orders say; raises `BenchError` naming what is wrong with them, and then does nothing."""
    unknown = set(orders) - _KEYS
    if unknown:
        raise BenchError(f"there is no fault '{min(unknown)}' here; use {', '.join(sorted(_KEYS))}")
    faults = {way: Faults.of(orders[way]) for way in ("both", "up", "down") if way in orders}
    if orders.get("stop"):
        proxy.stop()
    elif orders.get("resume"):
        proxy.resume()
    else:
        proxy.set(faults.get("both", NO_FAULTS), up=faults.get("up"), down=faults.get("down"))


def control(proxy: FaultProxy, port: int = 0) -> ThreadingHTTPServer:
    """A server that passes orders on; whoever calls runs `serve_forever`. Raises `BenchError` for a taken port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200, asdict(proxy.traffic))

        def do_PUT(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            try:
                tell(proxy, parse(self.rfile.read(min(size, _MOST_BYTES)).decode("utf-8", "replace")))
            except BenchError as error:
                self._say(422, {"error": str(error)})
            else:
                self._say(200, asdict(proxy.traffic))

        def _say(self, status: int, values: Mapping[str, Any]) -> None:
            data = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise BenchError(f"port {port} cannot be used ({error.strerror}); choose another") from error


def serve(target: str, port: int, control_port: int, orders: Mapping[str, Any], seed: int) -> None:
    """Run a proxy and its control until Ctrl-C; raises `BenchError`."""
    parts = urlsplit(target)
    if parts.scheme != "http" or not parts.hostname:
        raise BenchError("the target must look like http://host:port")
    proxy = FaultProxy(target, port=port, seed=seed)
    tell(proxy, orders)
    with proxy, control(proxy, control_port) as server:
        print(f"{proxy.url} goes to {target}; orders: PUT http://{HOST}:{server.server_address[1]}", flush=True)
        server.serve_forever()
