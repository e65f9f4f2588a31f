"""Run a decoder on onnxruntime: from token ids to logits.

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
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.artifact.names import BYTE, bits_and_block
from models.artifact.shape import LlamaShape
from models.errors import AbandonedError, ArtifactError, PromptTooLongError
from models.runtime.descent import Descent, LayerDescent
from models.runtime.layers import LONG, Bound, Layers
from models.runtime.prefixes import BLOCK_TOKENS, PrefixCache
from models.runtime.sessions import EngineOptions, Loaded, Segment
from models.runtime.turns import Turns

Array = NDArray[Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
CHUNK = 256
"""Tokens that go through the model at once; a longer prompt goes in pieces, so that memory stays bounded."""
TILE = 16
"""onnxruntime's attention takes queries in tiles of twice the head's width, which is a multiple of this."""


class TextSequence(Protocol):
    """A growing token sequence: what text is written with."""

    @property
    def room(self) -> int:
        """Tokens that still fit."""

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read ids and return logits (V,) for the next token; raises `PromptTooLongError` if they do not fit."""


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


class SkillSequence(Protocol):
    """A growing token sequence: what frames are read from."""

    def hidden(self, ids: Sequence[int]) -> Floats:
        """Read ids and return the model's normalised states (T, C) at each of them."""

    def descent(self, pieces: Sequence[Sequence[int]]) -> Descent:
        """Begin to read pieces of ids, stopping between layers; a sequence that does not go all the way is full."""


class SkillEngine(Protocol):
    """A loaded model that labels text."""

    @property
    def shape(self) -> LlamaShape:
        """Its numbers."""

    @property
    def context(self) -> int:
        """Tokens that it reads at most."""

    @property
    def reach(self) -> int:
        """Layers after which its sequences may stop: none beyond."""

    @property
    def embeddings(self) -> Embeddings:
        """Its embedding table."""

    def sequence(
        self, deadline: float = math.inf, gone: Callable[[], bool] | None = None
    ) -> AbstractContextManager[SkillSequence]:
        """Lend an empty sequence, as `TextEngine` does."""


class Embeddings:
    """Rows of the embedding table, dequantised when looked up; ids behind the vocabulary are rows of `inputs`."""

    def __init__(self, table: Mapping[str, Array], inputs: Floats | None, width: int) -> None:
        self._table, self._width = table, width
        if "w" not in table and bits_and_block(width, table["q"].shape)[0] != BYTE:
            raise ArtifactError("the embedding table is stored in 4 bits; this version reads 8 bits or fp32")
        self._inputs = np.zeros((0, width), np.float32) if inputs is None else inputs
        self.vocab_size = len(table["w"] if "w" in table else table["q"])

    def rows(self, ids: Sequence[int]) -> Floats:
        """Return (T, C) in fp32; raises `IndexError` for an id that is none."""
        if len(ids) == 1 and 0 <= ids[0] < self.vocab_size:
            return self._known(slice(ids[0], ids[0] + 1))
        index = np.asarray(ids, np.int64)
        added = index >= self.vocab_size
        if not added.any():
            return self._known(index)
        found = np.empty((len(index), self._width), np.float32)
        found[added] = self._inputs[index[added] - self.vocab_size]
        found[~added] = self._known(index[~added])
        return found

    def flat(self) -> dict[str, Array]:
        """Codes (V, C) and scales (V, G) of an 8-bit table, by their names in a graph that reads it."""
        return {f"embeddings.{key}": value.reshape(len(value), -1) for key, value in self._table.items()}

    def _known(self, index: NDArray[np.int64] | slice) -> Floats:
        if "w" in self._table:
            return np.asarray(self._table["w"][index], np.float32)
        scale = self._table["scale"][index]
        values = np.subtract(self._table["q"][index], 128, dtype=np.float32)
        values *= scale[..., None]
        return np.asarray(values.reshape(len(scale), -1)[:, : self._width])


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
        # With exact drafts a token that is read again must be read as before.
        self.layers = Layers(shape, parts, options, () if options.exact_drafts else long, embeddings.flat())
        self.context = self.layers.context
        self.turns = turns or Turns()
        self.prefixes = _prefix_cache(shape, options)
        self._places = threading.BoundedSemaphore(options.sequences)
        self._lock = threading.Lock()
        self._sequences = [TokenSequence(self, slot) for slot in range(options.sequences)]
        self._free = list(range(options.sequences))  # a heap: neighbours make better batches

    @property
    def provider(self) -> str:
        """Short name of the execution provider in use."""
        return self.layers.provider

    @property
    def reach(self) -> int:
        """Layers after which its sequences may stop: none beyond."""
        return self.shape.n_layers

    @property
    def batches(self) -> bool:
        """Whether sequences may share passes."""
        return self.layers.batches and not self.options.exact_drafts

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

    def step(self, members: Sequence[TokenSequence]) -> None:
        """Read each member's `next_id`, in one pass over the slots from the first to the last of them.

        A slot between them that sits out is computed too: what it writes lies behind its own tokens.
        """
        slots = range(min(m.slot for m in members), max(m.slot for m in members) + 1)
        stack = self.layers.stack(slots, 1 + max(m.length for m in members), n_tokens=1)
        rows = self.embeddings.rows([m.next_id for m in members])
        if len(slots) > 1:
            rows = _placed(rows, [m.slot - slots.start for m in members], len(slots))
        stack.through(rows[:, None], [self._sequences[slot].length for slot in slots])
        for member in members:
            member.stepped(stack.logits[member.slot - slots.start, 0], shared=len(slots) > 1)


def _placed(rows: Floats, places: Sequence[int], count: int) -> Floats:
    """Put rows (n, C) in their places among `count`; the others are zeros."""
    found = np.zeros((count, rows.shape[1]), np.float32)
    found[places] = rows
    return found


