"""`bench placed`: does a plan keep its word? Slowed shards on this machine, the planned cut beside the even one.

Each round measures the nodes, asks both cuts, and predicts from what it measured itself, so that whatever else the
machine does meets all three; figures are medians over rounds.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise, permutations
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.bundle import Start
from bench.client import Client, Reply
from bench.errors import BenchError
from bench.profile import Plan as Effort
from bench.profile import Times, model, stopwatch
from bench.sharded import HEAD, Troupe, ports_for, shards
from scaler.placement.plan import place
from scaler.placement.predict import predict
from scaler.placement.values import Goal, Link, Model, Node, Problem, Rule, Stage, Workload

QUESTION = "Tell me a long story about the sea, a lighthouse and an old man."
LOOPBACK_MBIT_PER_S = 10_000.0
_HOP_MS = 0.3
"""What a hop is taken for, one way, until it was measured; it does not sway the plan."""
_TOLD_APART = 2


@dataclass(frozen=True)
class Effects:
    """What to measure: `factors` by which nodes are slower than this machine, the first the one that is asked.

    All of them are slowed by `scale` besides, so that the engine and not the scheduler decides. `room` is how many
    layers a node's memory holds beside both ends.
    """

    tier: Path
    factors: Sequence[float] = (1.0, 3.0, 9.0)
    scale: float = 4.0
    room: int = 14
    rounds: int = 9
    tokens: int = 48


@dataclass(frozen=True)
class Counts:
    """What a shard counted: single-token passes here, steps answered here and beyond, steps handed on; in seconds."""

    passes: float = 0.0
    pass_s: float = 0.0
    steps: float = 0.0
    step_s: float = 0.0
    links: float = 0.0
    link_s: float = 0.0
    prompt_tokens: float = 0.0

    def since(self, before: Counts) -> Counts:
        """What came together meanwhile."""
        return Counts(*(now - then for now, then in zip(vars(self).values(), vars(before).values(), strict=True)))


@dataclass(frozen=True)
class Timing:
    """One answer: until its first token, and from one token to the next; what of that are hops, there and back each.

    `own_ms`: what each token costs beside passes and hops: detokenising, sending.
    """

    prompt_ms: float
    token_ms: float
    hops_ms: Sequence[float] = ()
    own_ms: float = 0.0
    prompt_tokens: int = 0


Ask = Callable[[], Timing]


@dataclass
class Row:
    """One cut over all rounds."""

    stages: Sequence[Stage]
    timings: list[Timing] = field(default_factory=list)
    predicted: list[tuple[float, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready medians; errors are medians of each round's own."""
        pairs = list(zip(self.timings, self.predicted, strict=True))
        return {
            "layers": {stage.nodes[0]: stage.layers for stage in self.stages},
            "token_ms": median(t.token_ms for t in self.timings),
            "predicted_token_ms": median(token for token, _ in self.predicted),
            "token_error": median(token / t.token_ms - 1 for t, (token, _) in pairs),
            "first_token_ms": median(t.prompt_ms for t in self.timings),
            "predicted_first_token_ms": median(prompt for _, prompt in self.predicted),
            "first_token_error": median(prompt / t.prompt_ms - 1 for t, (_, prompt) in pairs),
            "hop_ms": median(ms for t in self.timings for ms in t.hops_ms) if len(self.stages) > 1 else None,
        }


def figures(rows: Mapping[str, Row]) -> dict[str, Any]:
    """The verdict over both cuts; `prediction_error` is the largest of the four."""
    planned, even = (rows[name].as_dict() for name in ("planned", "even"))
    errors = [row[name] for row in (planned, even) for name in ("token_error", "first_token_error")]
    return {
        "planned_ms": planned["token_ms"],
        "even_ms": even["token_ms"],
        "ratio": even["token_ms"] / planned["token_ms"],
        "prediction_error": max(errors, key=abs),
        "planned": planned,
        "even": even,
    }


