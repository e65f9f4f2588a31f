"""A lean load generator for high rates: one thread, raw HTTP/1.1 on kept connections, so that it measures the service.

`bench.load` is the one for people: streaming, any address. This one sends whole requests and keeps whole answers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any
from urllib.parse import urlsplit

from bench.queries import Query

_PATH = "/v1/chat/completions"
_PATIENCE_S = 30.0
"""How long an answer is waited for; a service that never answers must not stop the run."""

_IDLE_S = 30.0
"""A connection that was idle for longer is not used again: servers close theirs after 75 s."""

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Answer:
    """What came of one request, times in seconds since the run began; status 0: nothing came."""

    due_s: float
    sent_s: float
    done_s: float
    status: int
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def latency_ms(self) -> float:
        """From when it was due."""
        return 1e3 * (self.done_s - self.due_s)

    @property
    def extra(self) -> Mapping[str, Any]:
        """What the bundle says about its answer."""
        return self.body.get("edgecascade") or {}


def request(query: Query, model: str, deadline_ms: float | None = None, prefix: str = "") -> bytes:
    """One query as HTTP; `prefix` stands before the path."""
    message = {"role": "user", "content": query.text}
    body = json.dumps({"model": model, "skill": query.skill, "messages": [message]}).encode()
    deadline = b"" if deadline_ms is None else b"X-Deadline-Ms: %g\r\n" % deadline_ms
    head = b"POST %s HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n"
    return head % ((prefix + _PATH).encode(), len(body), deadline) + body


class Flood:
    """Runs against one address; each run takes the next of the requests, round and round."""

    def __init__(self, url: str, requests: Sequence[bytes], clock: Callable[[], float] = time.perf_counter) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._requests: Iterator[bytes] = cycle(requests)
        self._clock = clock
        self._idle: list[tuple[float, Connection]] = []

    def open(self, arrivals: Sequence[float]) -> list[Answer]:
        """One request at each time, in seconds from now, whatever comes back."""
        return asyncio.run(self._closing(self._open(arrivals)))

    def closed(self, callers: int, requests: int) -> list[Answer]:
        """So many at a time until so many were sent."""
        return asyncio.run(self._closing(self._closed(callers, requests)))

    async def _closing(self, work: Coroutine[Any, Any, list[Answer]]) -> list[Answer]:
        try:
            return await work
        finally:
            for _, (_, writer) in self._idle:
                writer.close()
            self._idle.clear()

    async def _open(self, arrivals: Sequence[float]) -> list[Answer]:
        began, tasks = self._clock(), []
        for due_s in arrivals:
            await asyncio.sleep(max(0.0, began + due_s - self._clock()))
            tasks.append(asyncio.ensure_future(self._one(began, due_s)))
        return list(await asyncio.gather(*tasks))

    async def _closed(self, callers: int, requests: int) -> list[Answer]:
        began, numbers, found = self._clock(), count(), list[Answer]()

        async def caller() -> None:
            while next(numbers) < requests:
                found.append(await self._one(began, None))

        await asyncio.gather(*(caller() for _ in range(callers)))
        return found

    async def _one(self, began: float, due_s: float | None) -> Answer:
        data, sent_s, status, body = next(self._requests), self._clock() - began, 0, b""
        with suppress(OSError, EOFError, ValueError, TimeoutError):
            status, body = await asyncio.wait_for(self._exchange(data), _PATIENCE_S)
        done_s = self._clock() - began
        return Answer(sent_s if due_s is None else due_s, sent_s, done_s, status, _object(body))

    async def _exchange(self, data: bytes) -> tuple[int, bytes]:
        reader, writer = self._kept() or await asyncio.open_connection(*self._address)
        try:
            writer.write(data)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length))
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append((self._clock(), (reader, writer)))
        return int(head.split(b" ", 2)[1]), body

    def _kept(self) -> Connection | None:
        """The connection used last, if that is not too long ago; then the others are older still."""
        if self._idle and self._clock() - self._idle[-1][0] <= _IDLE_S:
            return self._idle.pop()[1]
        for _, (_, writer) in self._idle:
            writer.close()
        self._idle.clear()
        return None


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
