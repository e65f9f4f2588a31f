"""A stand-in for of-watchdog in HTTP mode, a program of its own: what its users have to live with, and no more.

Settings come from the environment, as the real one's. It hands SIGTERM to the child at once but goes on accepting for
`healthcheck_interval`; sends every body on in chunks; buffers an answer unless Accept names a stream; refuses with 429
above `max_inflight`; is healthy as long as there is a lock file, whatever the function does; asks `ready_path` of the
function; cuts a call that outlasts `exec_timeout`; ends with the child if that fails. `tests/test_watchdog.py` holds it
to the real one where that is installed.
"""

from __future__ import annotations

import http.client
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length", "host"}
INTERNAL = "X-OpenFaaS-Internal"
LOCK = Path(tempfile.gettempdir()) / ".lock"
_PARTS = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str, default: float) -> float:
    """Go's durations, or a whole number of seconds."""
    if text.isdigit():
        return float(text)
    return sum(float(n) * _UNITS[unit] for n, unit in _PARTS.findall(text)) if _PARTS.match(text) else default


class Watchdog:
    """The child, the counters, and whether requests are taken."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.port = int(environment.get("port", "8080"))
        self.ready_path = environment.get("ready_path", "")
        self.exec_timeout_s = seconds(environment.get("exec_timeout", ""), 30.0)
        self.write_timeout_s = seconds(environment.get("write_timeout", ""), 30.0)
        self.interval_s = seconds(environment.get("healthcheck_interval", ""), self.write_timeout_s)
        self.max_inflight = int(environment.get("max_inflight", "0"))
        self.upstream = urlsplit(environment["upstream_url"])
        self.words = environment["fprocess"].split(" ")
        self.accepting = False
        self.inflight = 0
        self.lock = threading.Lock()

    @property
    def healthy(self) -> bool:
        return self.accepting and LOCK.exists()

    @property
    def full(self) -> bool:
        return 0 < self.max_inflight <= self.inflight

    def enter(self) -> bool:
        """Take a place, if there is one."""
        with self.lock:
            if self.full:
                return False
            self.inflight += 1
            return True

    def leave(self) -> None:
        with self.lock:
            self.inflight -= 1

    def run(self) -> None:
        """Start the child and serve until SIGTERM, then drain."""
        child = subprocess.Popen(self.words)
        server = ThreadingHTTPServer(("", self.port), type("Bound", (Handler,), {"watchdog": self}))
        server.daemon_threads = True
        told = threading.Event()

        def stop(_number: int, _frame: object) -> None:
            child.send_signal(signal.SIGTERM)
            self.accepting = False
            LOCK.unlink(missing_ok=True)
            told.set()

        signal.signal(signal.SIGTERM, stop)
        threading.Thread(target=end_with, args=(child,), daemon=True).start()
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        LOCK.write_bytes(b"")
        self.accepting = True
        told.wait()
        time.sleep(self.interval_s)
        server.shutdown()
        server.server_close()
        ends = time.monotonic() + self.write_timeout_s
        while self.inflight and time.monotonic() < ends:
            time.sleep(0.01)


def end_with(child: subprocess.Popen[bytes]) -> None:
    """A child that fails takes the watchdog with it; one that ends well does not."""
    status = child.wait()
    if status:
        sys.stderr.write(f"Forked function has terminated: {status}\n")
        sys.stderr.flush()
        os._exit(1)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    watchdog: Watchdog
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/_/health":
            self._say(200 if self.watchdog.healthy else 503)
        elif path == "/_/ready":
            self._ready()
        else:
            self._limited()

    def do_POST(self) -> None:
        self._limited()

    def _ready(self) -> None:
        if not self.watchdog.healthy:
            self._say(503)
        elif self.watchdog.full:
            self._say(429)
        elif self.watchdog.ready_path:
            self._call(self.watchdog.ready_path)
        else:
            self._say(200)

    def _limited(self) -> None:
        if not self.watchdog.enter():
            list(self._body())
            self._say(429, b"Concurrent request limit exceeded.\n", {INTERNAL: "faas-middleware"})
            return
        try:
            self._call(self.path)
        finally:
            self.watchdog.leave()

    def _call(self, path: str) -> None:
        began = time.monotonic()
        accept = self.headers.get("Accept", "").lower()
        streams = "text/event-stream" in accept or "application/x-ndjson" in accept
        limit_s = min(
            self.watchdog.exec_timeout_s, seconds(self.headers.get("X-Timeout", ""), self.watchdog.exec_timeout_s)
        )
        connection = http.client.HTTPConnection(
            self.watchdog.upstream.hostname, self.watchdog.upstream.port, timeout=limit_s
        )
        try:
            answer = self._exchange(connection, path, None if streams else began + limit_s)
            if answer is None:
                return  # the caller left
            self._streamed(answer) if streams else self._whole(answer, began)
        except TimeoutError:
            self._say(504, b"", self._marks(began))
        except (OSError, http.client.HTTPException):
            self._say(500, b"", self._marks(began))
        finally:
            connection.close()

    def _exchange(
        self, connection: http.client.HTTPConnection, path: str, ends: float | None
    ) -> http.client.HTTPResponse | None:
        """Send the request on, in chunks; None if the caller leaves before it is answered."""
        kept = {key: value for key, value in self.headers.items() if key.lower() not in HOP_BY_HOP}
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if has_body:
            kept["Transfer-Encoding"] = "chunked"
        body = self._body() if has_body else None
        connection.request(self.command, path, body, kept, encode_chunked=has_body)
        while True:
            left_s = None if ends is None else max(0.0, ends - time.monotonic())
            ready, _, _ = select.select([connection.sock, self.connection], [], [], left_s)
            if connection.sock in ready:
                return connection.getresponse()
            if not ready:
                raise TimeoutError
            if self._caller_left():
                self.close_connection = True
                return None
            time.sleep(0.01)

    def _caller_left(self) -> bool:
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _whole(self, answer: http.client.HTTPResponse, began: float) -> None:
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in HOP_BY_HOP}
        body = answer.read()
        self._say(answer.status, body, {**headers, "X-Duration-Seconds": f"{time.monotonic() - began:f}"})

    def _streamed(self, answer: http.client.HTTPResponse) -> None:
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in HOP_BY_HOP:
                self.send_header(key, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(OSError):
            while piece := answer.read1(1 << 16):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
            return
        self.close_connection = True

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", "0"))
        while left:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                return
            left -= len(piece)
            yield piece

    def _marks(self, began: float) -> dict[str, str]:
        return {"X-Duration-Seconds": f"{time.monotonic() - began:f}", INTERNAL: "of-watchdog"}

    def _say(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        with suppress(OSError):
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


if __name__ == "__main__":
    Watchdog(dict(os.environ)).run()
