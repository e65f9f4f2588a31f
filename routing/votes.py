"""Weighted voting among tiers, field by field. Pure: votes and time come in as values.

A vote weighs its calibrated confidence times its node's reliability. Frames vote on the intent first; each slot is then
decided among those who voted for that intent, "no such slot" being a choice like any other. A vote in another shape
(text where others gave a frame) is a vote for another head. Weights are whole millionths, so that no sum depends on
the order of the votes; ties go to the answer that sorts first.

The stated confidence is the linear opinion pool (Stone 1961) with the votes' reliabilities as weights, where a vote for
anything else gives an answer nothing: a lower bound, and the smallest of the fields' where there are several.

Reliability is the mean of a Beta posterior over "agreed with what was decided, in time", whose counts fade
(`docs/decisions/0013-federation.md` says why these constants).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

LEAST_CONFIDENCE = 0.5
"""A vote counts for at least this: one node that claims certainty cannot outvote three that agree."""
PRIOR_GOOD, PRIOR_BAD = 4.0, 1.0
FADE = 0.95
"""What is left of the earlier observations with each new one: the last twenty count."""
CUT_SHORT = 0.1
"""Not to have voted when the others had decided: this much of a miss."""

_UNIT = 1_000_000
_ABSENT = ""  # sorts before any JSON: where weights are equal, no slot rather than a doubtful one


@dataclass(frozen=True)
class Ballot:
    """What one node says. `head` and the values of `fields` are JSON texts; `confidence` None: the node gave none."""

    node: str
    head: str
    fields: Mapping[str, str] = field(default_factory=dict)
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.confidence is not None and not 0 <= self.confidence <= 1:  # NaN too
            raise ValueError("a confidence must lie between 0 and 1")

    @classmethod
    def of_frame(cls, node: str, frame: Mapping[str, Any], confidence: float | None) -> Ballot:
        """Vote for a frame, `{"intent": …, "slots": {…}}`; raises `ValueError` for anything else."""
        intent, slots = frame.get("intent"), frame.get("slots", {})
        if set(frame) - {"intent", "slots"} or not isinstance(intent, str) or not isinstance(slots, Mapping):
            raise ValueError("a frame has an intent, slots, and nothing else")
        return cls(node, _json(["frame", intent]), {str(k): _json(v) for k, v in slots.items()}, confidence)

    @classmethod
    def of_text(cls, node: str, text: str, confidence: float | None) -> Ballot:
        """Vote for a text, to the letter."""
        return cls(node, _json(["text", text]), {}, confidence)


@dataclass(frozen=True)
class Result:
    """The answer ahead. `backers` voted for its head, the heaviest first; `votes` and `of`: how many of how many."""

    head: str
    fields: Mapping[str, str]
    confidence: float | None
    backers: tuple[str, ...]
    votes: int
    of: int

    @property
    def frame(self) -> dict[str, Any] | None:
        """The frame that was decided, None where it is a text."""
        kind, intent = json.loads(self.head)
        if kind != "frame":
            return None
        return {"intent": intent, "slots": {name: json.loads(value) for name, value in sorted(self.fields.items())}}


@dataclass(frozen=True)
class Outcome:
    """How an election ended. `reason`: decided, all_voted, deadline, no_quorum, or no_votes, which has no result."""

    result: Result | None
    reason: str
    degraded: bool


@dataclass(frozen=True)
class Election:
    """One question put to the nodes of `reliability`, each between 0 and 1; at least `quorum` votes make it count.

    `silent` are nodes that will not vote any more: failed, refused, or malformed.
    """

    reliability: Mapping[str, float]
    quorum: int
    ballots: tuple[Ballot, ...] = ()
    silent: frozenset[str] = frozenset()

    @property
    def pending(self) -> frozenset[str]:
        """Who may still vote."""
        return frozenset(self.reliability) - {ballot.node for ballot in self.ballots} - self.silent

    def cast(self, ballot: Ballot) -> Election:
        """Take a vote; a second one of the same node, or one of a stranger, changes nothing."""
        return replace(self, ballots=(*self.ballots, ballot)) if ballot.node in self.pending else self

    def drop(self, node: str) -> Election:
        """Wait no longer for a node."""
        return replace(self, silent=self.silent | {node}) if node in self.pending else self

    def outcome(self, *, expired: bool = False) -> Outcome | None:
        """How it ended, or None while it is open: as soon as the votes to come cannot change it, or when time is up."""
        count = _Count(self)
        closed = expired or not self.pending
        if not self.ballots:
            return Outcome(None, "no_votes", degraded=True) if closed else None
        votes = len(self.ballots)
        has_quorum, may_have = votes >= self.quorum, votes + len(self.pending) >= self.quorum
        settled = not self.pending or (count.is_settled and has_quorum == may_have)
        if not (settled or expired):
            return None
        if not has_quorum:
            return Outcome(count.result, "no_quorum", degraded=True)
        if settled:
            return Outcome(count.result, "decided" if self.pending else "all_voted", degraded=False)
        return Outcome(count.result, "deadline", degraded=True)


class _Count:
    """The votes of an election, counted."""

    def __init__(self, election: Election) -> None:
        self._reliability = election.reliability
        self._ballots = sorted(election.ballots, key=lambda ballot: ballot.node)
        self._to_come = sum(_millionths(election.reliability[node]) for node in election.pending)
        self._heads = _tally((ballot.head, self._weight(ballot)) for ballot in self._ballots)
        self._head = _first(self._heads)
        self._backers = [ballot for ballot in self._ballots if ballot.head == self._head]
        self._slots = {
            name: _tally((ballot.fields.get(name, _ABSENT), self._weight(ballot)) for ballot in self._backers)
            for name in sorted({name for ballot in self._backers for name in ballot.fields})
        }

    @property
    def result(self) -> Result:
        """The answer ahead."""
        chosen = {name: _first(tally) for name, tally in self._slots.items()}
        pools = [self._pool(self._backers)]
        for name, value in chosen.items():
            pools.append(self._pool(b for b in self._backers if b.fields.get(name, _ABSENT) == value))
        stated = any(ballot.confidence is not None for ballot in self._backers)
        heaviest = sorted(self._backers, key=lambda ballot: (-self._weight(ballot), ballot.node))
        return Result(
            head=self._head,
            fields={name: value for name, value in chosen.items() if value != _ABSENT},
            confidence=min(pools) if stated else None,
            backers=tuple(ballot.node for ballot in heaviest),
            votes=len(self._ballots),
            of=len(self._reliability),
        )

    @property
    def is_settled(self) -> bool:
        """True when no votes to come, whatever they say, change the answer ahead.

        Once the head is settled its backers outweigh all votes to come, so that no slot can be added that none of
        them named.
        """
        if not self._leads_for_good(self._heads, may_tie=False):
            return False
        return all(
            self._leads_for_good({_ABSENT: 0, **tally}, may_tie=_first(tally) == _ABSENT)
            for tally in self._slots.values()
        )

    def _leads_for_good(self, tally: Mapping[str, int], *, may_tie: bool) -> bool:
        """Whether the leader stays ahead of any rival that gets every vote to come.

        A choice that nobody made yet may sort before the leader and win a tie, unless the leader `may_tie`.
        """
        leader = _first(tally)
        if tally[leader] < self._to_come or (tally[leader] == self._to_come and not may_tie):
            return False
        rivals = (choice for choice in tally if choice != leader)
        return all((-tally[leader], leader) < (-tally[rival] - self._to_come, rival) for rival in rivals)

    def _weight(self, ballot: Ballot) -> int:
        return _millionths(self._reliability[ballot.node] * max(ballot.confidence or 0.0, LEAST_CONFIDENCE))

    def _pool(self, backers: Iterable[Ballot]) -> float:
        """The P(right) that the voters together give an answer, as far as they said."""
        asked = sum(_millionths(self._reliability[ballot.node]) for ballot in self._ballots)
        given = sum(_millionths(self._reliability[b.node] * (b.confidence or 0.0)) for b in backers)
        return given / asked if asked else 0.0


@dataclass(frozen=True)
class Standing:
    """What is remembered of a node: fading counts of votes that agreed in time, and of those that did not."""

    good: float = 0.0
    bad: float = 0.0

    @property
    def reliability(self) -> float:
        """The posterior's mean; between 0.16 and 0.96 with the constants above, so that a node can come back."""
        return (PRIOR_GOOD + self.good) / (PRIOR_GOOD + PRIOR_BAD + self.good + self.bad)

    def after(self, good: float, bad: float) -> Standing:
        """The standing with one more observation."""
        return Standing(self.good * FADE + good, self.bad * FADE + bad)


