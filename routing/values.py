"""The values that routing takes and gives; all frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from routing.energy import Saving
from routing.power import Power

CHAT = "chat"
_UNWATCHED = Power()


@dataclass(frozen=True)
class Conditions:
    """What is known about the world when the decision is made; `remaining_ms` counts to the request's deadline.

    `device_ms` and `edge_ms` are how long the tiers may take (the edge with its network), `slow_device_ms` is what the
    device seldom exceeds, `least_edge_ms` what the edge seldom falls below; None: not known yet.
    `may_hedge` and `may_retry`: the budgets have something left. `saving`: what costs the battery least while it is to
    be saved; None: not known.
    """

    device_up: bool = True
    edge_up: bool = True
    remaining_ms: float = math.inf
    power: Power = _UNWATCHED
    device_ms: float | None = None
    slow_device_ms: float | None = None
    edge_ms: float | None = None
    least_edge_ms: float | None = None
    may_hedge: bool = False
    may_retry: bool = False
    saving: Saving | None = None


@dataclass(frozen=True)
class Request:
    """What of a request matters for routing. `tier` forces one; `local_only` outranks everything."""

    skill: str
    tier: Literal["auto", "device", "edge"] = "auto"
    local_only: bool = False
    chat_when_out_of_scope: bool = False
    threshold: float | None = None


@dataclass(frozen=True)
class Answer:
    """A tier answered. `confidence` None: not calibrated; `threshold`: the one the tier was calibrated to."""

    confidence: float | None = None
    threshold: float | None = None
    out_of_scope: bool = False


@dataclass(frozen=True)
class Failure:
    """A tier did not answer, or must not be asked.

    `retriable`: the connection broke, so that the same question may well be answered; `attempts` were made so far.
    """

    reason: str
    retriable: bool = False
    attempts: int = 1


@dataclass(frozen=True)
class Pending:
    """A tier was asked `waited_ms` ago. `forecast`: how sure it expects to be, as far as it said; see `Answer`."""

    waited_ms: float = 0.0
    forecast: float | None = None
    threshold: float | None = None


Outcome = Answer | Failure | Pending


@dataclass(frozen=True)
class Observed:
    """What this request has met so far: the device, the edge on the same skill, the edge as a chat partner."""

    device: Outcome | None = None
    edge: Outcome | None = None
    chat: Outcome | None = None


class Kind(StrEnum):
    """What to do next."""

    ASK_DEVICE = "ask device"
    ASK_EDGE = "ask edge"
    WAIT = "wait"
    ANSWER = "answer"
    FALL_BACK = "fall back"


@dataclass(frozen=True)
class Step:
    """One decision.

    `uses` names the field of `Observed` that an asked tier will fill, or whose answer is the reply.
    `route`, `reason` and `degraded` go into the reply of a last step (`ANSWER`, `FALL_BACK`).
    `spends` names the budget that a question is taken from. After `look_again_ms` of waiting (`WAIT`) things may look
    different, though nobody has answered.
    """

    kind: Kind
    uses: Literal["device", "edge", "chat", ""]
    route: str
    reason: str
    degraded: bool = False
    spends: Literal["hedge", "retry", ""] = ""
    look_again_ms: float = math.inf

    @property
    def is_last(self) -> bool:
        """True when nobody needs to be asked any more."""
        return self.kind in {Kind.ANSWER, Kind.FALL_BACK}
