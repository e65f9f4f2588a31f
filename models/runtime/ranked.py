"""One rank's part of a model, opened: slices of all layers and of the head, and keys and values of its heads.

What a rank computes of a sum lies in a buffer that is bound once; what all ranks' parts come to is handed in from
outside, so nothing here knows how ranks reach each other. Knows tokens as states only. B sequences (here 1), T new
tokens, C width, V vocabulary.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.artifact.manifest import FUSED
from models.artifact.names import HEAD as HEAD_FILE
from models.artifact.names import LOGITS_FROM, PLAIN, adapter_file, graph_file, layer_file, spans
from models.artifact.shape import LlamaShape
from models.artifact.store import Artifact
from models.errors import ArtifactError, LinkLostError, PromptTooLongError
from models.runtime.exchange import Exchange
from models.runtime.halves import ATTENTION, MLP, PARTIAL, Halves
from models.runtime.layers import rotary_tables
from models.runtime.links import Want
from models.runtime.memory import KeyValueMemory
from models.runtime.providers import short_name
from models.runtime.ranks import Rank, block_of, part, split
from models.runtime.sessions import EngineOptions, open_session, variants

Array = NDArray[Any]
Floats = NDArray[np.float32]
Steps = Generator[Floats, Floats, Floats]
"""Yields a rank's part (1, T, C) of each sum, is sent the sum, and returns the stream that ends the layers."""


def ranks_of(artifact: Artifact, count: int) -> list[Rank]:
    """Split an artifact's model among ranks; raises `ArtifactError` where it cannot be, with the reason."""
    m = artifact.manifest
    if m.graph != FUSED or not m.lm_head or m.exits:
        raise ArtifactError(
            f"{artifact.path} cannot be split among ranks: it must write text, by our own graph, and have no exits"
        )
    first = artifact.tensors(layer_file(0))
    return split(m.architecture, count, block_of(first, "layers.0.down", m.architecture.mlp_width))


def session_bytes(ranks: Sequence[Rank], whole: LlamaShape, context: int) -> int:
    """Bytes of keys and values that one session may come to, at the rank that holds most of them."""
    heads = max(len(rank.kv_heads) for rank in ranks)
    return 4 * 2 * whole.n_layers * heads * whole.head_dim * (min(context, whole.context) + 1)


class Places:
    """So many slots of a memory, lent one to a session."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free, self._lock = list(range(count)), threading.Lock()
        self._places = threading.BoundedSemaphore(count)

    @property
    def lent(self) -> int:
        """How many are."""
        return self.count - len(self._free)

    @contextmanager
    def lend(self, wait_s: float | None = None) -> Iterator[int]:
        """Lend a slot; waits while all are lent, but no longer than `wait_s`, then `LinkLostError`."""
        if not self._places.acquire(timeout=wait_s):
            raise LinkLostError(f"all of its {self.count} sessions are in use")
        with self._lock:
            slot = heapq.heappop(self._free)
        try:
            yield slot
        finally:
            with self._lock:
                heapq.heappush(self._free, slot)
            self._places.release()


@dataclass(frozen=True)
class _Variant:
    """Sessions of one graph variant: attention and MLP of each layer, in order; what ends them."""

    halves: Sequence[ort.InferenceSession]
    norm: ort.InferenceSession | None
    head: ort.InferenceSession | None


class RankLayers:
    """One rank's part of a model: every variant of its graph, over one memory. Not for two threads at once."""

    def __init__(self, artifact: Artifact, rank: Rank, options: EngineOptions) -> None:
        whole = artifact.manifest.architecture
        self.manifest, self.rank, self.shape = artifact.manifest, rank, rank.shape(whole)
        self.context = min(options.context, whole.context)
        self.places = Places(options.sequences)
        self._memory = KeyValueMemory(self.shape, options.sequences, self.context)
        self._rotary = rotary_tables(whole, self.context + 1)
        self._variants = {name: _opened(artifact, name, rank, options) for name in variants(artifact)}
        self._single: dict[tuple[str, int], _Bound] = {}
        self._several: tuple[tuple[str, int, int], _Bound] | None = None
        self._version = 0

    @property
    def variants(self) -> Sequence[str]:
        """Names of the graph variants."""
        return list(self._variants)

    @property
    def held_bytes(self) -> int:
        """Bytes set aside for keys and values."""
        return self._memory.size_bytes

    @property
    def provider(self) -> str:
        """Short name of the execution provider in use."""
        return short_name(next(iter(self._variants.values())).halves[0].get_providers()[0])

    def check_room(self, n_tokens: int, length: int) -> None:
        """Raise `PromptTooLongError` if so many tokens do not fit behind `length` others."""
        room = self.context - length
        if not 0 < n_tokens <= room:
            raise PromptTooLongError(f"{n_tokens} tokens do not fit: there is room for {room}", "messages")

    def steps(self, variant: str, slot: int, states: Floats, length: int) -> Steps:
        """Pass states (T, C) behind `length` tokens of a slot through all layers.

        A part is overwritten by the next.
        """
        return self._bound(variant, slot, len(states), length).steps(states, length)

    def logits(self, stream: Floats) -> Floats:
        """This rank's rows (V/N,) of the logits after the last token of a stream (1, T, C)."""
        head = self._variants[PLAIN].head
        assert head is not None  # noqa: S101  # `ranks_of` sees to it
        (found,) = head.run([PARTIAL], {"x": stream[:, -1:], LOGITS_FROM: _LAST})
        return np.asarray(found[0, 0], np.float32)

    def hidden(self, variant: str, stream: Floats) -> Floats:
        """The model's normalised states (T, C) of a stream (1, T, C); for rank 0."""
        norm = self._variants[variant].norm
        assert norm is not None  # noqa: S101  # rank 0 has one
        (found,) = norm.run([PARTIAL], {"x": stream})
        return np.asarray(found[0], np.float32)

    def run(self, variant: str, slot: int, states: Floats, length: int, want: Want, exchange: Exchange) -> Floats:
        """Run `steps` with all ranks; what is wanted: logits (1, V) after the last token, or states (T, C)."""
        stream = summed(self.steps(variant, slot, states, length), exchange.total)
        if want is Want.TOKEN:
            return exchange.joined(self.logits(stream))[None]
        return self.hidden(variant, stream) if want is Want.STATES and self.rank.number == 0 else stream[0]

    def _bound(self, variant: str, slot: int, n_tokens: int, length: int) -> _Bound:
        """The halves, bound for passes of so many tokens: one token for each slot, and the last pass of several."""
        self._memory.reserve(slot + 1, length + n_tokens)
        if self._version != self._memory.version:
            self._single, self._several, self._version = {}, None, self._memory.version
        if n_tokens > 1:
            key = variant, slot, n_tokens
            if self._several is None or self._several[0] != key:
                self._several = key, self._bind(*key)
            return self._several[1]
        found = self._single.get((variant, slot))
        if found is None:
            found = self._single[variant, slot] = self._bind(variant, slot, 1)
        return found

    def _bind(self, variant: str, slot: int, n_tokens: int) -> _Bound:
        return _Bound(self._variants[variant].halves, self.shape, self._rotary, self._memory, slot, n_tokens)