def learn(
    standings: Mapping[str, Standing], election: Election, outcome: Outcome, failed: Collection[str]
) -> dict[str, Standing]:
    """The standings after an election. `failed`: nodes that erred or were not there.

    Who had not voted at the deadline has missed as they have; who was cut short by a decision has missed a little. A
    vote agreed by the share of its fields that were decided as it said. What was no choice teaches nothing: without a
    quorum, with a single vote, or among free texts.
    """
    result = outcome.result
    judged = result is not None and outcome.reason != "no_quorum" and len(election.ballots) > 1 and result.frame
    learned = dict(standings)
    for node in failed:
        learned[node] = learned[node].after(0.0, 1.0)
    for node in election.pending - set(failed):
        learned[node] = learned[node].after(0.0, CUT_SHORT if outcome.reason == "decided" else 1.0)
    for ballot in election.ballots:
        if judged and result is not None:
            good = _agreement(ballot, result)
            learned[ballot.node] = learned[ballot.node].after(good, 1.0 - good)
    return learned


def _agreement(ballot: Ballot, result: Result) -> float:
    """The share of fields, intent and slots of either, on which a vote and the result agree; 0 with another intent."""
    if ballot.head != result.head:
        return 0.0
    names = {*ballot.fields, *result.fields}
    same = sum(ballot.fields.get(name) == result.fields.get(name) for name in names)
    return (1 + same) / (1 + len(names))


def _tally(votes: Iterable[tuple[str, int]]) -> dict[str, int]:
    weights: dict[str, int] = defaultdict(int)
    for choice, weight in votes:
        weights[choice] += weight
    return dict(weights)


def _first(tally: Mapping[str, int]) -> str:
    """The heaviest choice; of equal ones the one that sorts first."""
    return min(tally, key=lambda choice: (-tally[choice], choice), default=_ABSENT)


def _millionths(value: float) -> int:
    return math.floor(_UNIT * value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
