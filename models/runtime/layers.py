"""Layers of a decoder on onnxruntime: key-value buffers that past and present share, bound once to a session a segment.

Knows neither tokens nor who they belong to: states go in, states or logits come out. B sequences, T new tokens, C
width, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.names import LOGITS_FROM
from models.artifact.shape import LlamaShape
from models.errors import ArtifactError
from models.runtime.memory import KeyValueMemory
from models.runtime.providers import short_name
from models.runtime.sessions import EngineOptions, Loaded, Segment, load

Array = NDArray[Any]
Floats = NDArray[np.float32]
TABLE = "embeddings.q"
"""The input of a graph whose head reads the table of embeddings."""
LONG = 24
"""Tokens from which a pass takes the segments for many tokens, where there are such."""


class _Pass(Enum):
    """Kinds of passes, which are bound apart."""

    SINGLE, SHORT, LONG = range(3)


class Layers:
    """Segments of neighbouring layers, and the memory of the sequences that go through them.

    `long` are segments for passes over many tokens, without the head; the others take those as well where there are
    none. `table` is the table of embeddings, for a head that reads it. Only for whoever has the turn.
    """

    def __init__(
        self,
        shape: LlamaShape,
        parts: Iterable[Segment | Loaded],
        options: EngineOptions,
        long: Sequence[Loaded] = (),
        table: Mapping[str, Array] | None = None,
    ) -> None:
        self._segments = [part if isinstance(part, Loaded) else load([part], options)[0] for part in parts]
        self._long, self._shape = long, shape
        self.context = min(options.context, shape.context)
        self.range = range(self._segments[0].span.first, self._segments[-1].span.stop)
        self.memory = KeyValueMemory(shape, options.sequences, self.context, self.range)
        self._given = {**rotary_tables(shape, self.context + 1), **(table or {})}
        if table is None and self._segments[-1].takes(TABLE):
            raise ArtifactError(
                "the head computes its best logits again from the table of embeddings, so that only who has the whole "
                "model can run it; build with --quant int4 or int8 for shards"
            )
        self._stacks: dict[tuple[range, _Pass], Stack] = {}
        self._stacks_version = 0

    @property
    def provider(self) -> str:
        """Short name of the execution provider in use."""
        return short_name(self._segments[0].session.get_providers()[0])

    @property
    def batches(self) -> bool:
        """Whether sequences may share passes; graphs of older artifacts take one at a time."""
        return all(isinstance(part.session.get_inputs()[0].shape[0], str) for part in self._segments)

    @property
    def verifies(self) -> bool:
        """Whether the graph gives logits at several positions; older ones do not."""
        return self._segments[-1].takes(LOGITS_FROM)

    @property
    def has_long(self) -> bool:
        """Whether passes over many tokens have segments of their own."""
        return bool(self._long)

    def stack(self, slots: range, room: int, n_tokens: int, *, head: bool = True) -> Stack:
        """The segments for a pass of `n_tokens`, bound to slots with `room` tokens.

        With `head` they give logits, whatever the number of tokens.

        Passes of single tokens have stacks of their own, so that nothing is bound anew from one to the next.
        """
        long = self._long and n_tokens >= LONG and not head
        kind = _Pass.SINGLE if n_tokens == 1 else _Pass.LONG if long else _Pass.SHORT
        self.memory.reserve(slots.stop, room)
        if self._stacks_version != self.memory.version:
            self._stacks, self._stacks_version = {}, self.memory.version
        found = self._stacks.get((slots, kind))
        if found is None:
            chosen = self._long if kind is _Pass.LONG else self._segments
            found = self._stacks[slots, kind] = Stack(self._shape, chosen, self._given, self.memory, slots)
        return found


def rotary_tables(shape: LlamaShape, positions: int) -> dict[str, Floats]:
    """Cosines and sines (positions, D/2) of the rotary embedding, by their names in the graph."""
    exponents = -(np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim)
    frequencies = shape.rope_theta**exponents / np.asarray(shape.rope_divisors or 1.0)
    tables = _rotary("", frequencies, shape.rope_magnitude, positions)
    if shape.local_rope_theta:
        tables |= _rotary("local_", shape.local_rope_theta**exponents, 1.0, positions)
    return tables


def _rotary(kind: str, frequencies: NDArray[np.float64], magnitude: float, positions: int) -> dict[str, Floats]:
    angles = np.arange(positions)[:, None] * frequencies
    tables = {f"{kind}cos": np.cos(angles), f"{kind}sin": np.sin(angles)}
    return {name: (magnitude * table).astype(np.float32) for name, table in tables.items()}


class Stack:
    """The segments of a model, bound to the memory of neighbouring slots."""

    def __init__(
        self,
        shape: LlamaShape,
        parts: Sequence[Loaded],
        given: Mapping[str, Array],
        memory: KeyValueMemory,
        slots: range,
    ) -> None:
        self._last_position, self._total_length = np.zeros(len(slots), np.int32), np.zeros(1, np.int32)
        self._logits_from = np.full(1, -1, np.int64)
        inputs: dict[str, Array] = {"last_position": self._last_position, "total_length": self._total_length}
        inputs |= given
        self._bound = [Bound(shape, part, {**inputs, **part.given}, memory, slots) for part in parts]
        if parts[-1].takes(LOGITS_FROM):
            self._bound[-1].give(LOGITS_FROM, self._logits_from)

    def run(self, x: Floats, last_positions: Sequence[int], rows: int = 1) -> Iterator[Bound]:
        """Run segment after segment on embeddings (B, T, C), whose last tokens go to `last_positions`.

        `rows` is how many of the last tokens get logits.
        """
        self._place(last_positions)
        self._logits_from[0] = -rows
        self._bound[-1].make_room(rows)
        for segment in self._bound:
            segment.run(x)
            yield segment
            x = segment["carried"] if segment is not self._bound[-1] else x

    def through(self, x: Floats, last_positions: Sequence[int], rows: int = 1) -> Bound:
        """Run all segments; returns the last, in which the results lie."""
        *_, last = self.run(x, last_positions, rows)
        return last

    def between(self, x: Floats, last_positions: Sequence[int], first: int, stop: int) -> Bound:
        """Run the segments of the layers from `first` to `stop` - 1, which must be whole ones; returns the last."""
        self._place(last_positions)
        chosen = [segment for segment in self._bound if first <= segment.span.first and segment.span.stop <= stop]
        for segment in chosen:
            segment.run(x)
            x = segment["carried"] if segment is not chosen[-1] else x
        return chosen[-1]

    def _place(self, last_positions: Sequence[int]) -> None:
        self._last_position[:] = last_positions
        self._total_length[0] = max(last_positions) + 1

    @property
    def logits(self) -> Floats:
        """The last run's (B, R, V)."""
        return self._bound[-1]["logits"]


