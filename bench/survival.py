"""`bench survival`: shards are killed (SIGKILL) while they answer.

Is the answer the same, to the letter?

With two replicas of each range it must be; with one, the dispatcher's declared fallback must come in time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.bundle import Start, Variant
from bench.client import Client, Reply
from bench.errors import ServiceError
from bench.sharded import HEAD, Shard, Troupe, even_cut, n_layers, ports_for, shards, whole

QUESTIONS = (
    "Tell me a short story about the sea.",
    "What is a drone good for?",
    "Name three things that I can cook with rice.",
    "Why is the sky blue?",
    "How do I keep bread fresh?",
    "Write two sentences about winter.",
)
GREEDY: Mapping[str, Any] = {"temperature": 0}
_DISPATCHER = "dispatcher"
_TRIES = 5
"""How often a trial is made whose answer was over before the kill."""


@dataclass(frozen=True)
class Plan:
    """What to do; `tokens` an answer, times in milliseconds."""

    tier: Path
    shards: int = 2
    replicas: int = 2
    trials: int = 100
    seed: int = 1
    tokens: int = 48
    deadline_ms: float = 10_000.0
    threads: int = 2


@dataclass(frozen=True)
class Trial:
    """One answer, and who dies after how many pieces of it."""

    question: str
    sampling: Mapping[str, Any]
    head: int
    victim: int
    piece: int


@dataclass(frozen=True)
class Outcome:
    """`kind` is identical, fallback or lost; `why` what was lost.

    `struck`: the kill hit a session at work. `pause_ms`: the longest time without a piece from the kill on.
    """

    trial: Trial
    kind: str
    struck: bool = True
    pause_ms: float | None = None
    why: str = ""


Ask = Callable[[str, Mapping[str, Any]], Iterator[str | Reply]]


def trials(plan: Plan, lengths: Mapping[tuple[str, int], int], samplings: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Draw them by the seed; a piece is one that the answer has, so that every kill falls into it."""
    rng = random.Random(plan.seed)
    found = []
    for _ in range(plan.trials):
        question, number = rng.choice(QUESTIONS), rng.randrange(len(samplings))
        piece = rng.randrange(max(1, lengths[question, number] - 1))
        found.append(
            Trial(question, samplings[number], rng.randrange(plan.replicas), rng.randrange(plan.shards), piece)
        )
    return found


def measure(start: Start, plan: Plan, report: Callable[[int, int, str], None]) -> list[Outcome]:
    """Run all trials; raises `BenchError` if a bundle does not start."""
    samplings = [GREEDY, {"temperature": 0.8, "top_p": 0.95, "seed": plan.seed}]
    wanted = references(start, plan, samplings)
    lengths = {key: len(pieces) for key, pieces in wanted.items()}
    cut = even_cut(n_layers(plan.tier), plan.shards)
    cast = shards(cut, plan.replicas, plan.tier, ports_for(cut, plan.replicas), {"THREADS": str(plan.threads)})
    found = []
    with Troupe(start, cast) as troupe:
        for number, trial in enumerate(trials(plan, lengths, samplings), 1):
            text = "".join(wanted[trial.question, samplings.index(trial.sampling)])
            found.append(_until_struck(start, troupe, plan, trial, text))
            report(number, plan.trials, found[-1].kind)
    return found


def _until_struck(start: Start, troupe: Troupe, plan: Plan, trial: Trial, wanted: str) -> Outcome:
    """Try again, a few times, when the answer was over before the kill; what went wrong counts at once."""
    run = _survive if plan.replicas > 1 else _fall_back
    for _ in range(_TRIES):
        outcome = run(start, troupe, plan, trial, wanted)
        if outcome.struck or outcome.kind == "lost":
            break
    return outcome


def references(start: Start, plan: Plan, samplings: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[str]]:
    """What the tier in one piece answers, piece by piece."""
    found = {}
    with whole(start, plan.tier, THREADS=str(plan.threads)) as url, Client(url) as client:
        for question in QUESTIONS:
            for number, sampling in enumerate(samplings):
                said = _ask(client, plan)(question, sampling)
                found[question, number] = [piece for piece in said if isinstance(piece, str)]
    return found


def _ask(client: Client, plan: Plan, model: str = "auto") -> Ask:
    def ask(question: str, sampling: Mapping[str, Any]) -> Iterator[str | Reply]:
        messages = [{"role": "user", "content": question}]
        return client.stream("chat", messages, model, plan.tokens, fields=sampling, deadline_ms=plan.deadline_ms)

    return ask


