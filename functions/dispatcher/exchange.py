"""HTTP/1.1 requests that never block: several at once in one thread, each ended by closing its socket.

httptools (llhttp) reads what comes, this module moves the bytes. Whoever owns an `Exchange` polls its socket for
`interest` and calls `advance` when something may have happened; nothing else here waits, but for the first look-up of a
host's name.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from functions.serving.events import NetworkBytes

_READ_BYTES = 1 << 16
_HEAD_BYTES = 1 << 16
_FINAL = 200
"""Status codes below are no answer yet."""
_FRAMING = frozenset({"content-length", "transfer-encoding"})
_FETCHED_BYTES = 1 << 20
_IDLE_S = 30.0
_FRESH_S = 30.0
_ON_ITS_WAY = frozenset({0, errno.EINPROGRESS})
_LOOK_UP_S = 0.25
"""How long the first look-up of a host's name is waited for."""
Address = tuple[int, Any]  # family, and what `connect` takes


class UnreachedError(Exception):
    """There was no connection: nothing of the request was sent."""


class BrokenError(Exception):
    """The connection was lost, or what came over it is not HTTP."""


@dataclass(frozen=True)
class Url:
    """Where a function is: parts of its address; `path` without a closing slash."""

    host: str
    port: int
    path: str
    is_secure: bool

    @classmethod
    def of(cls, text: str) -> Url:
        """Take an http(s) address apart."""
        parts = urlsplit(text)
        is_secure = parts.scheme == "https"
        return cls(parts.hostname or "", parts.port or (443 if is_secure else 80), parts.path, is_secure)

    @property
    def authority(self) -> str:
        """As the `Host` header has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Names:
    """The addresses of one host, looked up in the background and kept for a while; the old ones if that fails."""

    def __init__(self, host: str, port: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._port, self._clock = host, port, clock
        self._lock = threading.Lock()
        self._known: list[Address] = []
        self._asked = -_FRESH_S
        self._answered = threading.Event()

    def addresses(self, timeout_s: float) -> list[Address]:
        """What is known; only the first look-up is waited for. Raises `UnreachedError` where there is nothing."""
        with self._lock:
            due = self._clock() - self._asked >= (_FRESH_S if self._known else 1.0)
            if due:
                self._asked = self._clock()
                self._answered.clear()
        if due:
            threading.Thread(target=self._look_up, name="names", daemon=True).start()
        if not self._known:
            self._answered.wait(timeout_s)
        if not self._known:
            raise UnreachedError
        return self._known

    def _look_up(self) -> None:
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self._known = [(family, address) for family, _, _, _, address in found]
        except OSError:
            pass
        finally:
            self._answered.set()


@dataclass(eq=False)
class _Link:
    """One connection. `idle_since` on the pool's clock while nobody uses it."""

    sock: socket.socket
    is_new: bool = True
    idle_since: float = 0.0

    def close(self) -> None:
        self.sock.close()

    @property
    def is_quiet(self) -> bool:
        """True while the other side has neither closed it nor said anything unasked."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)


def _close_all(links: deque[_Link]) -> None:
    while links:
        links.pop().close()


class Pool:
    """Connections to one function that are kept alive, the one used last first. Safe to use from several threads.

    `headers` go with every request; `trusted` says whose certificates it may have, None: the system's authorities.
    """

    def __init__(
        self,
        url: Url,
        most_idle: int = 64,
        clock: Callable[[], float] = time.monotonic,
        headers: Mapping[str, str] | None = None,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        self.url = url
        self.headers = headers or {}
        self._clock = clock
        self._names = Names(url.host, url.port)
        self._idle: deque[_Link] = deque(maxlen=most_idle)
        self._tls = threading.Lock(), [trusted] if trusted else []
        weakref.finalize(self, _close_all, self._idle)

    def take(self) -> _Link | None:
        """A connection that is open, or None."""
        while True:
            try:
                link = self._idle.pop()
            except IndexError:
                return None
            if self._clock() - link.idle_since < _IDLE_S and link.is_quiet:
                return link
            link.close()

    def give(self, link: _Link) -> None:
        """Keep a connection whose exchange is over, as far as there is room."""
        link.is_new, link.idle_since = False, self._clock()
        if len(self._idle) == self._idle.maxlen:
            link.close()
        else:
            self._idle.append(link)

    def addresses(self, timeout_s: float) -> list[Address]:
        """Where to connect to; raises `UnreachedError`."""
        return self._names.addresses(timeout_s)

    def secured(self, plain: socket.socket) -> socket.socket:
        """The socket under TLS, where the address says so; its handshake is yet to come."""
        if not self.url.is_secure:
            return plain
        lock, made = self._tls
        with lock:
            if not made:
                made.append(ssl.create_default_context())
        return made[0].wrap_socket(plain, server_hostname=self.url.host, do_handshake_on_connect=False)


def _connecting(addresses: MutableSequence[Address]) -> _Link:
    """Begin to connect to the first address that allows it, taking it out of the list; raises `UnreachedError`."""
    while addresses:
        family, address = addresses.pop(0)
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)  # noqa: FBT003  # the standard library's signature
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if made.connect_ex(address) in _ON_ITS_WAY:
            return _Link(made)
        made.close()
    raise UnreachedError


@dataclass
class Traffic:
    """What one exchange cost: seconds on the wall, bytes that crossed the socket, as HTTP has them."""

    seconds: float = 0.0
    sent: int = 0
    received: int = 0

    @property
    def bytes(self) -> NetworkBytes:
        """As the reply reports it."""
        return NetworkBytes(sent=self.sent, received=self.received)


@dataclass
class Head:
    """A response's first lines; header names in small letters."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


