"""A load generator for any OpenAI-compatible address: closed and open loop, streaming aware.

Closed loop: a fixed number of callers, each sends its next request when the last is answered.
Open loop: requests leave at planned times whatever comes back; a late one is timed from when it was due, so that a
stalled server cannot hide by slowing its callers down.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, Protocol

from bench.client import Reply
from bench.errors import BenchError, ServiceError
from bench.metrics import mean, percentile

MOST_REQUESTS = 100_000
MOST_AT_ONCE = 512


class Streams(Protocol):
    """What a load run needs of a client."""

    def stream(
        self, skill: str, messages: Sequence[dict[str, str]], model: str, max_tokens: int | None
    ) -> Iterator[str | Reply]:
        """Send one request and yield its pieces."""
        ...


@dataclass(frozen=True)
class Shot:
    """One request's times in seconds since the run began; `error` is '' if it was answered."""

    due_s: float
    sent_s: float
    first_s: float | None
    done_s: float
    pieces: int
    source: str = ""
    error: str = ""


@dataclass(frozen=True)
class Load:
    """What to send: each request takes the next of `texts`, round and round."""

    texts: Sequence[str]
    skill: str = "chat"
    model: str = "auto"
    max_tokens: int | None = 64


def poisson(rate: float, duration_s: float, seed: int = 1) -> list[float]:
    """Arrival times of a Poisson process of `rate` per second, in seconds."""
    _positive(rate, duration_s)
    rng = random.Random(seed)
    times: list[float] = []
    now = rng.expovariate(rate)
    while now < duration_s:
        times.append(now)
        now += rng.expovariate(rate)
    return _bounded(times)


def steps(rates: Sequence[float], each_s: float, seed: int = 1) -> list[float]:
    """Poisson arrivals whose rate goes through `rates`, `each_s` seconds each."""
    times: list[float] = []
    for number, rate in enumerate(rates):
        times.extend(number * each_s + t for t in poisson(rate, each_s, seed + number))
    return _bounded(times)


def rates(text: str) -> list[float]:
    """Read one rate, or several parted by commas; raises `BenchError`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise BenchError(f"the rate '{text}' is not a number, or numbers parted by commas") from error


def _positive(*values: float) -> None:
    if min(values) <= 0:
        raise BenchError("rates and durations must be greater than 0")


def _bounded(times: list[float]) -> list[float]:
    if len(times) > MOST_REQUESTS:
        raise BenchError(f"that is {len(times)} requests; at most {MOST_REQUESTS} a run")
    return times


@dataclass
class Run:
    """One run against one client; the clock and the pause are arguments so that tests need not wait."""

    client: Streams
    load: Load
    advance: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.perf_counter
    pause: Callable[[float], None] = time.sleep
    _shots: list[Shot] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def closed(self, callers: int, requests: int) -> list[Shot]:
        """`callers` at a time until `requests` were sent."""
        if not 1 <= callers <= MOST_AT_ONCE or not 1 <= requests <= MOST_REQUESTS:
            raise BenchError(f"send 1…{MOST_REQUESTS} requests from 1…{MOST_AT_ONCE} callers")
        begun, numbers = self.clock(), count()

        def caller() -> None:
            while True:
                with self._lock:
                    number = next(numbers)
                if number >= requests:
                    return
                self._shoot(number, begun, None)

        with ThreadPoolExecutor(callers) as pool:
            for future in [pool.submit(caller) for _ in range(callers)]:
                future.result()
        return self._shots

    def open(self, arrivals: Sequence[float], at_once: int = MOST_AT_ONCE) -> list[Shot]:
        """One request at each arrival time; above `at_once` in flight they queue here, and their wait counts."""
        begun = self.clock()
        with ThreadPoolExecutor(at_once) as pool:
            futures = []
            for number, due_s in enumerate(arrivals):
                wait_s = begun + due_s - self.clock()
                if wait_s > 0:
                    self.pause(wait_s)
                futures.append(pool.submit(self._shoot, number, begun, due_s))
            for future in futures:
                future.result()
        return self._shots

    def _shoot(self, number: int, begun: float, due_s: float | None) -> None:
        sent_s = self.clock() - begun
        first_s, pieces, source, error = None, 0, "", ""
        messages = [{"role": "user", "content": self.load.texts[number % len(self.load.texts)]}]
        try:
            for piece in self.client.stream(self.load.skill, messages, self.load.model, self.load.max_tokens):
                if isinstance(piece, Reply):
                    source = piece.source
                    continue
                first_s = self.clock() - begun if first_s is None else first_s
                pieces += 1
        except ServiceError as failure:
            error = str(failure.status or "no answer")
        shot = Shot(sent_s if due_s is None else due_s, sent_s, first_s, self.clock() - begun, pieces, source, error)
        with self._lock:
            self._shots.append(shot)
        self.advance()


@dataclass(frozen=True)
class Spread:
    """A spread of times in milliseconds; None where nothing was timed."""

    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float | None


def spread(seconds: Sequence[float]) -> Spread:
    """Sum times given in seconds up, in milliseconds."""
    ms = [value * 1000 for value in seconds]
    return Spread(
        mean=mean(ms),
        p50=percentile(ms, 0.50),
        p90=percentile(ms, 0.90),
        p95=percentile(ms, 0.95),
        p99=percentile(ms, 0.99),
        max=max(ms, default=None),
    )


def summary(shots: Sequence[Shot]) -> dict[str, Any]:
    """JSON-ready figures of a run; latency and first token are timed from when a request was due."""
    good = [s for s in shots if not s.error]
    span_s = max((s.done_s for s in shots), default=0.0) - min((s.due_s for s in shots), default=0.0)
    gaps = [(s.done_s - s.first_s) / (s.pieces - 1) for s in good if s.first_s is not None and s.pieces > 1]
    return {
        "requests": len(shots),
        "answered": len(good),
        "errors": dict(Counter(s.error for s in shots if s.error)),
        "sources": dict(Counter(s.source for s in good if s.source)),
        "seconds": span_s,
        "requests_per_s": len(good) / span_s if span_s > 0 else None,
        "pieces_per_s": sum(s.pieces for s in good) / span_s if span_s > 0 else None,
        "latency_ms": asdict(spread([s.done_s - s.due_s for s in good])),
        "first_token_ms": asdict(spread([s.first_s - s.due_s for s in good if s.first_s is not None])),
        "between_tokens_ms": asdict(spread(gaps)),
        "sent_late_ms": asdict(spread([s.sent_s - s.due_s for s in shots])),
    }