def problem(times: Sequence[Times], tier: Model, workload: Workload, link: Link, room: int) -> Problem:
    """Nodes as they were measured, of little memory, the first one with the first layer, since it is asked."""
    size = (room * max(layer.size_bytes for layer in tier.layers)) + tier.first_bytes + tier.last_bytes
    size += room * tier.kv_bytes * workload.context * workload.sessions
    nodes = [Node(f"node-{n}", size, *vars(t).values()) for n, t in enumerate(times)]
    links = dict.fromkeys(permutations([node.name for node in nodes], 2), link)
    return Problem(nodes, links, tier, workload, pins=[Rule(nodes[0].name, range(1))])


def evenly(given: Problem) -> list[Stage]:
    """The cut that knows nothing of nodes: all of them, as many layers each."""
    edges = [round(n * given.model.n_layers / len(given.nodes)) for n in range(len(given.nodes) + 1)]
    return [Stage((node.name,), a, b) for node, (a, b) in zip(given.nodes, pairwise(edges), strict=True)]


def measure(start: Start, what: Effects, report: Callable[[int, int, str], None]) -> dict[str, Row]:
    """Plan from a first look at the nodes, then measure both cuts in rounds; raises `BenchError`, `InfeasibleError`."""
    tier, workload = model(what.tier), Workload(prompt_tokens=32, answer_tokens=what.tokens, context=512, sessions=1)
    total = what.rounds + 2
    with ExitStack() as stack:
        look = stack.enter_context(nodes(what))
        report(0, total, "nodes")
        look()
        loopback = Link(_HOP_MS, LOOPBACK_MBIT_PER_S)
        given = problem(look(), tier, workload, loopback, what.room)
        rows = {"planned": Row(place(given, Goal.LATENCY).stages), "even": Row(evenly(given))}
        asks: dict[str, Ask] = {}
        for number, (name, row) in enumerate(rows.items()):
            report(number, total, f"starting the {name} cut")
            asks[name] = stack.enter_context(running(start, what, row.stages))
            asks[name]()  # the first one warms up
        for number in range(what.rounds):
            report(2 + number, total, "asking")
            times, found = look(), {name: ask() for name, ask in asks.items()}
            for name, row in rows.items():
                row.timings.append(found[name])
                row.predicted.append(_predicted(what, times, tier, row.stages, _others(found, name)))
    report(total, total, "")
    return _with_request(rows)


