"""An answer on its way: one `Start`, any number of `Piece`s, one `End`. Tiers and dispatcher both speak it.

`Switch`, between pieces, is the dispatcher's alone.

`Report` and its parts are also the wire form of the `edgecascade` object, so one function reads what another wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

CONFIDENCE_HEADER = "X-Edgecascade-Confidence"
THRESHOLD_HEADER = "X-Edgecascade-Threshold"


class Value(BaseModel):
    """Frozen; a newer sender may add fields."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    def model_post_init(self, _context: Any, /) -> None:
        """Count every field as set: replies leave unset fields out, and these are always sent."""
        self.model_fields_set.update(type(self).model_fields)


class Timing(Value):
    """Milliseconds by part; the parts need not add up to `total`."""

    total: float = 0.0
    queue: float = 0.0
    network: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    first_token: float = 0.0


class NetworkBytes(Value):
    """Bytes that crossed between device site and edge site for this request, headers included."""

    sent: int = 0
    received: int = 0


class Joules(Value):
    """Energy of the answer and where the figure comes from."""

    value: float
    kind: str
    source: str


class Draft(Value):
    """What came of a draft: its tokens that the tier looked at, and those that it would have said itself.

    `ignored`: it looked at none, since its answer is a frame, which takes no steps that could be saved, or since its
    graph cannot verify several tokens.
    """

    proposed: int = 0
    accepted: int = 0
    ignored: bool = False


class Report(Value):
    """The `edgecascade` object: who answered, why, how sure, at what cost.

    `replaces`, in a stream: what that tier said so far is void, the answer begins again.
    """

    source: str
    route: str
    reason: str
    degraded: bool = False
    confidence: float | None = None
    threshold: float | None = None
    frame: dict[str, Any] | None = None
    model_version: str = ""
    node_id: str = ""
    timing_ms: Timing = Timing()
    network_bytes: NetworkBytes = NetworkBytes()
    joules: Joules | None = None
    draft: Draft | None = None
    replaces: str | None = None

    def headers(self) -> dict[str, str]:
        """The same in headers, as far as it is known."""
        values = {
            "X-Edgecascade-Source": self.source,
            "X-Edgecascade-Route": self.route,
            "X-Edgecascade-Reason": self.reason,
            "X-Edgecascade-Degraded": str(self.degraded).lower(),
        }
        if self.confidence is not None:
            values[CONFIDENCE_HEADER] = f"{self.confidence:.4f}"
        if self.threshold is not None:
            values[THRESHOLD_HEADER] = f"{self.threshold:.4f}"
        if self.timing_ms.total:
            parts = self.timing_ms.model_dump()
            values["Server-Timing"] = ", ".join(f"{name};dur={value:.2f}" for name, value in parts.items())
        return values


class Usage(Value):
    """Token counts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        """Add them up."""
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


@dataclass(frozen=True)
class Logprob:
    """One token with its natural-log probability and its best rivals."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Start:
    """The answer begins. `report` holds what is known before the first piece."""

    model: str
    report: Report


@dataclass(frozen=True)
class Switch:
    """Another tier answers: the pieces so far are void. `report` holds what is known of it, and whom it replaces."""

    report: Report


@dataclass(frozen=True)
class CallDelta:
    """Some more of a call of a function; `id` and `name` come with the first piece of it."""

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Piece:
    """Some more text, and some more of calls. `refuses`: it is no answer in the form that was asked for."""

    text: str
    logprobs: tuple[Logprob, ...] = ()
    calls: tuple[CallDelta, ...] = ()
    refuses: bool = False


@dataclass(frozen=True)
class End:
    """The answer is complete; `finish_reason` 'stop', 'length' or 'tool_calls'."""

    finish_reason: str
    usage: Usage
    report: Report


Event = Start | Switch | Piece | End
Events = Iterator[Event]
