"""A server of raw bytes: plays any part with each connection, good HTTP or not, and counts what it is sent."""

from __future__ import annotations

import math
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Peer:
    """A server that counts what it is sent and plays its part with each connection."""

    serve: Callable[[socket.socket, Peer], None]
    received: int = 0
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    closed: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def read(self, connection: socket.socket) -> bytes:
        """One whole request; nothing once the other side has closed."""
        data = b""
        while not data or len(data) < request_bytes(data):
            part = connection.recv(65_536)
            self.received += len(part)
            if not part:
                return b""
            data += part
        self.requests.append(data)
        return data

    @property
    def paths(self) -> list[str]:
        """What was asked for."""
        return [request.split(maxsplit=2)[1].decode() for request in self.requests]


def request_bytes(begun: bytes) -> float:
    """How long a request is, as far as it can be told from its beginning."""
    head, met, _ = begun.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)^content-length: (\d+)", head, re.MULTILINE)
    return len(head) + len(met) + int(length[1] if length else 0) if met else math.inf


@contextmanager
def listening(serve: Callable[[socket.socket, Peer], None], port: int = 0) -> Iterator[tuple[str, Peer]]:
    peer = Peer(serve)

    def handle(connection: socket.socket) -> None:
        with connection:
            try:
                serve(connection, peer)
            except OSError:
                pass
            finally:
                peer.closed += 1

    def accept(server: socket.socket) -> None:
        while not peer.stopping.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            peer.connections += 1
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", port)) as server:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", peer
        finally:
            peer.stopping.set()
            server.shutdown(socket.SHUT_RDWR)


def silent(connection: socket.socket, peer: Peer) -> None:
    """Take everything and say nothing: a stopped process, or a black hole."""
    while peer.read(connection):
        pass


def replying(status: int, content: bytes = b"", *lines: str) -> Callable[[socket.socket, Peer], None]:
    """Say the same to every request; `lines` are headers."""
    head = "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", *lines])

    def serve(connection: socket.socket, peer: Peer) -> None:
        while peer.read(connection):
            connection.sendall(head.encode() + b"\r\n\r\n" + content)

    return serve