def _prefix_cache(shape: LlamaShape, options: EngineOptions) -> PrefixCache[Floats] | None:
    block_bytes = 4 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * BLOCK_TOKENS
    return PrefixCache(options.prefix_cache_bytes, block_bytes) if options.prefix_cache_bytes else None


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


def _long_chunks(ids: Sequence[int], gone: Callable[[], bool] | None) -> Iterator[Sequence[int]]:
    """Cut so that no end is too short for what reads many tokens: which tokens it reads must not hang on the cuts."""
    tail = len(ids) % CHUNK
    half = len(ids) - tail - CHUNK // 2 if 0 < tail < LONG and len(ids) > CHUNK else len(ids)
    yield from chunks(ids[:half], gone)
    yield from chunks(ids[half:], gone)


def passes(
    ids: Sequence[int], n_rows: int, gone: Callable[[], bool] | None, *, begins: bool, long: bool, exact: bool
) -> Iterator[tuple[Sequence[int], int]]:
    """Cut ids into what goes through a model at once, each with how many of its last tokens are followed by a row.

    The last `n_rows` are. What reads many tokens (`long`) has no head and gives none. With `exact` drafts the very
    first token, which sees only itself, may be alone (`begins`), and no other one is where it can be helped.
    """
    left = list(ids)
    if long and len(left) - n_rows + 1 >= LONG:
        yield from ((chunk, 0) for chunk in _long_chunks(left[:-n_rows], gone))
        left, begins = left[-n_rows:], False
    for chunk in chunks(left, gone):
        left = left[len(chunk) :]
        rows = min(len(chunk), max(0, n_rows - len(left)))
        first = int(exact and begins and len(chunk) % TILE == 1 < len(chunk))
        if first:
            yield chunk[:first], max(0, rows - len(chunk) + first)
        begins = False
        yield chunk[first:], min(rows, len(chunk) - first)


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
        return self._decoder.layers.verifies

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
        found: list[Floats] = []
        for chunk, rows in self._passes(left, n_logits):
            read = self._read(chunk, rows=rows)
            if rows:
                n_logits -= rows
                found.append(read["logits"][0].copy() if n_logits else read["logits"][0])
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

    def descent(self, pieces: Sequence[Sequence[int]]) -> Descent:
        """Begin to read pieces of ids, stopping between layers; a sequence that does not go all the way is full."""
        ids = [token for piece in pieces for token in piece]
        self._check(ids)
        rows = [self._decoder.embeddings.rows(chunk) for piece in pieces for chunk in chunks(piece, self.gone)]
        return _SequenceDescent(self, LayerDescent(self._decoder.layers, self.slot, self.length, rows), ids)

    def go_down(self, descent: LayerDescent, passed: int, ids: Sequence[int]) -> Floats:
        """Let a descent pass so many layers; `ids` are what it reads."""
        found: list[Floats] = []
        self._ended = passed < self._decoder.shape.n_layers
        self._alone(lambda: found.append(descent.to(passed)))
        if not self._ended:
            self._grow(ids)
        return found[0]

    def stepped(self, logits: Floats, *, shared: bool) -> None:
        """Take note that `next_id` was read; `logits` (V,) lie in a buffer of this slot unless it is `shared`."""
        self._ids.append(self.next_id)
        self.length += 1
        self._logits = logits.copy() if shared else logits

    def remember(self, length: int | None = None) -> None:
        """Leave what was read, or its first `length` tokens, to the prefix cache."""
        prefixes, memory = self._decoder.prefixes, self._decoder.layers.memory
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
            decoder.layers.memory.reserve(self.slot + 1, len(blocks) * prefixes.block_tokens)
            for number, block in enumerate(blocks):
                decoder.layers.memory.write(self.slot, number * prefixes.block_tokens, block)
            self._grow(ids[: len(blocks) * prefixes.block_tokens])

        self._alone(copy)

    def _check(self, ids: Sequence[int]) -> None:
        check_room(ids, self._decoder.context, self.room)

    def _read(self, ids: Sequence[int], rows: int = 0) -> Bound:
        """Read one chunk, alone, with logits of its last `rows`, if they are wanted; returns the last segment."""
        if self._decoder.options.exact_drafts and self.length and len(ids) % TILE == 1:
            ids = [self._ids[-1], *ids]  # once more: it leaves the same keys and values
            self.rewind(self.length - 1)
        found: list[Bound] = []

        def run() -> None:
            length = self.length + len(ids)
            stack = self._decoder.layers.stack(range(self.slot, self.slot + 1), length, len(ids), head=bool(rows))
            found.append(stack.through(self._decoder.embeddings.rows(ids)[None], [length - 1], max(1, rows)))
            self._grow(ids)

        self._alone(run)
        return found[0]

    def _passes(self, ids: Sequence[int], n_rows: int) -> Iterator[tuple[Sequence[int], int]]:
        exact, long = self._decoder.options.exact_drafts, self._decoder.layers.has_long
        return passes(ids, n_rows, self.gone, begins=not self.length, long=long, exact=exact)

    def _grow(self, ids: Sequence[int]) -> None:
        self._ids += ids
        self.length += len(ids)

    def _alone(self, work: Callable[[], None]) -> None:
        self._decoder.turns.take(self, self.deadline, lambda _: work())


class _SequenceDescent:
    """A sequence on its way down; takes the sequence's turn for each stretch."""

    def __init__(self, sequence: TokenSequence, below: LayerDescent, ids: Sequence[int]) -> None:
        self._sequence, self._below, self._ids = sequence, below, ids

    def to(self, passed: int) -> Floats:
        return self._sequence.go_down(self._below, passed, self._ids)
