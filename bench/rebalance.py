"""`bench rebalance`: under a steady load a node gets slow, or dies; is there a new plan, and the SLO met again.

A request counts as lost if it got no answer by its deadline. One that got an error is sent again, as any client of
ours does that is told when to (Retry-After), and counts as failed besides.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.bundle import Placed, Placing, StartPlaced
from bench.client import Client, Reply
from bench.errors import BenchError, ServiceError
from bench.placed import LOOPBACK_MBIT_PER_S, Effects, nodes, problem
from bench.profile import model
from scaler.placement.rebalance import Action, Decision, Policy
from scaler.placement.values import Link, Plan, Problem, Workload

FAULTS = ("throttle", "kill")
QUESTION = "Tell me a long story about the sea, a lighthouse and an old man."
PROMPT_TOKENS = 46
LINK = Link(1.0, LOOPBACK_MBIT_PER_S)
"""What a hop takes here, one way, while more processes want the cores than there are;"""
POLICY = Policy(silent_s=1.5, sustained_s=5.0, interval_s=15.0, slow_factor=2.5, least_link_ms=25.0)
"""Quicker than in use, so that a run ends; and deaf to links, which are not what is broken here."""
RETRY_S = 0.25
DEADLINE_S = 60.0
UNDER = 5
"""So many answers in a row under the SLO, and it is met again."""
_AT_ONCE = 128
_FACTORS = (4.0, 5.0, 6.0, 7.0)


@dataclass(frozen=True)
class Trial:
    """What is done: `fault` to a node after `before_s` of load, which then goes on for `after_s`."""

    fault: str
    tier: Path
    rate: float = 0.5
    before_s: float = 20.0
    after_s: float = 90.0
    replicas: int = 1
    slowdown: float = 8.0
    slo_factor: float = 2.0
    tokens: int = 16


@dataclass(frozen=True)
class Answered:
    """One request: when it was sent and answered on the monotonic clock, `answered` or lost, after how many errors."""

    sent_s: float
    done_s: float
    answered: bool
    failures: int = 0
    errors: tuple[str, ...] = ()

    @property
    def latency_ms(self) -> float:
        """From when it was due to its answer, errors and waits included."""
        return 1e3 * (self.done_s - self.sent_s)


@dataclass(frozen=True)
class Move:
    """A decision that moves, and when it was taken."""

    at_s: float
    decision: Decision


@dataclass
class Run:
    """What came of a trial; times on the monotonic clock."""

    trial: Trial
    victim: str
    slo_ms: float
    before: Plan
    after: Plan
    fault_s: float
    moves: Sequence[Move]
    answers: Sequence[Answered] = field(default_factory=list)

    @property
    def decided_s(self) -> float | None:
        """From the fault to the decision to move."""
        return next((move.at_s - self.fault_s for move in self.moves if move.at_s >= self.fault_s), None)

    @property
    def recovered_s(self) -> float | None:
        """From the fault until requests were sent that met the SLO, several in a row; None if it was never so.

        Only requests sent after the decision count: before it nothing was put right.
        """
        if self.decided_s is None:
            return None
        later = self._sent_from(self.fault_s + self.decided_s)
        for first, *rest in (later[n : n + UNDER] for n in range(len(later) - UNDER + 1)):
            if all(self._is_under(a) for a in (first, *rest)):
                return first.done_s - self.fault_s
        return None

    @property
    def over_again(self) -> int:
        """Requests over the SLO that were sent after it was met again."""
        since_s = self.recovered_s
        return 0 if since_s is None else sum(not self._is_under(a) for a in self._sent_from(self.fault_s + since_s))

    def _sent_from(self, since_s: float) -> list[Answered]:
        return sorted((a for a in self.answers if a.sent_s >= since_s), key=lambda a: a.sent_s)

    def _is_under(self, answer: Answered) -> bool:
        return answer.answered and answer.latency_ms <= self.slo_ms


def check(name: str) -> str:
    """A fault by its name; raises `BenchError`."""
    if name not in FAULTS:
        raise BenchError(f"fault '{name}' is unknown; use {' or '.join(FAULTS)}")
    return name


def measure(start: StartPlaced, trial: Trial, report: Callable[[float, float, str], None]) -> Run:
    """Run one trial; raises `BenchError`, `PlacementError`."""
    total = trial.before_s + trial.after_s
    report(0, total, "measuring nodes")
    given, slowdown = site(trial)
    moves: list[Move] = []

    def told(decision: Decision) -> None:
        if decision.action is Action.MOVE:
            moves.append(Move(time.monotonic(), decision))

    environment = {"MODEL_PATH": str(trial.tier.absolute()), "THREADS": "1", "PREFIX_CACHE_MB": "0"}
    with start(Placing(given, POLICY, slowdown, environment, told)) as placed:
        before = placed.plan
        slo_ms = trial.slo_factor * before.prediction.request_ms
        victim = before.stages[-1].nodes[0]
        load = Load(lambda: ask(placed.url, trial.tokens), trial.rate)
        with load:
            _pass(trial.before_s, 0.0, total, report, "load")
            fault_s = time.monotonic()
            strike(placed, trial, victim, slowdown[victim])
            _pass(trial.after_s, trial.before_s, total, report, trial.fault)
        return Run(trial, victim, slo_ms, before, placed.plan, fault_s, moves, load.answers)


def strike(placed: Placed, trial: Trial, victim: str, factor: float) -> None:
    """Do to the node what the trial says."""
    if trial.fault == "kill":
        if not placed.kill(victim):
            raise BenchError(f"{victim} ran nothing that could be killed")
    else:
        placed.throttle(victim, factor * trial.slowdown)


def site(trial: Trial) -> tuple[Problem, dict[str, float]]:
    """Nodes as they are measured here, each slower than the one before; twice the layers fit into all of them."""
    factors = [f for f in _FACTORS for _ in range(trial.replicas)]
    tier = model(trial.tier)
    room = -(-2 * tier.n_layers // 3)
    workload = Workload(PROMPT_TOKENS, trial.tokens, context=512, sessions=2)
    with nodes(Effects(trial.tier, factors, scale=1.0)) as look:
        look()
        given = problem(look(), tier, workload, LINK, room)
    pins = () if trial.replicas > 1 else given.pins
    given = replace(given, pins=pins, replicas=trial.replicas)
    return given, {node.name: factor for node, factor in zip(given.nodes, factors, strict=True)}


def ask(url: str, tokens: int, clock: Callable[[], float] = time.monotonic) -> Answered:
    """Ask until there is an answer or the deadline has passed."""
    sent_s, errors = clock(), list[str]()
    while True:
        try:
            with Client(url, timeout_s=DEADLINE_S) as client:
                messages = [{"role": "user", "content": QUESTION}]
                *_, last = client.stream("chat", messages, max_tokens=tokens)
            if isinstance(last, Reply) and last.text:
                return Answered(sent_s, clock(), answered=True, failures=len(errors), errors=tuple(errors))
            errors.append("empty")
        except ServiceError as error:
            errors.append(str(error.status or "broken off"))
        if clock() - sent_s > DEADLINE_S:
            return Answered(sent_s, clock(), answered=False, failures=len(errors), errors=tuple(errors))
        time.sleep(RETRY_S)


@dataclass
class Load:
    """Requests at a constant rate while the block lasts, whatever comes back; `answers` is whole after it."""

    ask: Callable[[], Answered]
    rate: float
    answers: list[Answered] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._send, name="load")
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _send(self) -> None:
        futures: list[Future[Answered]] = []
        began = time.monotonic()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            while not self._stop.wait(max(0.0, began + len(futures) / self.rate - time.monotonic())):
                futures.append(pool.submit(self.ask))
        self.answers = [future.result() for future in futures]


def _pass(seconds: float, done_s: float, total_s: float, report: Callable[[float, float, str], None], say: str) -> None:
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        report(done_s + seconds - left, total_s, say)
        time.sleep(min(1.0, left))


def as_dict(run: Run) -> dict[str, Any]:
    """JSON-ready figures; times in seconds since the fault."""
    answered = [a for a in run.answers if a.answered]
    move = next((m.decision for m in run.moves if m.at_s >= run.fault_s), None)
    return {
        "fault": run.trial.fault,
        "node": run.victim,
        "sent": len(run.answers),
        "answered": len(answered),
        "failed": sum(a.failures for a in run.answers),
        "lost": len(run.answers) - len(answered),
        "errors": sorted({error for a in run.answers for error in a.errors}),
        "slo_ms": run.slo_ms,
        "reason": move.reason.value if move else None,
        "decided_s": run.decided_s,
        "recovered_s": run.recovered_s,
        "over_again": run.over_again,
        "moves": len(run.moves),
        "plan_before": _cut(run.before),
        "plan_after": _cut(run.after),
    }


def _cut(plan: Plan) -> dict[str, str]:
    return {"+".join(stage.nodes): stage.layers for stage in plan.stages}


def report(found: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """A few lines a run for a person, and JSON last."""
    for run in [] if as_json else found:
        print(
            f"{run['fault']} of {run['node']}: {run['sent']} requests sent, {run['failed']} failed and sent again, ",
            end="",
        )
        print(f"{run['lost']} lost")
        decided, recovered = (
            "never" if run[name] is None else f"{run[name]:.1f} s after it" for name in ("decided_s", "recovered_s")
        )
        print(f"  decided {decided} ({run['reason']}), under {run['slo_ms']:.0f} ms again {recovered}")
        print(f"  plan before: {run['plan_before']}; after: {run['plan_after']}")
    print(json.dumps({"runs": list(found)}))
