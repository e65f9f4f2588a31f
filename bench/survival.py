"""`bench survival`: shards are killed (SIGKILL) while they answer. Is the answer the same, to the letter?

With two replicas of each range it must be; with one, the dispatcher's declared fallback must come in time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.bundle import Start, Variant
from bench.client import Client, Reply
from bench.errors import BenchError, ServiceError
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
_READY_S, _POLL_S = 60.0, 0.1


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
    """`kind` is identical, fallback or lost; `why` what was lost; `resume_ms` from the kill to the next piece."""

    trial: Trial
    kind: str
    resume_ms: float | None = None
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
    cast = shards(cut, plan.replicas, plan.tier, ports_for(cut, plan.replicas), THREADS=str(plan.threads))
    found = []
    with Troupe(start, cast) as troupe:
        for number, trial in enumerate(trials(plan, lengths, samplings), 1):
            text = "".join(wanted[trial.question, samplings.index(trial.sampling)])
            run = _survive if plan.replicas > 1 else _fall_back
            found.append(run(start, troupe, plan, trial, text))
            report(number, plan.trials, f"{found[-1].kind}")
    return found


def references(
    start: Start, plan: Plan, samplings: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, int], list[str]]:
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
        return client.stream(
            "chat", messages, model, plan.tokens, fields=sampling, deadline_ms=plan.deadline_ms
        )

    return ask


@dataclass
class _Kill:
    """Kills once, when an answer has come so far."""

    troupe: Troupe
    trial: Trial
    head: Shard
    victim: Shard | None = None
    at: float = 0.0

    def when_due(self, pieces: int) -> None:
        """After a piece: is it time?"""
        if self.victim is not None or pieces <= self.trial.piece:
            return
        victim = self.head if self.trial.victim == HEAD else self.troupe.at_work(self.trial.victim)
        if victim is None:
            return  # the answer's end was on its way already, or the session is not there yet: at the next piece
        self.victim, self.at = victim, time.perf_counter()
        self.troupe.kill(victim)


def _survive(_start: Start, troupe: Troupe, plan: Plan, trial: Trial, wanted: str) -> Outcome:
    """Ask a head; one that dies is asked no more, but another is, from the beginning."""
    heads = [shard for shard in troupe.shards if shard.part == HEAD]
    order = [heads[(trial.head + n) % len(heads)] for n in range(len(heads))]
    kill, pieces, resumed, why = _Kill(troupe, trial, order[0]), list[str](), 0.0, "no head is left"
    try:
        for head in order:
            had, pieces = len(pieces), list[str]()
            try:
                with Client(troupe.url(head)) as client:
                    for piece in _ask(client, plan)(trial.question, trial.sampling):
                        if not isinstance(piece, str):
                            break
                        pieces.append(piece)
                        if kill.victim is not None and not resumed and len(pieces) > had:
                            resumed = time.perf_counter()
                        kill.when_due(len(pieces))
            except ServiceError as error:
                why = str(error)
                if kill.victim is not head:
                    break
            else:
                why = "the answer is another one"
                break
    finally:
        if kill.victim is not None:
            troupe.begin(kill.victim)
    if "".join(pieces) != wanted:
        return Outcome(trial, "lost", why=why)
    if kill.victim is None:
        return Outcome(trial, "lost", why="nobody was killed: no shard had a session")
    return Outcome(trial, "identical", 1e3 * (resumed - kill.at) if resumed else None)


def _fall_back(start: Start, troupe: Troupe, plan: Plan, trial: Trial, _wanted: str) -> Outcome:
    """Ask through a dispatcher: what it answers must say that it is a fallback, and come in time."""
    head = next(shard for shard in troupe.shards if shard.part == HEAD)
    kill = _Kill(troupe, trial, head)
    try:
        with _dispatcher(start, troupe.url(head)) as url, Client(url) as client:
            pieces, reply, began = 0, None, time.perf_counter()
            for piece in _ask(client, plan, "edge")(trial.question, trial.sampling):
                if isinstance(piece, Reply):
                    reply = piece
                    break
                pieces += 1
                kill.when_due(pieces)
            took_ms = 1e3 * (time.perf_counter() - began)
    except ServiceError as error:
        return Outcome(trial, "lost", why=str(error))
    finally:
        if kill.victim is not None:
            troupe.begin(kill.victim)
            _wait_ready(troupe.url(head))
    if kill.victim is None:
        return Outcome(trial, "lost", why="nobody was killed: no shard had a session")
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


def _wait_ready(url: str) -> None:
    import httpx

    ends = time.monotonic() + _READY_S
    while time.monotonic() < ends:
        if httpx.get(f"{url}/_/ready", trust_env=False, timeout=5.0).is_success:
            return
        time.sleep(_POLL_S)
    raise BenchError("the head was not ready again in time")


@dataclass(frozen=True)
class Figures:
    """What came of all trials."""

    identical: int
    fallbacks: int
    lost: int
    resume_ms_p50: float | None
    resume_ms_max: float | None
    of_heads: int
    reasons: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Sequence[Outcome]) -> Figures:
        """Count; resume times are those of shards that are no head, whose answers stream on."""
        kinds = [outcome.kind for outcome in found]
        times = [o.resume_ms for o in found if o.resume_ms is not None and o.trial.victim != HEAD]
        reasons = [o.why for o in found if o.why]
        return cls(
            kinds.count("identical"),
            kinds.count("fallback"),
            kinds.count("lost"),
            median(times) if times else None,
            max(times, default=None),
            sum(o.trial.victim == HEAD for o in found),
            {why: reasons.count(why) for why in dict.fromkeys(reasons)},
        )
