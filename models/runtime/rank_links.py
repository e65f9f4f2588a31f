"""Ranks on other nodes: rank 0 opens a session at each of them for a request, and all sums meet at rank 0.

The last rank is sent the sum of the ranks before it, which does not wait for its own part, and adds that itself; the
others are sent the total. So two ranks swap their parts, and with more a sum takes two ways. When a rank is lost, the
session begins anew at all ranks, with a replica in its place, and what was read is read again in the same pieces: every
pass is the same as it was, and so are its bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import LinkLostError, RankLostError, ShardsLostError
from models.runtime.links import GREEDY, Answer, Link, LinkSession, Opening, Piece, Want
from models.runtime.pipeline import Replicas
from models.runtime.ranked import RankLayers
from models.runtime.turns import Turns

Floats = NDArray[np.float32]


class _LostError(RankLostError):
    """One of the other ranks is gone."""

    def __init__(self, other: _Other, reason: LinkLostError) -> None:
        super().__init__(str(reason))
        self.other = other


@dataclass(frozen=True)
class _Other:
    """Another rank's end of this session."""

    number: int
    link: Link
    session: LinkSession

    def send(self, piece: Piece) -> None:
        try:
            self.session.send(piece)
        except LinkLostError as error:
            raise _LostError(self, error) from error

    def receive(self) -> Answer:
        try:
            return self.session.receive()
        except LinkLostError as error:
            raise _LostError(self, error) from error

    def part(self, like: Floats) -> Floats:
        """Its part of a sum."""
        answer = self.receive()
        if not isinstance(answer, np.ndarray) or answer.shape != like.shape:
            raise _LostError(self, LinkLostError(f"{self.link.name} answered a sum with something else"))
        return answer

    def logits(self) -> Floats:
        """Its rows of the logits."""
        answer = self.receive()
        if not isinstance(answer, np.ndarray) or answer.ndim != 1:
            raise _LostError(self, LinkLostError(f"{self.link.name} answered with no logits"))
        return answer


class LinkedExchange:
    """Rank 0's end of an `Exchange` over links."""

    def __init__(self, others: Sequence[_Other]) -> None:
        self._between, self._last = others[:-1], others[-1]

    def total(self, part: Floats) -> Floats:
        """The sum of all ranks' parts (1, T, C)."""
        total = part[0].copy()
        for other in self._between:
            total += other.part(total)
        self._last.send(Piece(total, 0))
        total = total + self._last.part(total)
        for other in self._between:
            other.send(Piece(total, 0))
        return np.asarray(total[None])

    def joined(self, part: Floats) -> Floats:
        """All ranks' parts."""
        return np.concatenate([part, *(other.logits() for other in (*self._between, self._last))])


class LinkedGroup:
    """A `Group` of which rank 0 is in this process; `replicas` lead to each of the other ranks, in order."""

    def __init__(self, layers: RankLayers, replicas: Sequence[Replicas]) -> None:
        self.layers, self.replicas, self.turns = layers, tuple(replicas), Turns()

    @contextmanager
    def session(self, opening: Opening) -> Iterator[LinkedSession]:
        """Lend an empty session; waits while all are in use. Nobody is asked before it is read from."""
        with self.layers.places.lend() as slot:
            session = LinkedSession(self, slot, opening)
            try:
                yield session
            finally:
                session.reset()


