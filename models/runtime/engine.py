"""Run a decoder on onnxruntime: key-value buffers that past and present share, bound once to a session a segment.

Sequences are slots of one memory. Steps of single tokens that wait at the same time become one pass over neighbouring
slots; longer pieces go through alone, since onnxruntime's attention takes several sequences for single tokens only.
Knows tokens as numbers only. B sequences, T new tokens, C width, V vocabulary.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.artifact.names import (
    BYTE,
    LOGITS_FROM,
    bits_and_block,
)
from models.artifact.shape import LlamaShape
from models.errors import AbandonedError, ArtifactError, PromptTooLongError
from models.runtime.memory import KeyValueMemory
from models.runtime.prefixes import BLOCK_TOKENS, PrefixCache
from models.runtime.providers import short_name
from models.runtime.sessions import EngineOptions, Loaded, Segment, load
from models.runtime.turns import Turns

Array = NDArray[Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
CHUNK = 256
"""Tokens that go through the model at once; a longer prompt goes in pieces, so that memory stays bounded."""
TILE = 16
"""onnxruntime's attention takes queries in tiles of twice the head's width, which is a multiple of this."""
LONG = 24
"""Tokens from which a pass takes the segments for many tokens, where there are such."""


class _Pass(Enum):
    """Kinds of passes, which are bound apart."""

    SINGLE, SHORT, LONG = range(3)


class TextSequence(Protocol):
    """A growing token sequence: what text is written with."""

    length: int

    @property
    def room(self) -> int:
        """Tokens that still fit."""

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read ids and return logits (V,) for the next token; raises `PromptTooLongError` if they do not fit."""

    def reset(self) -> None:
        """Forget everything."""


class TextEngine(Protocol):
    """A loaded model that writes text, whatever graph it has; `context` in tokens."""

    context: int

    def sequence(
        self, deadline: float = math.inf, gone: Callable[[], bool] | None = None
    ) -> AbstractContextManager[TextSequence]:
        """Lend an empty sequence; waits while all are in use.

        The earliest `deadline`, on any one clock, goes first where passes are shared. Reading a long prompt ends with
        `AbandonedError` once `gone` says that nobody waits for the answer.
        """


class Embeddings:
    """Rows of the embedding table, dequantised when looked up; ids behind the vocabulary are rows of `inputs`."""

    def __init__(self, table: Mapping[str, Array], inputs: Floats | None, width: int) -> None:
        self._table, self._width = table, width
        self._inputs = np.zeros((0, width), np.float32) if inputs is None else inputs
        self.vocab_size = len(table["w"] if "w" in table else table["q"])

    def rows(self, ids: Sequence[int]) -> Floats:
        """Return (T, C) in fp32; raises `IndexError` for an id that is none."""
        index = np.asarray(ids, np.int64)
        added = index >= self.vocab_size
        if not added.any():
            return self._known(index)
        found = np.empty((len(index), self._width), np.float32)
        found[added] = self._inputs[index[added] - self.vocab_size]
        found[~added] = self._known(index[~added])
        return found

    def _known(self, index: NDArray[np.int64]) -> Floats:
        if "w" in self._table:
            return np.asarray(self._table["w"][index], np.float32)
        codes, scale = self._table["q"][index], self._table["scale"][index]
        if bits_and_block(self._width, codes.shape)[0] != BYTE:
            raise ArtifactError("the embedding table is stored in 4 bits; this version reads 8 bits or fp32")
        values = (codes.astype(np.float32) - 128) * scale[..., None]
        return np.asarray(values.reshape(len(index), -1)[:, : self._width], np.float32)


