"""A TCP proxy that can be told, while it runs, to misbehave. It has a thread with an event loop of its own.

Delays are kept to within the millisecond that epoll can wait.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from bench.errors import BenchError
from bench.faults.values import NO_FAULTS, Faults, RequestCounter, Traffic

HOST = "127.0.0.1"
_TURNS_TO_END = 1000
"""Of the event loop, at most, until all connections have ended."""
_READ_BYTES = 1 << 16
_PIECES_IN_FLIGHT = 256
_RST_ON_CLOSE = struct.pack("ii", 1, 0)


class _CloseError(Exception):
    """The connection ends, politely."""


class _ResetError(Exception):
    """The connection ends with a reset."""


class FaultProxy:
    """Listens on a loopback port and passes connections on to `target`, an http address; a context manager.

    Everything random comes from `seed` and the connection's number. `target` may be set, and set anew, at any time;
    without one, connections are reset.
    """

    def __init__(self, target: str = "", *, port: int = 0, seed: int = 0) -> None:
        self.target = target
        self._port, self._seed = port, seed
        self._up = self._down = NO_FAULTS
        self._traffic = Traffic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._bound: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        try:
            self._bound = _bind(self._port)
        except OSError as error:
            raise BenchError(f"port {self._port} cannot be used ({error.strerror}); choose another") from error
        self._port = int(self._bound.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is None or self._thread is None:
            return
        self._run(self._refuse())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._bound is not None:
            self._bound.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self._port}"

    @property
    def traffic(self) -> Traffic:
        """What was counted since the start."""
        return self._traffic

    def set(self, both: Faults = NO_FAULTS, *, up: Faults | None = None, down: Faults | None = None) -> None:
        """Misbehave from the next byte on: both ways, or the way up (to the target) and down each in its own way."""
        self._up = both if up is None else up
        self._down = both if down is None else down

    def stop(self) -> None:
        """Be dead: reset what is open, and let connections be refused."""
        self._run(self._refuse())

    def resume(self) -> None:
        """Be there again, on the same port."""
        self._run(self._listen())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        if self._loop is None:
            raise BenchError("the proxy does not run; enter it first")
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> None:
        if self._server is None and self._bound is not None:
            self._server = await asyncio.start_server(self._accept, sock=self._bound, backlog=1024)
            self._bound = None

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            self._bound = _bind(self._port)  # bound but not listening: nobody else gets the port, callers are refused
        ended: set[asyncio.Task[Any]] = set()
        for _ in range(_TURNS_TO_END):
            if not asyncio.all_tasks() - {asyncio.current_task()}:
                return
            for link in self._links - ended:  # in a later turn those that had just been accepted
                link.cancel()
            ended |= self._links
            await asyncio.sleep(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._links.add(task)
            task.add_done_callback(self._links.discard)
        self._count(connections=1)
        number = self._traffic.connections
        try:
            await self._pass_on(number, reader, writer)
        except (asyncio.CancelledError, OSError, _ResetError):
            _reset(writer)
        finally:
            writer.close()

    async def _pass_on(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both ways until both have ended, or one broke."""
        parts = urlsplit(self.target)
        if not parts.hostname:
            raise _ResetError
        far_reader, far_writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        up = _Way(reader, far_writer, lambda: self._up, f"{self._seed} {number} up")
        down = _Way(far_reader, writer, lambda: self._down, f"{self._seed} {number} down")
        heads = RequestCounter()

        async def sent(data: bytes) -> bool:
            requests = heads.feed(data)
            self._count(requests=requests, sent_bytes=len(data))
            if self._up.answer:
                writer.write(self._up.answer * requests)
                await writer.drain()
            return not self._up.answer

        async def got(_data: bytes) -> bool:
            return True

        steps = (up.read(sent), up.write(lambda _n: None), down.read(got), down.write(self._got))
        tasks = [asyncio.ensure_future(step) for step in steps]
        try:
            await asyncio.gather(*tasks)
        except _CloseError:
            far_writer.close()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not far_writer.is_closing():
                _reset(far_writer) if up.open or down.open else far_writer.close()

    def _got(self, size: int) -> None:
        self._count(received_bytes=size)

    def _count(self, **more: int) -> None:
        self._traffic = replace(self._traffic, **{name: getattr(self._traffic, name) + n for name, n in more.items()})


class _Way:
    """One direction of one connection."""

    def __init__(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        faults: Callable[[], Faults],
        seed: str,
    ) -> None:
        self._source, self._sink, self._faults = source, sink, faults
        self._delays, self._noise = random.Random(f"{seed} delays"), random.Random(f"{seed} noise")
        self._queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_PIECES_IN_FLIGHT)
        self._due = 0.0
        self._passed = 0
        self._silent = False
        self.open = True

    async def read(self, seen: Callable[[bytes], Coroutine[Any, Any, bool]]) -> None:
        """Note what comes and when it is due; `seen` tells whether it goes on."""
        while data := await self._source.read(_READ_BYTES):
            if await seen(data):
                await self._put(data)
        await self._put(b"")

    async def write(self, passed: Callable[[int], None]) -> None:
        """Let through what is due, as the faults have it."""
        while True:
            due, data = await self._queue.get()
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            if not data:
                self.open = False
                if self._sink.can_write_eof() and not self._silent:
                    self._sink.write_eof()
                return
            await self._let_through(data, passed)

    async def _put(self, data: bytes) -> None:
        now = asyncio.get_running_loop().time()
        self._due = max(self._due, now + self._faults().delay_s(self._delays))
        await self._queue.put((self._due, data))

    async def _let_through(self, data: bytes, passed: Callable[[int], None]) -> None:
        faults = self._faults()
        if faults.timeout_ms is not None:
            await asyncio.sleep(faults.timeout_ms / 1e3)
            raise _CloseError
        self._silent = self._silent or faults.black_hole
        if self._silent:
            return
        for piece in faults.pieces(data):
            left = None if faults.reset_after_bytes is None else max(0, faults.reset_after_bytes - self._passed)
            if faults.bytes_per_s is not None:
                await asyncio.sleep(len(piece) / faults.bytes_per_s)
            await self._send(faults.corrupted(piece[:left], self._noise), passed)
            if left is not None and left < len(piece):
                raise _ResetError
            if faults.slice_bytes is not None:
                await asyncio.sleep(faults.slice_gap_ms / 1e3)

    async def _send(self, piece: bytes, passed: Callable[[int], None]) -> None:
        if piece:
            self._passed += len(piece)
            passed(len(piece))
            self._sink.write(piece)
            await self._sink.drain()


def _bind(port: int) -> socket.socket:
    # asyncio sets TCP_NODELAY only on sockets that name their protocol; without it small pieces wait 40 ms.
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
    except OSError:
        bound.close()
        raise
    return bound


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with an RST."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
    writer.transport.abort()