@dataclass
class _Answer:
    """An answer as it comes in, in the middle of which somebody is killed."""

    troupe: Troupe
    trial: Trial
    head: Shard
    victim: Shard | None = None
    killed: float | None = None
    pieces: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)

    def read(self, said: Iterator[str | Reply]) -> Reply | None:
        """Read to the end; raises `ServiceError` if it breaks off."""
        for piece in said:
            if isinstance(piece, Reply):
                return piece
            self.pieces.append(piece)
            self.arrivals.append(time.perf_counter())
            self._kill_when_due()
        return None

    def _kill_when_due(self) -> None:
        if len(self.pieces) == 1 and self.victim is None:
            self.victim = self.head if self.trial.victim == HEAD else self.troupe.at_work(self.trial.victim)
        if self.victim is not None and self.killed is None and len(self.pieces) > self.trial.piece:
            self.killed = time.perf_counter()
            self.troupe.kill(self.victim)

    @property
    def pause_ms(self) -> float | None:
        """The longest time without a piece from the kill on, None if none came after it."""
        if self.killed is None:
            return None
        after = [self.killed, *(at for at in self.arrivals if at > self.killed)]
        return 1e3 * max((b - a for a, b in pairwise(after)), default=0.0) if len(after) > 1 else None


def _survive(_start: Start, troupe: Troupe, plan: Plan, trial: Trial, wanted: str) -> Outcome:
    """Ask a head; if it dies, ask another, from the beginning."""
    heads = [shard for shard in troupe.shards if shard.part == HEAD]
    first, second = heads[trial.head], heads[(trial.head + 1) % len(heads)]
    answer, lost = _Answer(troupe, trial, first), troupe.lost_links()
    try:
        broke = _broke_off(troupe, plan, answer, first)
        if broke and answer.victim is first:
            answer.pieces.clear()
            broke = _broke_off(troupe, plan, answer, second)
            struck = True
        else:
            struck = troupe.lost_links() > lost
    finally:
        if answer.killed is not None and answer.victim is not None:
            troupe.begin(answer.victim)
    if broke or "".join(answer.pieces) != wanted:
        return Outcome(trial, "lost", struck, why=broke or "the answer is another one")
    return Outcome(trial, "identical", struck, answer.pause_ms)


def _broke_off(troupe: Troupe, plan: Plan, answer: _Answer, head: Shard) -> str:
    """Ask a head and read its answer; returns why that broke off, '' if it did not."""
    try:
        with Client(troupe.url(head)) as client:
            answer.read(_ask(client, plan)(answer.trial.question, answer.trial.sampling))
    except ServiceError as error:
        return str(error)
    return ""


def _fall_back(start: Start, troupe: Troupe, plan: Plan, trial: Trial, wanted: str) -> Outcome:
    """Ask through a dispatcher: what it answers must say that it is a fallback, and come in time."""
    head = next(shard for shard in troupe.shards if shard.part == HEAD)
    answer = _Answer(troupe, trial, head)
    try:
        with _dispatcher(start, troupe.url(head)) as url, Client(url) as client:
            began = time.perf_counter()
            reply = answer.read(_ask(client, plan, "edge")(trial.question, trial.sampling))
            took_ms = 1e3 * (time.perf_counter() - began)
    except ServiceError as error:
        return Outcome(trial, "lost", why=str(error))
    finally:
        if answer.killed is not None and answer.victim is not None:
            troupe.begin(answer.victim)
            troupe.wait_ready(head)
    if reply is not None and not reply.degraded and "".join(answer.pieces) == wanted:
        return Outcome(trial, "identical", struck=False)
    if reply is None or not reply.degraded:
        return Outcome(trial, "lost", why="the answer does not say that it is a fallback")
    if took_ms > plan.deadline_ms:
        return Outcome(trial, "lost", why="the fallback came after the deadline")
    return Outcome(trial, "fallback")


@contextmanager
def _dispatcher(start: Start, edge: str) -> Iterator[str]:
    """A dispatcher that knows this edge and no device, new for each trial, so that it holds nothing against it."""
    environment = {"EDGE_URL": edge, "DEVICE_URL": "http://127.0.0.1:9"}
    with start({_DISPATCHER: Variant(_DISPATCHER, environment)}) as running:
        yield running.urls[_DISPATCHER]


@dataclass(frozen=True)
class Figures:
    """What came of all trials."""

    identical: int
    fallbacks: int
    lost: int
    struck: int
    resume_ms_p50: float | None
    resume_ms_max: float | None
    of_heads: int
    reasons: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Sequence[Outcome]) -> Figures:
        """Count; resume times are those of shards that are no head, whose answers stream on."""
        kinds = [outcome.kind for outcome in found]
        times = [o.pause_ms for o in found if o.pause_ms is not None and o.struck and o.trial.victim != HEAD]
        reasons = [o.why for o in found if o.why]
        return cls(
            kinds.count("identical"),
            kinds.count("fallback"),
            kinds.count("lost"),
            sum(o.struck for o in found),
            median(times) if times else None,
            max(times, default=None),
            sum(o.trial.victim == HEAD for o in found),
            {why: reasons.count(why) for why in dict.fromkeys(reasons)},
        )