def _with_request(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Add to each first token what a request takes besides, as the other cut has it: HTTP, tokenising, sessions."""
    besides = {
        name: median(t.prompt_ms - first_ms for t, (_, first_ms) in zip(row.timings, row.predicted, strict=True))
        for name, row in rows.items()
    }
    others = {name: max(0.0, *(ms for other, ms in besides.items() if other != name)) for name in rows}
    return {
        name: replace(row, predicted=[(token_ms, first_ms + others[name]) for token_ms, first_ms in row.predicted])
        for name, row in rows.items()
    }


def _others(found: Mapping[str, Timing], name: str) -> Timing:
    """The other cut's answer: hops and what the head does itself are predicted from there."""
    return next((t for other, t in found.items() if other != name and t.hops_ms), found[name])


def _predicted(
    what: Effects, times: Sequence[Times], tier: Model, stages: Sequence[Stage], seen: Timing
) -> tuple[float, float]:
    """(a token, the first token) in milliseconds."""
    busy_ms = Link(0.0, LOOPBACK_MBIT_PER_S).busy_ms(tier.hidden_bytes)
    hop_ms = max(0.0, median(seen.hops_ms) - busy_ms) / 2
    workload = Workload(seen.prompt_tokens, what.tokens, context=512, sessions=1)
    given = problem(times, tier, workload, Link(hop_ms, LOOPBACK_MBIT_PER_S), tier.n_layers)
    says = predict(given, stages)
    return says.token_ms + seen.own_ms, says.prompt_ms


@contextmanager
def nodes(what: Effects) -> Iterator[Callable[[], list[Times]]]:
    """Lend what measures all nodes once: this machine, slowed by each factor."""
    with tempfile.TemporaryDirectory(prefix="edgecascade-") as folder:
        file = Path(folder) / "slowdown"
        file.write_text("1", "ascii")
        with stopwatch(what.tier, Effort(prompt_tokens=48, tokens=24, threads=1, slowdown_file=file)) as look:

            def all_of_them() -> list[Times]:
                found = []
                for factor in what.factors:
                    file.write_text(f"{what.scale * factor:g}", "ascii")
                    found.append(look())
                return found

            yield all_of_them


@contextmanager
def running(start: Start, what: Effects, stages: Sequence[Stage]) -> Iterator[Ask]:
    """A cut at work, for the while: a process a stage, one engine thread each, as slow as its node."""
    cut = [range(stage.first, stage.stop) for stage in stages]
    cast = shards(cut, 1, what.tier, ports_for(cut, 1), {"THREADS": "1", "SHARD_SPIN": "0", "PREFIX_CACHE_MB": "0"})
    factors = [what.scale * what.factors[int(stage.nodes[0].removeprefix("node-"))] for stage in stages]
    slowed = [shard.slowed(factors[shard.part]) for shard in cast]
    with Troupe(start, slowed) as troupe:
        urls = [troupe.url(shard) for shard in sorted(slowed, key=lambda s: s.part)]
        yield lambda: _timed(urls, what.tokens)


def _timed(urls: Sequence[str], tokens: int) -> Timing:
    before = [counts(url) for url in urls]
    began = time.perf_counter()
    first_ms = None
    n_pieces, reply = 0, None
    with Client(urls[HEAD]) as client:
        for piece in client.stream("chat", [{"role": "user", "content": QUESTION}], max_tokens=tokens):
            if isinstance(piece, Reply):
                reply = piece
                continue
            n_pieces += 1
            first_ms = 1e3 * (time.perf_counter() - began) if first_ms is None else first_ms
    if reply is None or first_ms is None or n_pieces < _TOLD_APART:
        raise BenchError("an answer was too short to be timed")
    since = [counts(url).since(then) for url, then in zip(urls, before, strict=True)]
    steps = max(since[HEAD].passes - 1, 1.0)  # the first one ends the prompt
    token_ms = reply.timing_ms["decode"] / steps
    hops_ms = [1e3 * (one.link_s / one.links - other.step_s / other.steps) for one, other in pairwise(since)]
    passes_ms = sum(1e3 * shard.pass_s / shard.passes for shard in since)
    prompt_tokens = int(since[HEAD].prompt_tokens)
    return Timing(first_ms, token_ms, hops_ms, token_ms - passes_ms - sum(hops_ms), prompt_tokens)


_SERIES = {
    "passes": "passes_total",
    "pass_s": "pass_seconds_total",
    "steps": "shard_steps_total",
    "step_s": "shard_step_seconds_total",
    "links": "link_steps_total",
    "link_s": "link_seconds_total",
    "prompt_tokens": r'tokens_total\{[^}]*kind="prompt"[^}]*\}',
}


def counts(url: str) -> Counts:
    """A shard's page, as far as it is of use here; raises `BenchError`."""
    try:
        page = httpx.get(f"{url}/metrics", timeout=5.0, trust_env=False).text
    except httpx.HTTPError as error:
        raise BenchError(f"{url} does not show its metrics") from error
    found = {}
    for name, series in _SERIES.items():
        labels = "" if "{" in series else r"(?:\{[^}]*\})?"
        values = re.findall(rf"^edgecascade_{series}{labels} (\S+)$", page, re.MULTILINE)
        found[name] = sum(map(float, values))
    return Counts(**found)


def report(found: Mapping[str, Any], *, as_json: bool) -> None:
    """A line a cut for a person, and JSON last."""
    if not as_json:
        for name in ("planned", "even"):
            row = found[name]
            cut = ", ".join(f"{layers} on {node}" for node, layers in row["layers"].items())
            print(f"{name}: {cut}")
            for what, title in (("token", "a token"), ("first_token", "the first token")):
                measured, said, off = row[f"{what}_ms"], row[f"predicted_{what}_ms"], row[f"{what}_error"]
                print(f"  {title}: {measured:.1f} ms measured, {said:.1f} predicted ({100 * off:+.1f} %)")
        print(f"the even cut takes {found['ratio']:.2f} times as long a token")
    print(json.dumps(found))
