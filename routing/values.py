"""The values that routing takes and gives; all frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

CHAT = "chat"


@dataclass(frozen=True)
class Policy:
    """What the operator wants.

    `threshold`: confidence from which a device answer stays local; None takes the device's calibrated one.
    `least_edge_ms`: with less time left than this the edge is not asked.
    """

    threshold: float | None = None
    least_edge_ms: float = 10.0


@dataclass(frozen=True)
class Conditions:
    """What is known about the world when the decision is made; `remaining_ms` counts to the request's deadline."""

    device_up: bool = True
    edge_up: bool = True
    remaining_ms: float = math.inf


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
    """A tier did not answer, or must not be asked."""

    reason: str


Outcome = Answer | Failure


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
    ANSWER = "answer"
    FALL_BACK = "fall back"


@dataclass(frozen=True)
class Step:
    """One decision.

    `uses` names the field of `Observed` that an asked tier will fill, or whose answer is the reply.
    `route`, `reason` and `degraded` go into the reply of a last step (`ANSWER`, `FALL_BACK`).
    """

    kind: Kind
    uses: Literal["device", "edge", "chat", ""]
    route: str
    reason: str
    degraded: bool = False

    @property
    def is_last(self) -> bool:
        """True when nobody needs to be asked any more."""
        return self.kind in {Kind.ANSWER, Kind.FALL_BACK}
