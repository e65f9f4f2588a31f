"""`bench links`: what cutting a tier costs. A hop's time and bytes, and the tier in pieces beside the tier as it is.

All ways stand on this machine and share its cores; they are asked in turns, so that what else runs here meets all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from bench.bundle import Start
from bench.client import Client, Reply
from bench.errors import BenchError
from bench.faults import FaultProxy, Faults
from bench.sharded import HEAD, Troupe, even_cut, n_layers, ports_for, shards, whole

QUESTION = "Tell me a long story about the sea, a lighthouse and an old man."
HOP_MS, EFFICIENCY = 0.35, 0.9  # the bounds of the issue
_TOLD_APART = 2  # tokens that a time per token needs at least


@dataclass(frozen=True)
class Plan:
    """What to measure; `delays_ms` one way, of the link between two shards."""

    tier: Path
    counts: Sequence[int] = (1, 2, 4)
    rounds: int = 9
    tokens: int = 64
    callers: int = 4
    delays_ms: Sequence[float] = (0.0, 1.0, 2.0, 5.0, 10.0)
    threads: int = 2
    states: str = "fp32"
    spin: bool = False


@dataclass(frozen=True)
class Row:
    """The tier in so many shards: milliseconds a token of one answer alone, and tokens a second of several at once.

    `hop_ms`: what each hop adds to a token; `efficiency`: throughput as a share of the unsplit tier's.
    `same`: whether it said the same.
    """

    shards: int
    token_ms: float
    hop_ms: float | None
    together_tokens_s: float
    efficiency: float | None
    same: bool


@dataclass(frozen=True)
class Delayed:
    """Two shards with a slower link: milliseconds a token, and the least that it could be, compute and hops alone."""

    delay_ms: float
    token_ms: float
    limit_ms: float


@dataclass(frozen=True)
class Run:
    """All figures; bytes as they went over the link, framing included."""

    rows: Sequence[Row]
    bytes_per_token_up: float
    bytes_per_token_down: float
    delayed: Sequence[Delayed]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, with what the issue asks."""
        hops = [row.hop_ms for row in self.rows if row.hop_ms is not None]
        two = next((row.efficiency for row in self.rows if row.shards == 2), None)  # noqa: PLR2004
        verdict = {
            "hop": max(hops) <= HOP_MS if hops else None,
            "efficiency": two >= EFFICIENCY if two is not None else None,
            "same": all(row.same for row in self.rows),
        }
        return {**asdict(self), "verdict": verdict}


Report = Callable[[int, int, str], None]


def measure(start: Start, plan: Plan, report: Report) -> Run:
    """Measure everything; raises `BenchError`."""
    if 1 not in plan.counts:
        raise BenchError("the unsplit tier must be among the ways: 1 shard")
    total = plan.rounds * len(plan.counts) + 1 + len(plan.delays_ms)
    rows = _rows(start, plan, report, total)
    return Run(rows, *_over_a_proxy(start, plan, rows[0].token_ms, report, total))


def _rows(start: Start, plan: Plan, report: Report, total: int) -> list[Row]:
    alone: dict[int, list[float]] = {count: [] for count in plan.counts}
    together: dict[int, list[float]] = {count: [] for count in plan.counts}
    texts: dict[int, set[str]] = {count: set() for count in plan.counts}
    with _ways(start, plan) as urls:
        for url in urls.values():
            _answer(url, plan)  # the first is slower
        for number in range(plan.rounds):
            for count, url in urls.items():
                token_ms, text = _answer(url, plan)
                alone[count].append(token_ms)
                texts[count].add(text)
                together[count].append(_together(url, plan))
                report(number * len(urls) + len(alone[count]), total, f"{count} shards")
    base_ms, base_rate = median(alone[1]), median(together[1])
    return [
        Row(
            count,
            median(alone[count]),
            (median(alone[count]) - base_ms) / (count - 1) if count > 1 else None,
            median(together[count]),
            median(together[count]) / base_rate if count > 1 else None,
            texts[count] == texts[1],
        )
        for count in sorted(plan.counts)
    ]


