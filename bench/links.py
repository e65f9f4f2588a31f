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
from bench.processes import cpu_s
from bench.sharded import HEAD, WHOLE, Troupe, balanced_cut, ports_for, shards, whole_running
from bench.states import Loss, losses
from bench.transport import round_trip_ms

QUESTION = "Tell me a long story about the sea, a lighthouse and an old man."
HOP_MS, EFFICIENCY = 0.35, 0.9  # the bounds of the issue
_TOLD_APART = 2  # tokens that a time per token needs at least


@dataclass(frozen=True)
class Plan:
    """What to measure; `delays_ms` one way, of the link between two shards.

    The unsplit tier has `threads`, and so have all shards of one way together, one each at least; or each, where
    they work in turns.
    """

    tier: Path
    counts: Sequence[int] = (1, 2, 4)
    rounds: int = 9
    tokens: int = 64
    callers: int = 4
    delays_ms: Sequence[float] = (0.0, 1.0, 2.0, 5.0, 10.0)
    threads: int = 2
    states: str = "fp32"
    spin: bool = False
    prose_tokens: int = 256

    def threads_of(self, shards: int) -> int:
        """Threads of each shard's engine."""
        return max(1, self.threads // shards)


@dataclass(frozen=True)
class Row:
    """The tier in so many shards: milliseconds a token of one answer alone, and tokens a second of several at once.

    `hop_ms`: what each hop adds to a token, against the unsplit tier with as many threads as each shard has;
    `efficiency`: throughput as a share of the unsplit tier's on the same cores. Both are medians over the turns of the
    difference and the ratio within a turn. `cpu_ms`: processor time a token, of all processes, several answers at once.
    `same`: whether it said the same. With one of `groups` all answers share passes, and shards work in turns, each with
    all threads, which spin within a pass; with 0 shards work at the same time.
    """

    shards: int
    threads: int
    groups: int
    token_ms: float
    hop_ms: float | None
    together_tokens_s: float
    efficiency: float | None
    cpu_ms: float
    same: bool


@dataclass(frozen=True)
class Delayed:
    """Two shards with a slower link: milliseconds a token, and the least that it could be, compute and hops alone."""

    delay_ms: float
    token_ms: float
    limit_ms: float


@dataclass(frozen=True)
class Run:
    """All figures; bytes as they went over the link, framing included.

    `transport_ms` is the part of a hop that a message and its answer take on their way through gRPC, the median and the
    least.
    """

    rows: Sequence[Row]
    bytes_per_token_up: float
    bytes_per_token_down: float
    delayed: Sequence[Delayed]
    transport_ms: tuple[float, float] = (0.0, 0.0)
    losses: Sequence[Loss] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, with what the issue asks."""
        hops = [row.hop_ms for row in self.rows if row.hop_ms is not None]
        two = [row.efficiency for row in self.rows if row.shards == 2 and row.efficiency is not None]  # noqa: PLR2004
        verdict = {
            "hop": max(hops) <= HOP_MS if hops else None,
            "efficiency": max(two) >= EFFICIENCY if two else None,
            "same": all(row.same for row in self.rows),
        }
        return {**asdict(self), "verdict": verdict}


Report = Callable[[int, int, str], None]


def measure(start: Start, plan: Plan, report: Report) -> Run:
    """Measure everything; raises `BenchError`."""
    if 1 not in plan.counts:
        raise BenchError("the unsplit tier must be among the ways: 1 shard")
    total = plan.rounds * len(_ways_of(plan)) + 1 + len(plan.delays_ms)
    rows = _rows(start, plan, report, total)
    alone_ms = next(row.token_ms for row in rows if (row.shards, row.threads) == (1, plan.threads_of(2)))
    up, down, delayed = _over_a_proxy(start, plan, alone_ms, report, total)
    cut = balanced_cut(plan.tier, 2)
    found = losses(plan.tier, cut[1].start, plan.prose_tokens, plan.threads, report) if plan.prose_tokens else []
    return Run(rows, up, down, delayed, round_trip_ms(round(up)), found)


@dataclass(frozen=True, order=True)
class Way:
    """The tier in so many shards, with so many threads each; sessions in so many groups, 0: one a shard."""

    shards: int
    threads: int
    groups: int = 0


def _ways_of(plan: Plan) -> list[Way]:
    """The unsplit tier with all threads, and with as many as shards have; and the shards, at once and in turns."""
    cut = {Way(count, plan.threads_of(count)) for count in plan.counts}
    cut |= {Way(count, plan.threads, groups=1) for count in plan.counts if count > 1}
    return sorted(cut | {Way(1, way.threads) for way in cut} | {Way(1, plan.threads_of(2))})


@dataclass(frozen=True)
class _Turn:
    """One way's figures in one turn."""

    token_ms: float
    text: str
    together_tokens_s: float
    cpu_ms: float


def _rows(start: Start, plan: Plan, report: Report, total: int) -> list[Row]:
    turns: dict[Way, list[_Turn]] = {way: [] for way in _ways_of(plan)}
    with _ways(start, plan) as running:
        for url, _ in running.values():
            _answer(url, plan)  # the first is slower
        for number in range(plan.rounds):
            for place, (way, (url, groups)) in enumerate(running.items(), 1):
                turns[way].append(_Turn(*_answer(url, plan), *_together(url, plan, groups)))
                report(number * len(running) + place, total, f"{way.shards} shards")
    whole = turns[Way(1, plan.threads)]
    return [_row(way, found, whole, turns[Way(1, way.threads)]) for way, found in turns.items()]


def _row(way: Way, turns: Sequence[_Turn], whole: Sequence[_Turn], alike: Sequence[_Turn]) -> Row:
    """`whole`: turns of the unsplit tier with all threads; `alike`: with as many as each of these shards."""
    hops = [t.token_ms - base.token_ms for t, base in zip(turns, alike, strict=True)]
    shares = [t.together_tokens_s / base.together_tokens_s for t, base in zip(turns, whole, strict=True)]
    return Row(
        way.shards,
        way.threads,
        way.groups,
        median(t.token_ms for t in turns),
        median(hops) / (way.shards - 1) if way.shards > 1 else None,
        median(t.together_tokens_s for t in turns),
        median(shares) if way.shards > 1 else None,
        median(t.cpu_ms for t in turns),
        {t.text for t in turns} == {t.text for t in whole},
    )


@contextmanager
def _ways(start: Start, plan: Plan) -> Iterator[Mapping[Way, tuple[str, Sequence[int]]]]:
    """The tier in each way, all ready; yields where they talk HTTP, and their process groups."""
    with ExitStack() as stack:
        found: dict[Way, tuple[str, Sequence[int]]] = {}
        for way in _ways_of(plan):
            if way.shards == 1:
                running = stack.enter_context(whole_running(start, plan.tier, THREADS=str(way.threads)))
                found[way] = running.urls[WHOLE], list(running.groups.values())
                continue
            cut = balanced_cut(plan.tier, way.shards)
            cast = shards(cut, 1, plan.tier, ports_for(cut, 1), _settings(plan, way))
            troupe = stack.enter_context(Troupe(start, cast))
            found[way] = troupe.url(next(shard for shard in cast if shard.part == HEAD)), troupe.groups
        yield found


def _settings(plan: Plan, way: Way) -> dict[str, str]:
    spin = plan.spin or way.groups == 1
    engine = {"THREADS": str(way.threads), "SHARD_GROUPS": str(way.groups), "SHARD_SPIN": str(int(spin))}
    return {**engine, "SHARD_STATES": plan.states}


def _over_a_proxy(
    start: Start, plan: Plan, base_ms: float, report: Report, total: int
) -> tuple[float, float, list[Delayed]]:
    """Bytes a token between two shards, and what delays on the way do.

    All goes through the stream there: a line would go round the proxy.
    """
    cut = balanced_cut(plan.tier, 2)
    ports = ports_for(cut, 1)
    (place,) = ports
    with FaultProxy(f"http://127.0.0.1:{ports[place]}") as proxy:
        via = {place: urlsplit(proxy.url).port or 0}
        told = {**_settings(plan, Way(2, plan.threads_of(2))), "SHARD_LINE": "off"}
        cast = shards(cut, 1, plan.tier, ports, told, via)
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


def _together(url: str, plan: Plan, groups: Sequence[int]) -> tuple[float, float]:
    """Tokens a second of as many answers as there are callers, and the processor's milliseconds a token."""

    def pieces(_caller: int) -> int:
        with Client(url) as client:
            return sum(isinstance(piece, str) for piece in _stream(client, plan))

    began, used_s = time.perf_counter(), cpu_s(groups)
    with ThreadPoolExecutor(plan.callers) as pool:
        said = sum(pool.map(pieces, range(plan.callers)))
    return said / (time.perf_counter() - began), 1e3 * (cpu_s(groups) - used_s) / said


def _stream(client: Client, plan: Plan) -> Iterator[str | Reply]:
    return client.stream("chat", [{"role": "user", "content": QUESTION}], max_tokens=plan.tokens)
