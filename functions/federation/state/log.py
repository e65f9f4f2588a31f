"""The shared log: facts and turns of conversations, in one order that every reader sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

DELETED = "deleted"


@dataclass(frozen=True)
class Event:
    """Something that happened. `id` is the writer's, and makes a second sending harmless; `body` is JSON text.

    `kind` is fact, turn or, written by the log itself, deleted: the conversation's events are gone.
    """

    id: str
    conversation: str
    kind: str
    node: str
    body: str


@dataclass(frozen=True)
class Entry:
    """An event in its place. Sequence numbers rise and are never used twice; `at` is Unix seconds."""

    sequence: int
    at: float
    event: Event


@dataclass(frozen=True)
class Page:
    """Entries in order. `upto`: read on after this; `trimmed`: up to here events fell out of the log's bounds.

    A reader that stands before `trimmed` may have missed events.
    """

    entries: tuple[Entry, ...]
    upto: int
    trimmed: int


@dataclass(frozen=True)
class Bounds:
    """How much a log keeps: the oldest events go first."""

    max_events: int = 10_000
    retention_s: float = 86_400.0


class StateLog(Protocol):
    """What every log does. All of it raises `StoreError` when the store cannot be reached."""

    def append(self, event: Event) -> tuple[Entry, bool]:
        """Write it down for good; with an id that is known, return its entry and False.

        Raises `ConflictError` if that entry holds another event, `DeletedError` if the conversation was deleted.
        """

    def read(self, after: int, limit: int, conversation: str | None = None) -> Page:
        """The next entries after a sequence number, at most `limit`; of one conversation, where one is named."""

    def wait(self, after: int, timeout_s: float) -> None:
        """Return as soon as there may be an entry after `after`, or after `timeout_s`."""

    def is_deleted(self, conversation: str) -> bool:
        """Whether the conversation was deleted and takes nothing more."""

    def delete(self, conversation: str) -> int:
        """Delete a conversation's events and put a `deleted` in the order; returns how many there were."""

    def close(self) -> None:
        """Let go of the store."""


def is_same(known: Event, event: Event) -> bool:
    """Whether `event` is `known`, sent once more; it may come by way of another node."""
    return replace(event, node=known.node) == known


def marker(conversation: str) -> Event:
    """The event that says that a conversation was deleted; writers' ids hold no colon."""
    return Event(f"{DELETED}:{conversation}", conversation, DELETED, "", "null")
