"""What keeps answers: the values, the bounds, and the one interface that every store implements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

_OVERHEAD_BYTES = 512
_FEATURE_BYTES = 64


@dataclass(frozen=True)
class Entry:
    """One answer.

    `key` stands for the whole request, `scope` for all of it but the question's wording ('' where only the exact
    request may have the answer): neither question is kept, only digests. `features` are those of the question. Times
    are seconds since the epoch; `frame` is JSON, '' for none.
    """

    tenant: str
    key: str
    scope: str
    conversation: str
    text: str
    model: str
    model_version: str
    frame: str
    made_s: float
    expires_s: float
    features: Mapping[int, float] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """What it is counted as; about what it takes."""
        texts = (self.tenant, self.key, self.scope, self.conversation, self.text, self.model, self.frame)
        return _OVERHEAD_BYTES + sum(len(text.encode()) for text in texts) + _FEATURE_BYTES * len(self.features)


@dataclass(frozen=True)
class Bounds:
    """The most that a store holds, over all tenants."""

    entries: int = 2000
    bytes: int = 16 << 20


@dataclass(frozen=True)
class Held:
    """What a store holds now."""

    entries: int
    bytes: int


class StoreError(Exception):
    """The store cannot be read or written now."""


class AnswerStore(Protocol):
    """Keeps answers within bounds. Safe to use from several threads; time is an argument; may raise `StoreError`.

    Where an answer has no room, the tenant that holds the most loses what it has not used for longest: nobody can
    drive another's answers out by asking much.
    """

    def put(self, entry: Entry) -> bool:
        """Keep an answer, in place of one with its tenant and key; False if it alone is over the bounds."""

    def get(self, tenant: str, key: str, now_s: float) -> Entry | None:
        """The tenant's answer to a request; it counts as used."""

    def nearest(
        self, tenant: str, scope: str, features: Mapping[int, float], now_s: float
    ) -> tuple[Entry, float] | None:
        """The tenant's answer whose question is most like one, with the cosine; None where none is like it at all."""

    def forget(self, tenant: str, conversation: str) -> int:
        """Delete what came of a conversation; gives how many answers that were."""

    def purge(self, now_s: float) -> int:
        """Delete what has expired; gives how many answers that were."""

    def held(self) -> Held:
        """How much there is, expired answers that were not purged included."""
