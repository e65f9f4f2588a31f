"""Sends the same queries to each tier and to the cascade, and sums up what came back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench.client import Reply
from bench.metrics import Outcome, Point, Row, local_error, oracle, row, trade_off
from bench.queries import Query

ROW_OF = {"device": "device", "edge": "edge", "auto": "cascade"}
WARM_UP = 3


class Asks(Protocol):
    """What an evaluation needs of a client."""

    def ask(self, skill: str, text: str, model: str = "auto") -> Reply:
        """Send one utterance to one model."""
        ...


@dataclass(frozen=True)
class Answered:
    """One query and each model's reply."""

    query: Query
    replies: Mapping[str, Reply]


def ask_all(
    client: Asks, queries: Sequence[Query], models: Sequence[str], advance: Callable[[], None] = lambda: None
) -> list[Answered]:
    """Ask every model every query, one request at a time, interleaved so that load and warmth strike all alike.

    The first few queries are asked once before, uncounted. Raises `ServiceError`.
    """
    for query in queries[:WARM_UP]:
        for model in models:
            client.ask(query.skill, query.text, model)
    answered = []
    for number, query in enumerate(queries):
        turn = number % len(models)
        order = [*models[turn:], *models[:turn]]
        answered.append(Answered(query, {model: client.ask(query.skill, query.text, model) for model in order}))
        advance()
    return answered


def outcome(query: Query, reply: Reply) -> Outcome:
    """Compare an answer with the right one: whole frames, slots included."""
    frame = reply.frame or {}
    return Outcome(
        expected=query.intent,
        predicted=frame.get("intent"),
        right=frame.get("intent") == query.intent and dict(frame.get("slots") or {}) == dict(query.slots),
        local=reply.source == "device",
        latency_ms=reply.latency_ms,
        confidence=reply.confidence,
        network_bytes=reply.network_bytes,
        joules=reply.joules,
    )


@dataclass(frozen=True)
class Evaluation:
    """Every outcome, by row; `thresholds` are those the cascade used, by skill."""

    outcomes: Mapping[str, Sequence[Outcome]]
    thresholds: Mapping[str, float]
    skills: Sequence[str]  # of each query, in the order of the outcomes

    @property
    def rows(self) -> dict[str, Row]:
        """The table."""
        return {name: row(outcomes) for name, outcomes in self.outcomes.items()}

    @property
    def realised_local_error(self) -> float | None:
        """Share of wrong answers among the cascade's local ones."""
        return local_error(self.outcomes.get("cascade", ()))

    def of_skill(self, skill: str) -> Evaluation:
        """The part of one skill."""
        kept = {
            name: [o for o, s in zip(outcomes, self.skills, strict=True) if s == skill]
            for name, outcomes in self.outcomes.items()
        }
        thresholds = {s: t for s, t in self.thresholds.items() if s == skill}
        return Evaluation(kept, thresholds, [s for s in self.skills if s == skill])

    def trade_off(self) -> list[Point]:
        """Accuracy against share local; empty unless both tiers were asked."""
        if not {"device", "edge"} <= set(self.outcomes):
            return []
        return trade_off(list(zip(self.outcomes["device"], self.outcomes["edge"], strict=True)))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        thresholds = set(self.thresholds.values())
        return {
            "n": len(self.skills),
            "rows": {name: r.as_dict() for name, r in self.rows.items()},
            "realised_local_error": self.realised_local_error,
            "threshold": thresholds.pop() if len(thresholds) == 1 else dict(self.thresholds) or None,
        }


def evaluation(answered: Sequence[Answered]) -> Evaluation:
    """Sum answers up; the oracle's row comes with those of both tiers."""
    models = list(answered[0].replies) if answered else []
    outcomes = {ROW_OF[m]: [outcome(a.query, a.replies[m]) for a in answered] for m in ROW_OF if m in models}
    if {"device", "edge"} <= set(outcomes):
        outcomes["oracle"] = [oracle(d, e) for d, e in zip(outcomes["device"], outcomes["edge"], strict=True)]
    thresholds = {
        a.query.skill: a.replies["auto"].threshold
        for a in answered
        if "auto" in a.replies and a.replies["auto"].threshold is not None
    }
    return Evaluation(
        outcomes, {k: v for k, v in thresholds.items() if v is not None}, [a.query.skill for a in answered]
    )
