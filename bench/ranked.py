"""`bench ranked`: what splitting a tier among ranks costs. Time, CPU time and bytes a token, beside the tier as it is.

All ways stand on this machine and share its cores; they are asked in turns, so that what else runs here meets all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from bench.bundle import Running, Start, Variant
from bench.client import Client, Reply
from bench.errors import BenchError
from bench.faults import FaultProxy, Faults
from bench.processes import cpu_s
from bench.sharded import free_port

QUESTIONS = (
    "Tell me a long story about the sea, a lighthouse and an old man.",
    "What is a battery, and how does it work?",
    "Write a letter to a friend about the weather.",
    "How do I make bread?",
)
_TIER = "edge"
_TOLD_APART = 2  # tokens that a time per token needs at least

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure; `delays_ms` one way, of the links between rank 0 and the others."""

    tier: Path
    counts: Sequence[int] = (1, 2)
    rounds: int = 5
    tokens: int = 64
    delays_ms: Sequence[float] = (0.0, 1.0, 5.0)
    threads: int = 1


@dataclass(frozen=True)
class Row:
    """The tier in so many ranks, of one answer at a time: milliseconds a token, and CPU time of all its processes.

    CPU time is that of the whole answer, reading the prompt included, for each of its tokens.

    `same` of `asked` answers are the unsplit tier's to the letter.
    """

    ranks: int
    token_ms: float
    cpu_ms: float
    same: int
    asked: int


@dataclass(frozen=True)
class Delayed:
    """Two ranks with a slower link: milliseconds a token, and the least that it could be: compute and exchanges alone.

    `trips` are the ways that a token has to wait for, one after the other.
    """

    delay_ms: float
    token_ms: float
    limit_ms: float
    trips: int


@dataclass(frozen=True)
class Run:
    """All figures; bytes between rank 0 and one other of two, as they went over the link, framing included."""

    rows: Sequence[Row]
    bytes_per_token_up: float
    bytes_per_token_down: float
    delayed: Sequence[Delayed]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def measure(start: Start, plan: Plan, layers: int, report: Report) -> Run:
    """Measure everything; raises `BenchError`."""
    if 1 not in plan.counts:
        raise BenchError("the unsplit tier must be among the ways: 1 rank")
    total = plan.rounds * len(plan.counts) + len(plan.delays_ms)
    rows = _rows(start, plan, report, total)
    return Run(rows, *_over_a_proxy(start, plan, layers, report, total))


def variants(count: int, tier: Path, threads: int, ports: Sequence[int], reached: Sequence[int]) -> dict[str, Variant]:
    """The functions of a tier in ranks, rank 0 last: the others listen on `ports`, rank 0 reaches them at `reached`."""
    common = {"MODEL_PATH": str(tier.absolute()), "THREADS": str(threads)}
    if ports != reached:
        common["SHARD_LINE"] = "off"  # it would go round the proxy
    if count == 1:
        return {"whole": Variant(_TIER, common)}
    found = {}
    for number, port in enumerate(ports, 1):
        own = {"TENSOR_RANK": f"{number}/{count}", "SHARD_LISTEN": str(port)}
        found[f"rank-{number}-of-{count}"] = Variant(_TIER, {**common, **own})
    peers = ",".join(f"127.0.0.1:{port}" for port in reached)
    own = {"TENSOR_RANK": f"0/{count}", "TENSOR_PEERS": peers}
    return {**found, f"rank-0-of-{count}": Variant(_TIER, {**common, **own})}


@dataclass(frozen=True)
class _Way:
    url: str
    groups: Sequence[int]


@contextmanager
def _way(start: Start, found: Mapping[str, Variant]) -> Iterator[_Way]:
    with start(found) as running:
        yield _way_of(running, found)


def _way_of(running: Running, found: Mapping[str, Variant]) -> _Way:
    *_, head = found
    return _Way(running.urls[head], [running.groups[name] for name in found])


def _rows(start: Start, plan: Plan, report: Report, total: int) -> list[Row]:
    times: dict[int, list[float]] = {count: [] for count in plan.counts}
    cpus: dict[int, list[float]] = {count: [] for count in plan.counts}
    texts: dict[int, list[str]] = {count: [] for count in plan.counts}
    with ExitStack() as stack:
        ways = {}
        for count in sorted(plan.counts):
            ports = [free_port() for _ in range(count - 1)]
            found = variants(count, plan.tier, plan.threads, ports, ports)
            ways[count] = stack.enter_context(_way(start, found))
        for way in ways.values():
            _answer(way.url, plan, QUESTIONS[0])  # the first is slower
        for number in range(plan.rounds):
            for count, way in ways.items():
                began = cpu_s(way.groups)
                token_ms, tokens, text = _answer(way.url, plan, QUESTIONS[number % len(QUESTIONS)])
                times[count].append(token_ms)
                cpus[count].append(1e3 * (cpu_s(way.groups) - began) / tokens)
                texts[count].append(text)
                report(number * len(ways) + len(times[count]), total, f"{count} ranks")
    return [
        Row(
            count,
            median(times[count]),
            median(cpus[count]),
            sum(a == b for a, b in zip(texts[count], texts[1], strict=True)),
            plan.rounds,
        )
        for count in sorted(plan.counts)
    ]


def _over_a_proxy(
    start: Start, plan: Plan, layers: int, report: Report, total: int
) -> tuple[float, float, list[Delayed]]:
    """Bytes a token between two ranks, and what delays on the way do."""
    port = free_port()
    with FaultProxy(f"http://127.0.0.1:{port}") as proxy:
        found = variants(2, plan.tier, plan.threads, [port], [urlsplit(proxy.url).port or 0])
        with _way(start, found) as way:
            _answer(way.url, plan, QUESTIONS[0])
            up, down = _bytes(proxy, way.url, plan)
            delayed: list[Delayed] = []
            for number, delay_ms in enumerate(plan.delays_ms):
                proxy.set(Faults(latency_ms=delay_ms))
                token_ms = median(_answer(way.url, plan, QUESTIONS[0], plan.tokens // 4)[0] for _ in range(3))
                trips = 2 * layers + 2  # the pass, two sums a layer that are swapped, the logits
                base_ms = delayed[0].token_ms if delayed else token_ms
                delayed.append(Delayed(delay_ms, token_ms, base_ms + trips * delay_ms, trips))
                report(total - len(plan.delays_ms) + number, total, f"{delay_ms:g} ms away")
    return up, down, delayed


def _bytes(proxy: FaultProxy, url: str, plan: Plan) -> tuple[float, float]:
    """Bytes that a further token costs, there and back: a long answer less a short one."""
    counted = []
    for tokens in (plan.tokens // 4, plan.tokens):
        before = proxy.traffic
        _, said, _ = _answer(url, plan, QUESTIONS[0], tokens)
        since = proxy.traffic.since(before)
        counted.append((said, since.sent_bytes, since.received_bytes))
    (few, up, down), (many, all_up, all_down) = counted
    return (all_up - up) / (many - few), (all_down - down) / (many - few)


def _answer(url: str, plan: Plan, question: str, tokens: int = 0) -> tuple[float, int, str]:
    """Milliseconds a token after the first, how many there were, and what was said; raises `BenchError`."""
    messages = [{"role": "user", "content": question}]
    with Client(url) as client:
        *pieces, reply = client.stream("chat", messages, max_tokens=tokens or plan.tokens)
    if not isinstance(reply, Reply) or len(pieces) < _TOLD_APART:
        raise BenchError("an answer was too short to be timed")
    return reply.timing_ms["decode"] / (len(pieces) - 1), len(pieces), reply.text