class Decoder:
    """A loaded model; `sequence()` lends one of a few slots of its key-value memory.

    `long` are segments for passes over many tokens, without the head; the others take those as well where there are
    none. Decoders that share the processor should share their `turns`.
    """

    def __init__(
        self,
        shape: LlamaShape,
        parts: Iterable[Segment | Loaded],
        embeddings: Embeddings,
        options: EngineOptions,
        turns: Turns | None = None,
        *,
        long: Sequence[Loaded] = (),
    ) -> None:
        self.shape, self.options, self.embeddings = shape, options, embeddings
        self.context = min(options.context, shape.context)
        self.turns = turns or Turns()
        self.memory = KeyValueMemory(shape, options.sequences, self.context)
        self.prefixes = _prefix_cache(shape, options)
        self._segments = _loaded(parts, options)
        self._long = () if options.exact_drafts else long  # a token read again must be read as before
        self._rotary = rotary_tables(shape, self.context + 1)
        self._stacks: dict[tuple[range, _Pass], _Stack] = {}
        self._stacks_version = 0
        self._places = threading.BoundedSemaphore(options.sequences)
        self._lock = threading.Lock()
        self._sequences = [TokenSequence(self, slot) for slot in range(options.sequences)]
        self._free = list(range(options.sequences))  # a heap: neighbours make better batches

    @property
    def provider(self) -> str:
        """Short name of the execution provider in use."""
        return short_name(self._segments[0].session.get_providers()[0])

    @property
    def batches(self) -> bool:
        """Whether sequences may share passes; graphs of older artifacts take one at a time."""
        several = all(isinstance(part.session.get_inputs()[0].shape[0], str) for part in self._segments)
        return several and not self.options.exact_drafts

    @property
    def verifies(self) -> bool:
        """Whether the graph gives logits at several positions; older ones do not."""
        return self._segments[-1].takes(LOGITS_FROM)

    @property
    def alone(self) -> bool:
        """Whether at most one sequence is lent."""
        return len(self._free) >= len(self._sequences) - 1

    @contextmanager
    def sequence(self, deadline: float = math.inf, gone: Callable[[], bool] | None = None) -> Iterator[TokenSequence]:
        """Lend an empty sequence; waits while all are in use.

        Those with the earlier `deadline`, on any one clock, go first. Reading a long prompt ends with
        `AbandonedError` once `gone` says that nobody waits for the answer.
        """
        with self._places:
            with self._lock:
                slot = heapq.heappop(self._free)
            sequence = self._sequences[slot]
            sequence.deadline, sequence.gone = deadline, gone
            try:
                yield sequence
                sequence.remember()
            finally:
                self.turns.leave(sequence)
                sequence.reset()
                with self._lock:
                    heapq.heappush(self._free, slot)

    @property
    def has_long(self) -> bool:
        """Whether passes over many tokens have segments of their own."""
        return bool(self._long)

    def stack(self, slots: range, room: int, n_tokens: int, *, head: bool = True) -> _Stack:
        """The segments for a pass of `n_tokens`, bound to slots with `room` tokens; only for whoever has the turn.

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
            found = self._stacks[slots, kind] = _Stack(self.shape, chosen, self._rotary, self.memory, slots)
        return found

    def step(self, members: Sequence[TokenSequence]) -> None:
        """Read each member's `next_id`, in one pass over the slots from the first to the last of them.

        A slot between them that sits out is computed too: what it writes lies behind its own tokens.
        """
        slots = range(min(m.slot for m in members), max(m.slot for m in members) + 1)
        stack = self.stack(slots, 1 + max(m.length for m in members), n_tokens=1)
        x = np.zeros((len(slots), 1, self.shape.width), np.float32)
        x[[m.slot - slots.start for m in members], 0] = self.embeddings.rows([m.next_id for m in members])
        for _ in stack.run(x, [self._sequences[slot].length for slot in slots]):
            pass
        for member in members:
            member.stepped(stack.logits[member.slot - slots.start, 0], shared=len(slots) > 1)


def _loaded(parts: Iterable[Segment | Loaded], options: EngineOptions) -> list[Loaded]:
    """Open the sessions of those that have none yet."""
    return [part if isinstance(part, Loaded) else load([part], options)[0] for part in parts]


def _prefix_cache(shape: LlamaShape, options: EngineOptions) -> PrefixCache[Floats] | None:
    block_bytes = 4 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * BLOCK_TOKENS
    return PrefixCache(options.prefix_cache_bytes, block_bytes) if options.prefix_cache_bytes else None


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


def check_room(ids: Sequence[int], context: int, room: int) -> None:
    """Raise `PromptTooLongError` if there are no ids, or more than there is room for."""
    if not ids:
        raise PromptTooLongError("the prompt has no tokens", "messages")
    if len(ids) > room:
        raise PromptTooLongError(
            f"the prompt is longer than the model's context of {context} tokens; shorten it", "messages"
        )


def chunks(ids: Sequence[int], gone: Callable[[], bool] | None) -> Iterator[Sequence[int]]:
    """Cut ids into pieces that go through a model at once; raises `AbandonedError` before one if nobody waits."""
    for at in range(0, len(ids), CHUNK):
        if gone is not None and gone():
            raise AbandonedError("nobody waits for this answer any more")
        yield ids[at : at + CHUNK]


class _Stack:
    """The segments of a model, bound to the memory of neighbouring slots."""

    def __init__(
        self,
        shape: LlamaShape,
        parts: Sequence[Loaded],
        rotary: Mapping[str, Floats],
        memory: KeyValueMemory,
        slots: range,
    ) -> None:
        self._last_position, self._total_length = np.zeros(len(slots), np.int32), np.zeros(1, np.int32)
        self._logits_from = np.full(1, -1, np.int64)
        inputs: dict[str, Array] = {"last_position": self._last_position, "total_length": self._total_length}
        inputs |= rotary
        self._bound = [_Bound(shape, part, {**inputs, **part.given}, memory, slots) for part in parts]
        if parts[-1].takes(LOGITS_FROM):
            self._bound[-1].give(LOGITS_FROM, self._logits_from)

    def run(self, x: Floats, last_positions: Sequence[int], rows: int = 1) -> Iterator[_Bound]:
        """Run segment after segment on embeddings (B, T, C), whose last tokens go to `last_positions`.

        `rows` is how many of the last tokens get logits.
        """
        self._last_position[:] = last_positions
        self._total_length[0] = max(last_positions) + 1
        self._logits_from[0] = -rows
        self._bound[-1].make_room(rows)
        for segment in self._bound:
            segment.run(x)
            yield segment
            x = segment["carried"] if segment is not self._bound[-1] else x

    @property
    def logits(self) -> Floats:
        """The last run's (B, R, V)."""
        return self._bound[-1]["logits"]