class Bound:
    """A segment's session with the buffers of some slots bound to it."""

    def __init__(
        self,
        shape: LlamaShape,
        part: Loaded,
        inputs: Mapping[str, Array],
        memory: KeyValueMemory,
        slots: range,
    ) -> None:
        self.span, self._session, self._binding = part.span, part.session, part.session.io_binding()
        span = part.span
        self.is_last = span.stop == shape.n_layers
        given = {output.name for output in part.session.get_outputs()}
        self._states = [name for name in ("hidden", "carried") if name in given]
        self._width, self._vocab_size = shape.width, shape.vocab_size
        self._slots, self._rows = len(slots), 0
        self._kept: dict[str, Array] = {}
        self._x_shape: tuple[int, ...] = ()
        taken = {given.name for given in part.session.get_inputs()}
        for name in taken & inputs.keys():
            self.give(name, inputs[name])
        for layer in span.layers:
            for kind, cache in zip(("key", "value"), memory.layer(layer, slots), strict=True):
                self.give(f"past_{kind}.{layer}", cache)
                self._output(f"present_{kind}.{layer}", cache)
        self.make_room(1)

    def make_room(self, rows: int) -> None:
        """See to it that so many rows of logits have their place."""
        if self.span.head and rows != self._rows:
            self._rows = rows
            self._output("logits", np.empty((self._slots, rows, self._vocab_size), np.float32))

    def give(self, name: str, value: Array) -> None:
        """Bind an input; it is read at each run."""
        self._kept[name] = value
        self._binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)

    def _output(self, name: str, value: Array) -> None:
        self._kept[name] = value
        self._binding.bind_output(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)

    def run(self, x: Floats) -> None:
        """Run on embeddings or a carried stream (B, T, C); results lie in `hidden`, `carried` and `logits`."""
        if x.shape != self._x_shape:
            self._x_shape = x.shape
            self.give("x", np.empty_like(x))
            for name in self._states:
                self._output(name, np.empty((*x.shape[:2], self._width), np.float32))
        self._kept["x"][:] = x
        self._session.run_with_iobinding(self._binding)

    def gives(self, name: str) -> bool:
        """Whether it has states of that name."""
        return name in self._states

    def __getitem__(self, name: str) -> Floats:
        return self._kept[name]