_LAST = np.full(1, -1, np.int64)


def summed(steps: Steps, total: Callable[[Floats], Floats]) -> Floats:
    """Drive `steps` to its end, each part by what `total` makes of it."""
    try:
        found = next(steps)
        while True:
            found = steps.send(total(found))
    except StopIteration as ended:
        stream: Floats = ended.value
        return stream


def _opened(artifact: Artifact, variant: str, rank: Rank, options: EngineOptions) -> _Variant:
    """Cut a variant's graph and weights to a rank's, and open its sessions; raises `ArtifactError`."""
    whole, writes = artifact.manifest.architecture, variant == PLAIN
    (span,) = spans(whole.n_layers, (), lm_head=writes)
    halves = Halves(artifact.read(graph_file(variant, 0)), span, rank.shape(whole))
    found = []
    for layer in span.layers:
        files = [layer_file(layer), *([] if writes else filter(artifact.has, [adapter_file(layer)]))]
        weights = part(artifact.tensors(*files), rank, whole)
        for kind in (ATTENTION, MLP):
            half = halves.half(layer, kind, weights)
            found.append(open_session(*half, options, f"{kind} of layer {layer}", one_of_many=True))
    top = part(artifact.tensors(HEAD_FILE), rank, whole)
    norm = open_session(*halves.norm(top), options, "the last norm") if rank.number == 0 else None
    return _Variant(found, norm, open_session(*halves.head(top), options, "the head") if writes else None)


class _Bound:
    """All halves bound to one slot's memory and to buffers for passes of T tokens."""

    def __init__(
        self,
        halves: Sequence[ort.InferenceSession],
        shape: LlamaShape,
        rotary: Mapping[str, Floats],
        memory: KeyValueMemory,
        slot: int,
        n_tokens: int,
    ) -> None:
        self._stream, self._part = (np.zeros((1, n_tokens, shape.width), np.float32) for _ in range(2))
        self._last_position, self._total_length = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._kept: dict[str, Array] = {
            "x": self._stream, "last_position": self._last_position, "total_length": self._total_length, **rotary,
        }  # fmt: skip
        for layer in range(shape.n_layers):
            keys, values = memory.layer(layer, range(slot, slot + 1))
            self._kept |= {f"past_key.{layer}": keys, f"past_value.{layer}": values}
        self._halves = [(session, self._binding(session)) for session in halves]

    def steps(self, states: Floats, length: int) -> Steps:
        """As `RankLayers.steps`."""
        self._total_length[0] = length + len(states)
        self._last_position[0] = self._total_length[0] - 1
        self._stream[0] = states
        for session, binding in self._halves:
            session.run_with_iobinding(binding)
            self._stream += yield self._part
        return self._stream

    def _binding(self, session: ort.InferenceSession) -> Any:
        binding = session.io_binding()
        for wanted in session.get_inputs():
            value = self._kept[wanted.name]
            binding.bind_input(wanted.name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
        for given in session.get_outputs():
            value = self._part if given.name == PARTIAL else self._kept[given.name.replace("present_", "past_")]
            binding.bind_output(given.name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
        return binding
