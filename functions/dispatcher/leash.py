"""Hold one exchange on a leash: it ends at its time however the bytes trickle, and at once when it is cut.

httpx bounds each read by itself, so that a tier that sends a byte now and then is waited for without end; and it has
no way to end a request from another thread. Both need the connection, which httpcore hands out through its network
backend (https://www.encode.io/httpcore/network-backends/).
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpcore
import httpx

_PACKET_BYTES = 16_384
_held = threading.local()


class Leash:
    """One exchange's. `expires` is on the monotonic clock."""

    def __init__(self, expires: float) -> None:
        self.expires = expires
        self._lock = threading.Lock()
        self._cut = False
        self._connection: socket.socket | None = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """What this thread sends and receives inside of the block is held."""
        before, _held.leash = getattr(_held, "leash", None), self
        try:
            yield
        finally:
            _held.leash = before
            self.attach(None)

    def cut(self) -> None:
        """End the exchange now, from any thread: its connection is closed, which the tier notices."""
        with self._lock:
            self._cut = True
            if self._connection is not None:
                with suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)

    @property
    def is_cut(self) -> bool:
        """Whether somebody ended it."""
        return self._cut

    def attach(self, connection: socket.socket | None) -> None:
        """This is the connection in use; raises `httpcore.ReadError` if the exchange was cut before."""
        with self._lock:
            self._connection = connection
            if self._cut and connection is not None:
                raise httpcore.ReadError("cut")

    def left_s(self, timeout_s: float | None) -> float:
        """The time for one more read or write; raises `httpcore.ReadTimeout` where there is none."""
        left_s = self.expires - time.monotonic()
        if left_s <= 0:
            raise httpcore.ReadTimeout("the time is up")
        return left_s if timeout_s is None else min(timeout_s, left_s)


class LeashedTransport(httpx.HTTPTransport):
    """httpx's own transport over connections that keep to the leash of the thread that uses them."""

    def __init__(self, limits: httpx.Limits, verify: ssl.SSLContext | bool = True) -> None:
        super().__init__(verify=verify, trust_env=False)
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(verify=verify, trust_env=False),
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_Backend(),
        )


class _Backend(httpcore.NetworkBackend):
    def __init__(self) -> None:
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect; the name is looked up by the system, which keeps to no time."""
        leash: Leash | None = getattr(_held, "leash", None)
        left_s = leash.left_s(timeout) if leash else timeout  # a socket refuses a time below 0, and would be left open
        return _Stream(self._plain.connect_tcp(host, port, left_s, local_address, socket_options))


class _Stream(httpcore.NetworkStream):
    """Head and body of a small request go out as one packet: what is written waits for the next read."""

    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner
        self._unsent = b""

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with suppress(httpcore.WriteError):  # the other side may have answered before it closed
            self._flush(timeout)
        return self._inner.read(max_bytes, self._time(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._unsent += buffer
        if len(self._unsent) > _PACKET_BYTES:
            self._flush(timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, self._time(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def _flush(self, timeout: float | None) -> None:
        unsent, self._unsent = self._unsent, b""
        if unsent:
            self._inner.write(unsent, self._time(timeout))

    def _time(self, timeout: float | None) -> float | None:
        leash: Leash | None = getattr(_held, "leash", None)
        if leash is None:
            return timeout
        leash.attach(self._inner.get_extra_info("socket"))
        return leash.left_s(timeout)