class LinkedSession:
    """One request's tokens at all ranks; keeps what it sent, to send it again when a rank is lost."""

    def __init__(self, group: LinkedGroup, slot: int, opening: Opening) -> None:
        self._group, self._slot, self._opening = group, slot, opening
        self.length = 0
        self._sent: list[Floats] = []
        self._at = 0  # tokens that the ranks have read
        self._others: list[_Other] = []
        self._ahead: dict[int, _Other] = {}  # opened before those that they stand in for are left
        self._tried: set[str] = set()
        self._reason, self._stays = "there is none", False

    def read(self, states: Floats, want: Want) -> Floats:
        """Read states (T, C) at all ranks; each replica is tried once. Raises `ShardsLostError`."""
        self._group.layers.check_room(len(states), self.length)
        lost: list[Replicas] = []
        while True:
            try:
                self._ready()
                found = self._pass(states, want)
                break
            except _LostError as error:
                lost.append(self._note(error))
        for replicas in lost:
            replicas.count(resumed=1)
        self._sent.append(states)
        self.length += len(states)
        self._tried.clear()
        self._leave()
        return found

    def reset(self) -> None:
        """Let go of everything."""
        self._close()
        for other in self._ahead.values():
            other.session.close()
        self._ahead, self._stays, self.length = {}, False, 0
        self._sent.clear()

    def _ready(self) -> None:
        """See to it that all ranks have read what was sent; raises `_LostError`, `ShardsLostError`."""
        if self._others:
            return
        for number, replicas in enumerate(self._group.replicas, 1):
            ahead = self._ahead.pop(number) if number in self._ahead else None
            self._others.append(ahead or self._opened(number, replicas))
        for states in self._sent:
            self._pass(states, Want.NOTHING)

    def _opened(self, number: int, replicas: Replicas) -> _Other:
        """A session at the first replica of a rank that takes one; raises `ShardsLostError`."""
        for link in replicas.in_order():
            if link.name in self._tried:
                continue
            try:
                return _Other(number, link, link.open(self._opening))
            except LinkLostError as error:
                replicas.failed(link)
                self._tried.add(link.name)
                self._reason = str(error)
        replicas.count(ended=1)
        raise ShardsLostError(
            f"no node is left that runs rank {number} ({replicas.name}); the last reason: {self._reason}"
        )

    def _pass(self, states: Floats, want: Want) -> Floats:
        found: list[Floats] = []

        def run(_: object) -> None:
            choices = (GREEDY,) if want is Want.TOKEN else ()  # rank 0 picks; a wish for a token has one
            for other in self._others:
                other.send(Piece(states, self._at, want, choices))
            layers, exchange = self._group.layers, LinkedExchange(self._others)
            found.append(layers.run(self._opening.variant, self._slot, states, self._at, want, exchange))

        self._group.turns.take(self, self._opening.expires, run)
        self._at += len(states)
        return found[0]

    def _note(self, lost: _LostError) -> Replicas:
        """Take note of a loss, which ends the session at all ranks."""
        replicas = self._group.replicas[lost.other.number - 1]
        replicas.failed(lost.other.link)
        replicas.count(lost=1)
        self._tried.add(lost.other.link.name)
        self._reason = str(lost)
        self._close()
        return replicas

    def _leave(self) -> None:
        """Leave ranks that are about to stop, if others take the session; else stay for as long as it lasts."""
        leaving = [other for other in self._others if other.session.leaving]
        if not leaving or self._stays:
            return
        for other in leaving:
            fresh = self._beside(other)
            if fresh is None:
                self._stays = True
                return
            self._ahead[other.number] = fresh
        self._close()
        for other in leaving:
            self._group.replicas[other.number - 1].count(moved=1)

    def _beside(self, other: _Other) -> _Other | None:
        """A session at another replica of a rank, None if none takes one."""
        for link in self._group.replicas[other.number - 1].in_order():
            with suppress(LinkLostError):
                if link is not other.link:
                    return _Other(other.number, link, link.open(self._opening))
        return None

    def _close(self) -> None:
        for other in self._others:
            other.session.close()
        self._others, self._at = [], 0


def fault(replicas: Sequence[Replicas], variant: str, wait_s: float) -> str | None:
    """Why no session can be opened at all ranks, None if one could be."""
    for number, each in enumerate(replicas, 1):
        reason = f"no address leads to rank {number}"
        for link in each.in_order():
            try:
                link.open(Opening(variant, time.monotonic() + wait_s)).close()
            except (LinkLostError, ShardsLostError) as error:
                reason = str(error)
            else:
                break
        else:
            return reason
    return None
