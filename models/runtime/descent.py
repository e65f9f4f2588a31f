"""Tokens on their way through the layers: as deep as is asked for, and deeper later on if that was not enough.

What was read stays in pieces, each a pass of its own at every depth, so that going all the way, with stops or without,
is the same passes and the same bits. Layers that are not reached have neither keys nor values of these tokens; they
come with the pass that goes deeper. T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from models.runtime.layers import Floats, Layers


class Descent(Protocol):
    """A way down. Not for two threads at once."""

    def to(self, passed: int) -> Floats:
        """States (T, C) of all the pieces after so many layers: normalised where the graph has a norm there.

        `passed` rises from call to call.
        """


class WholeDescent:
    """All the way at once, where nothing stops in between; `read` returns a piece's last states (T, C)."""

    def __init__(self, read: Callable[[Sequence[int]], Floats], pieces: Sequence[Sequence[int]]) -> None:
        self._read, self._pieces = read, pieces

    def to(self, _passed: int) -> Floats:
        """As in `Descent`, for all layers only."""
        return np.concatenate([self._read(piece) for piece in self._pieces])


class LayerDescent:
    """Through layers of this process, in one slot of their memory; only for whoever has the turn.

    `before` tokens were read by all layers already; `pieces` are states (T, C) that the first layer takes.
    """

    def __init__(self, layers: Layers, slot: int, before: int, pieces: Sequence[Floats]) -> None:
        self._layers, self._slot, self._before = layers, slot, before
        self.pieces = list(pieces)
        """What the next layer takes, piece by piece."""
        self._passed = layers.range.start

    def to(self, passed: int) -> Floats:
        """As in `Descent`."""
        found, length = [], self._before
        room = self._before + sum(map(len, self.pieces))
        for number, piece in enumerate(self.pieces):
            length += len(piece)
            stack = self._layers.stack(range(self._slot, self._slot + 1), room, len(piece), head=False)
            last = stack.between(piece[None], [length - 1], self._passed, passed)
            found.append(last["hidden" if last.gives("hidden") else "carried"][0].copy())
            if last.gives("carried"):
                self.pieces[number] = last["carried"][0].copy()
        self._passed = passed
        return np.concatenate(found)
