"""Keys and values of the open sequences: one array for all layers, a slot a sequence. Pure numpy.

L layers, S slots, H key-value heads, R rows (positions), D head width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.artifact.shape import LlamaShape

Floats = NDArray[np.float32]
FIRST_ROOM = 256
"""Tokens there is room for at first."""


class KeyValueMemory:
    """An array (L, 2, S, H, R, D) that begins small and doubles as slots and room are asked for, keeping what it holds.

    As one array, large allocations lie in huge pages where the system lends them (numpy asks for them), and a prefix
    is copied in one statement. One row more than there is room for takes what a sequence writes that sits out a pass.
    `layers` are those it serves, by default all; `version` counts the arrays: what points into an older one must be
    made anew. Not for two threads at once.
    """

    def __init__(self, shape: LlamaShape, max_slots: int, max_room: int, layers: range | None = None) -> None:
        self._shape, self._max_slots, self._max_room = shape, max_slots, max_room
        self._layers = layers or range(shape.n_layers)
        self.slots = self.room = 0
        self.version = 0
        self._values = self._empty(0, 0)

    @property
    def size_bytes(self) -> int:
        """Bytes set aside; the system gives pages only when they are written."""
        return self._values.nbytes

    def reserve(self, slots: int, room: int) -> None:
        """See to it that the first `slots` have room for `room` tokens each."""
        if slots <= self.slots and room <= self.room:
            return
        held = self._values
        slots = min(self._max_slots, max(self.slots, 1 << (slots - 1).bit_length()))
        room = min(self._max_room, max(self.room, FIRST_ROOM, 1 << (room - 1).bit_length()))
        self._values = self._empty(slots, room)
        self._values[:, :, : self.slots, :, : self.room] = held[:, :, :, :, : self.room]
        self.slots, self.room = slots, room
        self.version += 1

    def layer(self, layer: int, slots: range) -> tuple[Floats, Floats]:
        """Keys and values of one layer (S, H, R, D), contiguous views."""
        keys, values = self._values[self._layers.index(layer), :, slots.start : slots.stop]
        return keys, values

    def read(self, slot: int, positions: range) -> Floats:
        """Copy some positions of a sequence out, (L, 2, H, n, D)."""
        return self._values[:, :, slot, :, positions.start : positions.stop].copy()

    def write(self, slot: int, start: int, block: Floats) -> None:
        """Copy a block (L, 2, H, n, D) in."""
        self._values[:, :, slot, :, start : start + block.shape[3]] = block

    def _empty(self, slots: int, room: int) -> Floats:
        s = self._shape
        return np.zeros((len(self._layers), 2, slots, s.n_kv_heads, room + 1, s.head_dim), np.float32)