class _Response:
    """Reads one response; raises `BrokenError`. The parser calls the methods that begin with `on_`."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.body = bytearray()
        self.is_over = self.keeps_alive = False
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._head_bytes = 0

    def feed(self, data: bytes) -> None:
        """Take in what came; nothing: the other side has closed the connection."""
        if not data:
            self._close()
            return
        if self.head is None:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, UnicodeDecodeError) as error:
            if not self.is_over:
                raise BrokenError from error
            self.keeps_alive = False
        if self.head is None and self._head_bytes > _HEAD_BYTES:
            raise BrokenError

    def _close(self) -> None:
        """The end of a body whose length nobody told, or a response that broke off."""
        if self.head is None or not self.head.headers.keys().isdisjoint(_FRAMING):
            raise BrokenError
        self.is_over = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= _FINAL and self.head is None:
            self.head = Head(status, self._headers)
        self._headers = {}

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        if self.head is not None and not self.is_over:
            self.is_over, self.keeps_alive = True, self._parser.should_keep_alive()

    def on_message_begin(self) -> None:
        if self.is_over:  # something nobody asked for follows
            self.keeps_alive = False


class Exchange:
    """One request and its response.

    `advance` raises `UnreachedError` or `BrokenError`; the exchange is closed then.
    """

    def __init__(self, pool: Pool, link: _Link, request: bytes, rest: Sequence[Address]) -> None:
        self._pool = pool
        self._link: _Link | None = link
        self._request = request
        self._addresses = list(rest)
        self._step: Callable[[], bool] = self._connected if link.is_new else self._send
        self._blocked, self._wants_write = False, True
        self._out = memoryview(request)
        self._response = _Response()
        self.traffic = Traffic()

    @classmethod
    def begin(cls, pool: Pool, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Exchange:
        """Take a connection or begin to make one; raises `UnreachedError`. Nothing is sent before `advance`.

        Method, path and headers are our own words: nothing in them comes from a caller.
        """
        lines = [f"{method} {pool.url.path}{path} HTTP/1.1", f"Host: {pool.url.authority}"]
        lines += [f"{name}: {value}" for name, value in {**pool.headers, **headers}.items()]
        request = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode("ascii") + body
        link = pool.take()
        if link is not None:
            return cls(pool, link, request, ())
        addresses = list(pool.addresses(_LOOK_UP_S))
        return cls(pool, _connecting(addresses), request, addresses)

    @property
    def head(self) -> Head | None:
        """The response's first lines, once they have come."""
        return self._response.head

    @property
    def body(self) -> bytearray:
        """What came of the response's body and was not taken."""
        return self._response.body

    def take_body(self) -> bytes:
        """The body's bytes that have come since the last time."""
        taken = bytes(self.body)
        self.body.clear()
        return taken

    @property
    def is_over(self) -> bool:
        """Whether the whole response is there."""
        return self._response.is_over

    @property
    def sock(self) -> socket.socket:
        """What to poll. It changes while a connection is made: ask anew each time."""
        assert self._link is not None, "the exchange is closed"  # noqa: S101  # a bug, not bad input
        return self._link.sock

    @property
    def is_connected(self) -> bool:
        """True once the other side has taken the connection."""
        return self._step in {self._send, self._receive}

    @property
    def interest(self) -> int:
        """Which of `select.POLLIN` and `POLLOUT` to poll for."""
        return select.POLLOUT if self._wants_write else select.POLLIN

    def advance(self) -> None:
        """Do what can be done without waiting."""
        try:
            while self._link is not None and not self.is_over and self._step():
                pass
        except (UnreachedError, BrokenError):
            self.close()
            raise
        except (OSError, ValueError) as error:
            self.close()
            raise BrokenError from error
        if self.is_over:
            self._finish()

    def close(self) -> None:
        """Give it up: the other side sees its socket close. May be called again."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _connected(self) -> bool:
        """Look whether the connection is made; where it failed, try the next address."""
        made = self.sock
        poll = select.poll()
        poll.register(made, select.POLLOUT)
        if not poll.poll(0):
            return False
        if made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            made.close()
            self._link = _connecting(self._addresses)
            return True
        assert self._link is not None  # noqa: S101  # for mypy
        self._link.sock = self._pool.secured(made)
        self._step = self._shake_hands if self._pool.url.is_secure else self._send
        return True

    def _shake_hands(self) -> bool:
        try:
            self._unblocked(self.sock.do_handshake)  # type: ignore[attr-defined]
        except ssl.SSLError as error:
            raise UnreachedError from error
        if self._blocked:
            return False
        self._step = self._send
        return True

    def _send(self) -> bool:
        while self._out:
            try:
                sent = self._unblocked(lambda: self.sock.send(self._out))
            except OSError:
                break  # the answer may say why the request was not read to its end
            if self._blocked:
                return False
            self.traffic.sent += sent
            self._out = self._out[sent:]
        self._wants_write = False
        self._step = self._receive
        return True

    def _receive(self) -> bool:
        data = self._unblocked(lambda: self.sock.recv(_READ_BYTES))
        if self._blocked:
            return False
        self.traffic.received += len(data)
        self._response.feed(data)
        return True

    def _unblocked(self, do: Callable[[], Any]) -> Any:
        """What `do` gives; `_blocked` says that it has to be done again later."""
        self._blocked = False
        try:
            return do()
        except ssl.SSLWantReadError:
            self._blocked, self._wants_write = True, False
        except ssl.SSLWantWriteError:
            self._blocked, self._wants_write = True, True
        except BlockingIOError:
            self._blocked, self._wants_write = True, self._step == self._send
        return 0

    def _finish(self) -> None:
        """Keep the connection if the protocol allows another request on it."""
        link, self._link = self._link, None
        if link is None:
            return
        if not self._out and self._response.keeps_alive:
            self._pool.give(link)
        else:
            link.close()


def fetched(
    pool: Pool, method: str, path: str, headers: Mapping[str, str], body: bytes, timeout_s: float
) -> tuple[int, bytes]:
    """Status and body of a whole exchange, waited for; raises `UnreachedError`, or `BrokenError` also if it is late."""
    exchange = Exchange.begin(pool, method, path, headers, body)
    ends = time.monotonic() + timeout_s
    try:
        while True:
            exchange.advance()
            if exchange.is_over and exchange.head is not None:
                return exchange.head.status, bytes(exchange.body)
            left_s = ends - time.monotonic()
            if left_s <= 0 or len(exchange.body) > _FETCHED_BYTES:
                raise BrokenError
            poll = select.poll()
            poll.register(exchange.sock, exchange.interest)
            poll.poll(1e3 * left_s)
    finally:
        exchange.close()
