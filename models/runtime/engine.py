"""Run a decoder on onnxruntime: one session a segment, key-value buffers that past and present share, bound once.

Knows tokens as numbers only. T new tokens, C width, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.artifact.names import BLOCK, FRAMES, HEAD, PLAIN, Span, adapter_file, graph_file, layer_file, spans
from models.artifact.shape import LlamaShape
from models.artifact.store import Artifact
from models.errors import ArtifactError, PromptTooLongError

Array = NDArray[Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
CHUNK = 256
"""Tokens that go through the model at once; a longer prompt goes in pieces, so that memory stays bounded."""


@dataclass(frozen=True)
class EngineOptions:
    """`spin` lets idle threads wait busily: faster, but it costs power; `sequences` may be open at the same time."""

    threads: int = 2
    spin: bool = True
    context: int = 2048
    sequences: int = 4


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

    def sequence(self) -> AbstractContextManager[TextSequence]:
        """Lend an empty sequence; waits while all are in use."""


@dataclass(frozen=True)
class Segment:
    """One graph with its weights; the weights are let go of once the session has packed them."""

    span: Span
    graph: bytes
    weights: Mapping[str, Array]


def segments(artifact: Artifact, variant: str) -> Iterator[Segment]:
    """Read the segments of a graph variant, one at a time."""
    m = artifact.manifest
    for number, span in enumerate(spans(m.architecture.n_layers, m.exits, m.lm_head and variant == PLAIN)):
        weights: dict[str, Array] = {}
        for layer in span.layers:
            weights |= artifact.tensors(layer_file(layer))
            if variant == FRAMES and artifact.has(adapter_file(layer)):
                weights |= artifact.tensors(adapter_file(layer))
        if span.stop == m.architecture.n_layers:
            top = artifact.tensors(HEAD)
            weights |= top if span.head else {span.norm: top[span.norm]}
        yield Segment(span, artifact.read(graph_file(variant, number)), weights)


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
        if codes.shape[-1] < BLOCK:
            raise ArtifactError("the embedding table is stored in 4 bits; this version reads 8 bits or fp32")
        values = (codes.astype(np.float32) - 128) * scale[..., None]
        return np.asarray(values.reshape(len(index), -1)[:, : self._width], np.float32)


class Decoder:
    """A loaded model; `sequence()` lends one of a few key-value sessions."""

    def __init__(
        self, shape: LlamaShape, parts: Iterable[Segment], embeddings: Embeddings, options: EngineOptions
    ) -> None:
        self.shape, self.options, self.embeddings = shape, options, embeddings
        self.context = min(options.context, shape.context)
        self._segments = [(part.span, _session(part, options)) for part in parts]
        self._rotary = rotary_tables(shape, self.context)
        self._places = threading.BoundedSemaphore(options.sequences)
        self._lock = threading.Lock()
        self._free: list[TokenSequence] = []

    @contextmanager
    def sequence(self) -> Iterator[TokenSequence]:
        """Lend an empty sequence; waits while all are in use."""
        with self._places:
            with self._lock:
                found = self._free.pop() if self._free else None
            sequence = found or TokenSequence(self)
            try:
                yield sequence
            finally:
                sequence.reset()
                with self._lock:
                    self._free.append(sequence)

    def bind(self, counters: tuple[Ints, Ints]) -> list[_Bound]:
        """Make the bindings of a new sequence, one a segment."""
        return [
            _Bound(self.shape, span, session, self._rotary, counters, self.context) for span, session in self._segments
        ]


def _session(part: Segment, options: EngineOptions) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = options.threads, 1
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spin else "0")
    values = [ort.OrtValue.ortvalue_from_numpy(value) for value in part.weights.values()]
    try:
        settings.add_external_initializers(list(part.weights), values)
        return ort.InferenceSession(part.graph, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors share no narrower base
        raise ArtifactError(f"onnxruntime refuses layers {part.span.first} to {part.span.stop - 1}: {error}") from error


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


def chunks(ids: Sequence[int], context: int, room: int) -> Iterator[Sequence[int]]:
    """Cut ids into pieces that go through a model at once; raises `PromptTooLongError` if they do not fit."""
    if not ids:
        raise PromptTooLongError("the prompt has no tokens", "messages")
    if len(ids) > room:
        raise PromptTooLongError(
            f"the prompt is longer than the model's context of {context} tokens; shorten it", "messages"
        )
    return (ids[at : at + CHUNK] for at in range(0, len(ids), CHUNK))


class _Bound:
    """A segment's session with one sequence's buffers bound to it."""

    def __init__(
        self,
        shape: LlamaShape,
        span: Span,
        session: ort.InferenceSession,
        rotary: Mapping[str, Floats],
        counters: tuple[Ints, Ints],
        context: int,
    ) -> None:
        self.span, self._session, self._binding = span, session, session.io_binding()
        self._width = shape.width
        self._carries = span.stop < shape.n_layers
        self._kept: dict[str, Array] = {}
        self._n_tokens = 0
        counted = zip(("last_position", "total_length"), counters, strict=True)
        for name, value in [*counted, *rotary.items()]:
            self._input(name, value)
        for layer in span.layers:
            for kind in ("key", "value"):
                cache = np.zeros((1, shape.n_kv_heads, context, shape.head_dim), np.float32)
                self._input(f"past_{kind}.{layer}", cache)
                self._output(f"present_{kind}.{layer}", cache)
        if span.head:
            self._output("logits", np.zeros((1, 1, shape.vocab_size), np.float32))

    def _input(self, name: str, value: Array) -> None:
        self._kept[name] = value
        self._binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)

    def _output(self, name: str, value: Array) -> None:
        self._kept[name] = value
        self._binding.bind_output(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)

    def run(self, x: Floats) -> None:
        """Run on embeddings or a carried stream (1, T, C); results lie in `hidden`, `carried` and `logits`."""
        if x.shape[1] != self._n_tokens:
            self._n_tokens = x.shape[1]
            self._input("x", np.empty_like(x))
            for name in ("hidden", "carried") if self._carries else ("hidden",):
                self._output(name, np.empty((1, self._n_tokens, self._width), np.float32))
        self._kept["x"][:] = x
        self._session.run_with_iobinding(self._binding)

    def __getitem__(self, name: str) -> Floats:
        return self._kept[name]


class TokenSequence:
    """One growing token sequence and its key-value memory. Not for two threads at once."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._last_position, self._total_length = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._bound = decoder.bind((self._last_position, self._total_length))
        self.length = 0

    def reset(self) -> None:
        """Forget everything; what the buffers hold is never read again."""
        self.length = 0

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._decoder.context - self.length

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read ids and return logits (V,) for the next token; the array is overwritten by the next call."""
        for chunk in self._chunks(ids):
            self._through(chunk)
        return np.asarray(self._bound[-1]["logits"][0, -1])

    def hidden(self, ids: Sequence[int]) -> Floats:
        """Read ids and return the model's normalised states (T, C) at each of them."""
        parts = []
        for chunk in self._chunks(ids):
            self._through(chunk)
            parts.append(self._bound[-1]["hidden"][0].copy())
        return np.concatenate(parts)

    def hidden_early(self, ids: Sequence[int], enough: Callable[[Floats], bool]) -> tuple[Floats, int]:
        """Like `hidden`, for the last ids only, but stop at the first exit whose last state (C,) is `enough`.

        Returns the last state and the number of layers passed. After an early stop the sequence cannot go on: it
        counts as full.
        """
        *before, last = list(self._chunks(ids))
        for chunk in before:
            self._through(chunk)
        for segment in self._steps(last):
            state = segment["hidden"][0, -1].copy()
            if segment is not self._bound[-1] and enough(state):
                self.length = self._decoder.context
                return state, segment.span.stop
        return state, self._decoder.shape.n_layers

    def _chunks(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        return chunks(ids, self._decoder.context, self.room)

    def _through(self, ids: Sequence[int]) -> None:
        for _ in self._steps(ids):
            pass

    def _steps(self, ids: Sequence[int]) -> Iterator[_Bound]:
        """Run segment after segment; the sequence has grown when the first is done."""
        x = self._decoder.embeddings.rows(ids)[None]
        self.length += len(ids)
        self._last_position[0], self._total_length[0] = self.length - 1, self.length
        for segment in self._bound:
            segment.run(x)
            yield segment
            x = segment["carried"] if segment is not self._bound[-1] else x
