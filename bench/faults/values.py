"""What a proxy may do to bytes, and what it has counted; all frozen. Pure."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from bench.errors import BenchError

_MOST_PIECE_S = 0.02
"""Under a rate, bytes pass in pieces that take at most so long, so that they trickle."""

_KINDS: Mapping[str, tuple[type, ...]] = {
    "answer": (str,),
    "black_hole": (bool,),
    "slice_bytes": (int,),
    "reset_after_bytes": (int,),
}


@dataclass(frozen=True)
class Faults:
    """What happens to bytes that go one way through a connection; nothing by default.

    `latency_ms` delays each byte, give or take up to `jitter_ms`; order is kept. `bytes_per_s` None: no limit.
    `slice_bytes`: at most so many go at once, each slice in a packet of its own, `slice_gap_ms` apart.
    `corrupt_share` of all bytes get another value. `black_hole` swallows: a connection that lost bytes stays silent.
    `timeout_ms`: nothing passes, and so long after the first byte the connection is closed.
    `reset_after_bytes`: once so many bytes passed, a reset (RST) ends the connection at the next one.
    `answer`: each HTTP request is answered with these bytes and goes no further (on the way up only).
    Raises `BenchError` for a value that makes no sense.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    bytes_per_s: float | None = None
    slice_bytes: int | None = None
    slice_gap_ms: float = 0.0
    corrupt_share: float = 0.0
    black_hole: bool = False
    timeout_ms: float | None = None
    reset_after_bytes: int | None = None
    answer: bytes = b""

    def __post_init__(self) -> None:
        for name in ("latency_ms", "jitter_ms", "slice_gap_ms", "corrupt_share", "timeout_ms", "reset_after_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise BenchError(f"{name} is {value}; it must be 0 or more")
        for name in ("bytes_per_s", "slice_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BenchError(f"{name} is {value}; it must be more than 0")
        if self.corrupt_share > 1:
            raise BenchError(f"corrupt_share is {self.corrupt_share}; it must be from 0 to 1")

    @classmethod
    def of(cls, values: Any) -> Faults:
        """Read JSON values; raises `BenchError` naming the key."""
        if not isinstance(values, Mapping):
            raise BenchError('faults are a JSON object, such as {"latency_ms": 50}')
        known = {field.name for field in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise BenchError(f"there is no fault '{key}'; known are {', '.join(sorted(known))}")
            if value is not None and type(value) not in _KINDS.get(key, (int, float)):
                raise BenchError(f"the fault '{key}' cannot be {value!r}")
        given = dict(values)
        if "answer" in given:
            given["answer"] = str(given["answer"]).encode()
        return cls(**given)

    def delay_s(self, rng: random.Random) -> float:
        """How long a byte that comes now is held back, in seconds."""
        return max(0.0, self.latency_ms + rng.uniform(-self.jitter_ms, self.jitter_ms)) / 1e3

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Cut bytes up as slices and rate want it."""
        size = self.slice_bytes or len(data)
        if self.bytes_per_s is not None:
            size = min(size, max(1, int(self.bytes_per_s * _MOST_PIECE_S)))
        for at in range(0, len(data), size):
            yield data[at : at + size]

    def corrupted(self, data: bytes, rng: random.Random) -> bytes:
        """The bytes, some of them with another value."""
        if not self.corrupt_share:
            return data
        return bytes(byte ^ rng.randrange(1, 256) if rng.random() < self.corrupt_share else byte for byte in data)


NO_FAULTS = Faults()


@dataclass(frozen=True)
class Traffic:
    """What went through a proxy: bytes that callers sent, bytes that they got, and how often they came.

    `requests` counts the heads of HTTP POSTs; probes, which are GETs, are not among them.
    """

    connections: int = 0
    requests: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    def since(self, before: Traffic) -> Traffic:
        """What was added."""
        return Traffic(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


class RequestCounter:
    """Counts the heads of POSTs in a stream, wherever it is cut. No JSON can hold one: it has no bare line ends."""

    _HEAD = re.compile(rb"POST [^ \r\n]{1,2048} HTTP/1\.[01]\r\n")
    _LONGEST = 2100

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> int:
        """How many heads end in `data`."""
        text = self._tail + data
        found = list(self._HEAD.finditer(text))
        self._tail = text[found[-1].end() if found else 0 :][-self._LONGEST :]
        return len(found)