class _Bound:
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
        self._width, self._vocab_size = shape.width, shape.vocab_size
        self._slots, self._rows = len(slots), 0
        self._kept: dict[str, Array] = {}
        self._x_shape: tuple[int, ...] = ()
        for name, value in inputs.items():
            self.give(name, value)
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
            for name in ("hidden",) if self.is_last else ("hidden", "carried"):
                self._output(name, np.empty((*x.shape[:2], self._width), np.float32))
        self._kept["x"][:] = x
        self._session.run_with_iobinding(self._binding)

    def __getitem__(self, name: str) -> Floats:
        return self._kept[name]


class TokenSequence:
    """One growing token sequence in a slot of the decoder's memory. Not for two threads at once."""

    def __init__(self, decoder: Decoder, slot: int) -> None:
        self._decoder, self.slot = decoder, slot
        self.deadline = math.inf
        self.gone: Callable[[], bool] | None = None
        self.next_id = 0
        self._logits = np.zeros(0, np.float32)
        self.reset()

    def reset(self) -> None:
        """Forget everything; what the memory holds is never read again."""
        self.length = 0
        self._ids: list[int] = []
        self._ended = False

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return 0 if self._ended else self._decoder.context - self.length

    @property
    def verifies(self) -> bool:
        """Whether the graph gives logits at several positions."""
        return self._decoder.verifies

    @property
    def alone(self) -> bool:
        """Whether no other sequence is lent."""
        return self._decoder.alone

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read ids and return logits (V,) for the next token; the array is overwritten by the next call.

        An empty sequence takes what it can from the prefix cache.
        """
        self._check(ids)
        if len(ids) == 1 and self.length and self._decoder.batches:
            self.next_id = ids[0]
            self._decoder.turns.take(self, self.deadline, self._decoder.step, shared=True)
            return self._logits
        self._logits = self.verify(ids, ())[-1]
        return self._logits

    def verify(self, ids: Sequence[int], draft: Sequence[int]) -> Floats:
        """Read ids and a draft of what follows, and return logits (1 + len(draft), V): row k follows k of the draft.

        That is one pass, or as many as the length takes. The array is overwritten by the next call; only where the
        engine `verifies` may there be a draft.
        """
        self._check([*ids, *draft])
        begins = not self.length
        if begins:
            self._recall(ids)
        left, n_logits = [*ids[self.length if begins else 0 :], *draft], 1 + len(draft)
        if self._decoder.has_long and len(left) - len(draft) >= LONG:  # what reads many tokens has no head
            for chunk in self._pieces(left[:-n_logits]):
                self._read(chunk)
            left = left[-n_logits:]
        found: list[Floats] = []
        for chunk in self._pieces(left):
            left = left[len(chunk) :]
            rows = min(len(chunk), n_logits - len(left))
            logits = self._read(chunk, rows=max(1, rows))["logits"][0]
            if rows > 0:
                found.append(logits.copy() if left else logits)
        if begins:
            self.remember(self.length - len(draft))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; what the memory holds behind them is written anew."""
        self.length = length
        del self._ids[length:]

    def hidden(self, ids: Sequence[int]) -> Floats:
        """Read ids and return the model's normalised states (T, C) at each of them."""
        self._check(ids)
        return np.concatenate([self._read(chunk)["hidden"][0].copy() for chunk in chunks(ids, self.gone)])

    def hidden_early(self, ids: Sequence[int], enough: Callable[[Floats], bool]) -> tuple[Floats, int]:
        """Like `hidden`, for the last ids only, but stop at the first exit whose last state (C,) is `enough`.

        Returns the last state and the number of layers passed. After an early stop the sequence cannot go on: it
        counts as full.
        """
        self._check(ids)
        *before, last = list(chunks(ids, self.gone))
        for chunk in before:
            self._read(chunk)
        stopped = self._read(last, until=lambda segment: enough(segment["hidden"][0, -1].copy()))
        self._ended = not stopped.is_last
        return stopped["hidden"][0, -1].copy(), stopped.span.stop

    def stepped(self, logits: Floats, *, shared: bool) -> None:
        """Take note that `next_id` was read; `logits` (V,) lie in a buffer of this slot unless it is `shared`."""
        self._ids.append(self.next_id)
        self.length += 1
        self._logits = logits.copy() if shared else logits

    def remember(self, length: int | None = None) -> None:
        """Leave what was read, or its first `length` tokens, to the prefix cache."""
        prefixes, memory = self._decoder.prefixes, self._decoder.memory
        ids = self._ids[:length]
        if prefixes is not None and not self._ended and len(ids) >= prefixes.block_tokens:
            self._alone(lambda: prefixes.add(ids, lambda positions: memory.read(self.slot, positions)))

    def _recall(self, ids: Sequence[int]) -> None:
        """Take over what the prefix cache holds of `ids`."""
        prefixes, decoder = self._decoder.prefixes, self._decoder
        if prefixes is None:
            return

        def copy() -> None:
            blocks = prefixes.find(ids)
            decoder.memory.reserve(self.slot + 1, len(blocks) * prefixes.block_tokens)
            for number, block in enumerate(blocks):
                decoder.memory.write(self.slot, number * prefixes.block_tokens, block)
            self._grow(ids[: len(blocks) * prefixes.block_tokens])

        self._alone(copy)

    def _check(self, ids: Sequence[int]) -> None:
        check_room(ids, self._decoder.context, self.room)

    def _read(self, ids: Sequence[int], until: Callable[[_Bound], bool] = lambda _: False, rows: int = 0) -> _Bound:
        """Read one chunk, alone, with logits of its last `rows`, if they are wanted.

        Returns the segment after which `until` said so, or the last.
        """
        if self._decoder.options.exact_drafts and self.length and len(ids) % TILE == 1:
            ids = [self._ids[-1], *ids]  # once more: it leaves the same keys and values
            self.rewind(self.length - 1)
        found: list[_Bound] = []

        def run() -> None:
            length = self.length + len(ids)
            stack = self._decoder.stack(range(self.slot, self.slot + 1), length, len(ids), head=bool(rows))
            for segment in stack.run(self._decoder.embeddings.rows(ids)[None], [length - 1], max(1, rows)):
                found[:] = [segment]
                if until(segment):
                    break
            self._grow(ids)

        self._alone(run)
        return found[0]

    def _pieces(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Cut ids into chunks; with exact drafts the very first token, which sees only itself, may be one."""
        for chunk in chunks(ids, self.gone):
            cut = self._decoder.options.exact_drafts and not self.length and len(chunk) % TILE == 1 < len(chunk)
            yield from (chunk[:1], chunk[1:]) if cut else (chunk,)

    def _grow(self, ids: Sequence[int]) -> None:
        self._ids += ids
        self.length += len(ids)

    def _alone(self, work: Callable[[], None]) -> None:
        self._decoder.turns.take(self, self.deadline, lambda _: work())
