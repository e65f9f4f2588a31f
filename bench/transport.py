"""What a message costs on its way between two shards, and nothing else: round trips of a state over gRPC.

The other end is this module in a process of its own. Between two messages both ends read as many bytes as a shard has
weights, as shards do: with warm caches a round trip takes half as long.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np

from bench.errors import BenchError

_WEIGHTS = np.zeros(10 << 20, np.float32)
ANSWER_BYTES = 30
_SERVICE, _METHOD = "bench.Echo", "Session"
Trip = Callable[[], float]
"""Send a state and wait for its answer; returns how long that took without what the other end did, in ms."""


@contextmanager
def trips(state_bytes: int) -> Iterator[Trip]:
    """Start the other end, for the while; raises `BenchError`."""
    import grpc

    command = [sys.executable, "-m", __name__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603  # ourselves
    try:
        assert process.stdout is not None  # noqa: S101  # it is a pipe
        port = process.stdout.readline().decode().strip()
        if not port:
            raise BenchError("the other end of the transport could not be started")
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            session: Any = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")
            answers = session(iter(outbox.get, None))

            def trip() -> float:
                _WEIGHTS.sum()
                began = time.perf_counter()
                outbox.put(bytes(state_bytes))
                (work_s,) = np.frombuffer(next(answers)[:8], np.float64)
                return 1e3 * (time.perf_counter() - began - float(work_s))

            yield trip
            answers.cancel()
            outbox.put(None)
    finally:
        process.kill()
        process.communicate()


def round_trip_ms(state_bytes: int, times: int = 300) -> tuple[float, float]:
    """The median and the least of some round trips, in milliseconds."""
    with trips(state_bytes) as trip:
        trip()
        found = [trip() for _ in range(times)]
    return median(found), min(found)


def _serve() -> None:
    """Be the other end until stdin ends: an answer says how long its work took."""
    import grpc

    def answer(messages: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        for _ in messages:
            began = time.perf_counter()
            _WEIGHTS.sum()
            yield np.float64(time.perf_counter() - began).tobytes().ljust(ANSWER_BYTES)

    server = grpc.server(ThreadPoolExecutor(2))
    handlers: dict[str, Any] = {_METHOD: grpc.stream_stream_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    sys.stdout.write(f"{server.add_insecure_port('127.0.0.1:0')}\n")
    server.start()
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
