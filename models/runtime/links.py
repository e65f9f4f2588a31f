"""What passes between the shards of a model, and the seam behind which it travels. Knows no network.

A shard opens one session per request on the shard that comes after it, sends pieces of states down, and gets an answer
to each piece that wants one: the last shard's pick of the next token, or its states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.runtime.sampling import Pick
from models.runtime.tier import Limits

Floats = NDArray[np.float32]


class Want(Enum):
    """What a piece is sent for: to be read, for the token that follows it, or for its normalised states."""

    NOTHING, TOKEN, STATES = range(3)


@dataclass(frozen=True)
class Choice:
    """How to pick a token: `draw`, from 0 to below 1, is all the chance there is in it.

    `allowed` are bits, most significant first, of the ids that may come next; empty: all may.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_logprobs: int = 0
    draw: float = 0.0
    allowed: bytes = b""

    @property
    def limits(self) -> Limits:
        """As `pick` takes them."""
        return Limits(temperature=self.temperature, top_p=self.top_p, top_logprobs=self.top_logprobs)

    def random(self) -> float:
        """The draw."""
        return self.draw


GREEDY = Choice()


@dataclass(frozen=True)
class Piece:
    """States (T, C) of T tokens, as the layers before left them, that follow the first `start` ones.

    What a shard holds behind those it forgets. A token is picked after each of the last tokens, by one of the
    `choices`; one at least where a token is wanted. One sent `again` was answered before: it is read as it was then,
    and gets no answer.
    """

    states: Floats
    start: int
    want: Want = Want.NOTHING
    choices: tuple[Choice, ...] = ()
    again: bool = False

    @property
    def answered(self) -> bool:
        """Whether there will be an answer to it."""
        return self.want is not Want.NOTHING and not self.again


Picks = tuple[Pick, ...]
Answer = Picks | Floats


@dataclass(frozen=True)
class Opening:
    """What a session is for: the graph variant it runs, and when, on this process's clock, it is of no use any more.

    Sessions with neighbouring `place`s at the head share passes, in so many `groups` as the head says; 0: as the shard
    thinks best.
    `prefix` are the keys of the blocks that the prompt begins with, which shards may hold from others. An `exact` one
    reads every token by the same weights, however many there are in a piece.
    """

    variant: str
    expires: float
    place: int = 0
    groups: int = 0
    prefix: tuple[bytes, ...] = ()
    exact: bool = False


class LinkSession(Protocol):
    """One request's way through the shards that come after; not for two threads at once."""

    @property
    def held_tokens(self) -> int:
        """Tokens of the prefix that the shard at the other end held when the session began."""

    @property
    def leaving(self) -> bool:
        """Whether the shard at the other end is about to stop: sessions had better move."""

    def send(self, piece: Piece) -> None:
        """Hand on a piece, and wait for nobody; that the link is lost shows when the answer is asked for."""

    def receive(self) -> Answer:
        """The answer to the oldest piece that wants one; raises `LinkLostError` or `ShardsLostError`."""

    def close(self) -> None:
        """Let go of everything at the other end; never raises."""


class Link(Protocol):
    """A way to one shard."""

    @property
    def name(self) -> str:
        """Which shard, for people."""

    def open(self, opening: Opening) -> LinkSession:
        """Begin a session, which the shard has taken when this returns; raises `LinkLostError`."""


def masked(logits: Floats, allowed: bytes) -> Floats:
    """Logits (V,) with −inf where the bits say no; raises `ValueError` for too few bits."""
    if not allowed:
        return logits
    bits = np.unpackbits(np.frombuffer(allowed, np.uint8))
    if len(bits) < len(logits):
        raise ValueError("there are fewer bits than ids")
    return np.where(bits[: len(logits)] != 0, logits, np.float32(-np.inf))


def allowed_bits(mask: Sequence[bool] | NDArray[np.bool_]) -> bytes:
    """Undo that: which ids may come next, as bits."""
    return np.packbits(np.asarray(mask, np.bool_)).tobytes()
