"""A line beside a session's stream: one plain socket, which those who compute read and write themselves.

gRPC hands each message from thread to thread, several times at each end; that costs more than the way. So the stream
opens a session, refuses it with the reason, watches over it and ends it, and what is said between goes over a line:
messages as they are on the stream, each behind its length. With TLS it is secured as the stream is. Whoever called the
shard connects, and begins with the token that the stream brought; a line that nobody was promised is closed.
"""

from __future__ import annotations

import logging
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from functions.edge.tls import Identity

_LOG = logging.getLogger(__name__)
TOKEN_BYTES = 32
HANDSHAKE_S = 1.0
"""How long who was promised a line may take to connect, and who connects to show the token."""
_HANDSHAKES = 32
_LENGTH = struct.Struct("<I")
_BUFFER_BYTES = 64 << 10


class LineError(Exception):
    """The line broke, ended, or brought what is no message; says why."""


class Line:
    """A connected line. One thread reads and writes; any may `cut` it."""

    def __init__(self, connection: socket.socket, most: int) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._most = connection, most
        self._reader = connection.makefile("rb", _BUFFER_BYTES)

    def write(self, message: bytes) -> None:
        """Send a message; waits where the other end does not read. Raises `LineError`."""
        try:
            self._connection.sendall(_LENGTH.pack(len(message)) + message)
        except OSError as error:
            raise LineError(str(error)) from error

    def read(self) -> bytes | None:
        """The next message, None once the other end wrote its last; raises `LineError`."""
        try:
            begin = self._reader.read(_LENGTH.size)
            if not begin:
                return None
            size = _LENGTH.unpack(begin)[0] if len(begin) == _LENGTH.size else 0
            if size > self._most:
                raise LineError(f"a message has {size} bytes; at most {self._most} are read")
            message: bytes = self._reader.read(size)
        except (OSError, ValueError) as error:
            raise LineError(str(error)) from error
        if len(begin) < _LENGTH.size or len(message) < size:
            raise LineError("it ended in the midst of a message")
        return message

    def cut(self) -> None:
        """End it from another thread: who reads or writes gets to know."""
        with suppress(OSError):
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)  # TLS's own would pull its state from under them

    def close(self) -> None:
        """Let go of it."""
        with suppress(OSError):
            self._reader.close()
        self._connection.close()


def call(address: tuple[str, int], token: bytes, most: int, timeout_s: float, identity: Identity | None) -> Line:
    """Connect to a line that was promised; messages have `most` bytes. Raises `OSError`."""
    connection = socket.create_connection(address, timeout_s)
    try:
        if identity is not None:
            connection = identity.secured(connection, address[0])
        connection.sendall(token)
        return Line(connection, most)
    except BaseException:
        connection.close()
        raise


class Promise:
    """A line that somebody may call."""

    def __init__(self, port: int) -> None:
        self.port, self.token = port, secrets.token_bytes(TOKEN_BYTES)
        self._arrived: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._line: Line | None = None
        self._over = False

    def arrive(self, line: Line | None) -> None:
        """Here it is; None: it will not come."""
        self._arrived.put(line)

    def line(self) -> Line:
        """Wait for it; raises `LineError` if it does not come."""
        if self._line is None:
            with suppress(queue.Empty):
                self._line = self._arrived.get(timeout=HANDSHAKE_S)
        if self._line is None:
            raise LineError("it was asked for, and nobody took it")
        if self._over:  # it was cut as it came
            self._line.cut()
        return self._line

    def cut(self) -> None:
        """End it from another thread, or stop who waits for it."""
        self._over = True
        self.arrive(None)
        if self._line is not None:
            self._line.cut()

    def close(self) -> None:
        """Let go of it, should it have come."""
        with suppress(queue.Empty):
            while True:
                self._line = self._arrived.get_nowait() or self._line
        if self._line is not None:
            self._line.close()


class Lines:
    """Where lines arrive. So many may be about to show their token at once; more are closed unheard."""

    def __init__(self, port: int, message_bytes: int, identity: Identity | None) -> None:
        self._message_bytes, self._identity = message_bytes, identity
        self._listener = _listener(port, everywhere=identity is not None)
        self._port: int = self._listener.getsockname()[1]
        self._places = threading.BoundedSemaphore(_HANDSHAKES)
        self._promised: dict[bytes, Promise] = {}
        self._stopped = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Let them arrive."""
        threading.Thread(target=self._accept, name="lines", daemon=True).start()

    def stop(self) -> None:
        """Take no more."""
        self._stopped = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for one
        self._listener.close()

    @contextmanager
    def promise(self) -> Iterator[Promise]:
        """Promise a line, and let go of it afterwards."""
        made = Promise(self._port)
        self._promised[made.token] = made
        try:
            yield made
        finally:
            with self._lock:
                self._promised.pop(made.token, None)
                made.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except ConnectionError:  # who called has left already
                continue
            except OSError as error:
                if not self._stopped:  # out of file descriptors
                    _LOG.warning("no more lines, sessions stay on their streams: %s", error)
                    self._listener.close()  # or callers would connect, and wait for who never comes
                return
            if not self._places.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._meet, args=(connection,), name="line", daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        """Hand a connection to whom it was promised, or close it."""
        try:
            connection.settimeout(HANDSHAKE_S)
            if self._identity is not None:
                connection = self._identity.secured(connection)
            token = _token(connection)
            with self._lock:
                promise = self._promised.pop(token, None)
                if promise is not None:
                    promise.arrive(Line(connection, self._message_bytes))
                    return
            raise ConnectionRefusedError("it was promised to nobody")
        except OSError as error:
            _LOG.warning("a line was refused: %s", error)
            connection.close()
        finally:
            self._places.release()


def _token(connection: socket.socket) -> bytes:
    """What a connection begins with; raises `OSError`."""
    found = b""
    while len(found) < TOKEN_BYTES:
        more = connection.recv(TOKEN_BYTES - len(found))
        if not more:
            break
        found += more
    return found


def _listener(port: int, *, everywhere: bool) -> socket.socket:
    if everywhere and socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("" if everywhere else "127.0.0.1", port))