@contextmanager
def _ways(start: Start, plan: Plan) -> Iterator[Mapping[int, str]]:
    """The tier in each number of pieces, all ready; yields their addresses."""
    with ExitStack() as stack:
        urls = {}
        for count in sorted(plan.counts):
            if count == 1:
                urls[1] = stack.enter_context(whole(start, plan.tier, THREADS=str(plan.threads)))
                continue
            cut = even_cut(n_layers(plan.tier), count)
            cast = shards(cut, 1, plan.tier, ports_for(cut, 1), _settings(plan))
            troupe = stack.enter_context(Troupe(start, cast))
            urls[count] = troupe.url(next(shard for shard in cast if shard.part == HEAD))
        yield urls


def _settings(plan: Plan) -> dict[str, str]:
    return {"THREADS": str(plan.threads), "SHARD_STATES": plan.states, "SHARD_SPIN": str(int(plan.spin))}


def _over_a_proxy(
    start: Start, plan: Plan, base_ms: float, report: Report, total: int
) -> tuple[float, float, list[Delayed]]:
    """Bytes a token between two shards, and what delays on the way do."""
    cut = even_cut(n_layers(plan.tier), 2)
    ports = ports_for(cut, 1)
    (place,) = ports
    with FaultProxy(f"http://127.0.0.1:{ports[place]}") as proxy:
        via = {place: urlsplit(proxy.url).port or 0}
        cast = shards(cut, 1, plan.tier, ports, _settings(plan), via)
        with Troupe(start, cast) as troupe:
            url = troupe.url(next(shard for shard in cast if shard.part == HEAD))
            _answer(url, plan)
            up, down = _bytes(proxy, url, plan)
            delayed = []
            for number, delay_ms in enumerate(plan.delays_ms):
                proxy.set(Faults(latency_ms=delay_ms))
                token_ms = median(_answer(url, plan)[0] for _ in range(3))
                delayed.append(Delayed(delay_ms, token_ms, base_ms + 2 * delay_ms))
                report(total - len(plan.delays_ms) + number, total, f"{delay_ms:g} ms away")
    return up, down, delayed


def _bytes(proxy: FaultProxy, url: str, plan: Plan) -> tuple[float, float]:
    """Bytes that a further token costs, there and back: long answers less short ones."""
    counted = []
    for tokens in (plan.tokens // 4, plan.tokens):
        before = proxy.traffic
        _answer(url, plan, tokens)
        since = proxy.traffic.since(before)
        counted.append((since.sent_bytes, since.received_bytes))
    more = plan.tokens - plan.tokens // 4
    (up, down), (all_up, all_down) = counted
    return (all_up - up) / more, (all_down - down) / more


def _answer(url: str, plan: Plan, tokens: int = 0) -> tuple[float, str]:
    """Milliseconds a token after the first, and what was said; raises `BenchError`."""
    with Client(url) as client:
        *pieces, reply = client.stream(
            "chat", [{"role": "user", "content": QUESTION}], max_tokens=tokens or plan.tokens
        )
    if not isinstance(reply, Reply) or len(pieces) < _TOLD_APART:
        raise BenchError("an answer was too short to be timed")
    return reply.timing_ms["decode"] / (len(pieces) - 1), reply.text


def _together(url: str, plan: Plan) -> float:
    """Tokens a second of as many answers as there are callers."""

    def pieces(_caller: int) -> int:
        with Client(url) as client:
            return sum(isinstance(piece, str) for piece in _stream(client, plan))

    began = time.perf_counter()
    with ThreadPoolExecutor(plan.callers) as pool:
        said = sum(pool.map(pieces, range(plan.callers)))
    return said / (time.perf_counter() - began)


def _stream(client: Client, plan: Plan) -> Iterator[str | Reply]:
    return client.stream("chat", [{"role": "user", "content": QUESTION}], max_tokens=plan.tokens)
