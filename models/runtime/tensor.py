"""Tensor parallel: ranks run the same layers, each with some heads and columns, and add up what comes of them.

After each layer's attention and after its MLP the ranks exchange partial sums, so that all carry the same stream; the
vocabulary is split too, and its logits are joined. A rank opens slices of the one artifact everybody has. Knows tokens
as numbers only. B sequences (here 1), T new tokens, C width, R rows, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.artifact.manifest import FUSED
from models.artifact.names import HEAD as HEAD_FILE
from models.artifact.names import LOGITS_FROM, PLAIN, graph_file, layer_file, spans
from models.artifact.shape import LlamaShape
from models.artifact.store import Artifact
from models.errors import ArtifactError, RankLostError
from models.runtime.engine import Embeddings, check_room, chunks
from models.runtime.exchange import Exchange, Threads
from models.runtime.halves import ATTENTION, MLP, PARTIAL, Halves
from models.runtime.layers import rotary_tables
from models.runtime.memory import KeyValueMemory
from models.runtime.ranks import Rank, block_of, part, split
from models.runtime.sessions import EngineOptions, open_session

Array = NDArray[Any]
Floats = NDArray[np.float32]


def ranks_of(artifact: Artifact, count: int) -> list[Rank]:
    """Split an artifact's model among ranks; raises `ArtifactError` where it cannot be, with the reason."""
    m = artifact.manifest
    if m.graph != FUSED or not m.lm_head or m.exits:
        raise ArtifactError(
            f"{artifact.path} cannot be split among ranks: it must write text, by our own graph, and have no exits"
        )
    first = artifact.tensors(layer_file(0))
    return split(m.architecture, count, block_of(first, "layers.0.down", m.architecture.mlp_width))


class RankLayers:
    """One rank's slices of all layers and of the head, opened, and its part of the key-value memory.

    Not for two threads at once. All ranks are asked the same at the same time.
    """

    def __init__(self, artifact: Artifact, rank: Rank, exchange: Exchange, options: EngineOptions) -> None:
        whole = artifact.manifest.architecture
        self.shape = rank.shape(whole)
        self._n_layers, self._exchange = whole.n_layers, exchange
        self.context = context = min(options.context, whole.context)
        self._memory = KeyValueMemory(self.shape, 1, context)
        self._rotary = rotary_tables(whole, context + 1)
        self._last_position, self._total_length = np.zeros(1, np.int32), np.zeros(1, np.int32)
        (span,) = spans(whole.n_layers, (), lm_head=True)
        halves = Halves(artifact.read(graph_file(PLAIN, 0)), span, self.shape)
        self._sessions = {}
        for layer in range(whole.n_layers):
            weights = part(artifact.tensors(layer_file(layer)), rank, whole)
            for kind in (ATTENTION, MLP):
                half = halves.half(layer, kind, weights)
                self._sessions[layer, kind] = open_session(*half, options, f"{kind} of layer {layer}")
        half = halves.head(part(artifact.tensors(HEAD_FILE), rank, whole))
        self._head = open_session(*half, options, "the head")

    def run(self, x: Floats, length: int, rows: int) -> Floats:
        """Pass states (1, T, C) behind `length` tokens through all layers; logits (rows, V) of the last ones."""
        self._memory.reserve(1, length + x.shape[1])
        self._last_position[:] = self._total_length[:] = length + x.shape[1]
        self._last_position -= 1
        given = {"last_position": self._last_position, "total_length": self._total_length, **self._rotary}
        for layer in range(self._n_layers):
            keys, values = self._memory.layer(layer, range(1))
            memory = {f"key.{layer}": keys, f"value.{layer}": values}
            x = x + self._exchange.total(_pass(self._sessions[layer, ATTENTION], {**given, "x": x}, memory))
            x = x + self._exchange.total(_pass(self._sessions[layer, MLP], {"x": x}, {}))
        logits = _pass(self._head, {"x": x[:, -rows:], LOGITS_FROM: np.full(1, -rows, np.int64)}, {})
        found: Floats = self._exchange.joined(logits)[0]
        return found


def _pass(session: ort.InferenceSession, given: Mapping[str, Array], memory: Mapping[str, Floats]) -> Floats:
    """Run a half; keys and values are extended where they lie."""
    binding = session.io_binding()
    bound = {**given, **{f"past_{name}": value for name, value in memory.items()}}
    for wanted in session.get_inputs():
        value = bound[wanted.name]
        binding.bind_input(wanted.name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
    for name, value in memory.items():
        binding.bind_output(f"present_{name}", "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
    binding.bind_output(PARTIAL, "cpu")
    session.run_with_iobinding(binding)
    return np.asarray(binding.get_outputs()[-1].numpy())


class TensorDecoder:
    """A `TextEngine` whose ranks are threads of this process; one sequence is lent at a time."""

    def __init__(
        self, ranks: Sequence[RankLayers], meeting: Threads, embeddings: Embeddings, whole: LlamaShape
    ) -> None:
        self.context = ranks[0].context
        self._ranks, self._meeting, self._embeddings = tuple(ranks), meeting, embeddings
        self._scale = np.float32(whole.embedding_scale)
        self._pool = ThreadPoolExecutor(len(ranks), "rank")
        self._place = threading.Semaphore(1)

    @classmethod
    def open(cls, artifact: Artifact, count: int, options: EngineOptions) -> TensorDecoder:
        """Open an artifact for so many ranks; raises `ArtifactError` where it cannot be split, with the reason."""
        whole, meeting = artifact.manifest.architecture, Threads(count)
        ranks = [RankLayers(artifact, rank, meeting.end(rank.number), options) for rank in ranks_of(artifact, count)]
        return cls(ranks, meeting, Embeddings(artifact.embeddings(), None, whole.width), whole)

    def close(self) -> None:
        """End the ranks' threads."""
        self._pool.shutdown()

    @contextmanager
    def sequence(self, _deadline: float = math.inf, gone: Callable[[], bool] | None = None) -> Iterator[TensorSequence]:
        """Lend an empty sequence; waits while another is lent, and the deadline orders nothing."""
        with self._place:
            yield TensorSequence(self, gone)

    def run(self, ids: Sequence[int], length: int) -> Floats:
        """Read ids behind `length` tokens; logits (V,) for the next one. Only for whoever has the sequence."""
        x = self._embeddings.rows(ids)[None] * self._scale
        works = [self._pool.submit(self._rank, rank, x, length) for rank in self._ranks]
        wait(works)
        self._meeting.reset()
        errors = [error for work in works if (error := work.exception())]
        if errors:  # the one that failed first, not those that then waited in vain
            raise next((error for error in errors if not isinstance(error, RankLostError)), errors[0])
        logits: Floats = works[0].result()[-1]
        return logits

    def _rank(self, rank: RankLayers, x: Floats, length: int) -> Floats:
        try:
            return rank.run(x, length, rows=1)
        except BaseException:
            self._meeting.abort()  # the others would wait for ever
            raise


class TensorSequence:
    """One growing token sequence."""

    def __init__(self, decoder: TensorDecoder, gone: Callable[[], bool] | None) -> None:
        self._decoder, self._gone = decoder, gone
        self.length = 0

    def reset(self) -> None:
        """Forget everything; what the memory holds is never read again."""
        self.length = 0

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._decoder.context - self.length

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read ids and return logits (V,) for the next token."""
        check_room(ids, self._decoder.context, self.room)
        for chunk in chunks(ids, self._gone):
            found = self._decoder.run(chunk, self.length)
            self.length += len(chunk)
        return found
