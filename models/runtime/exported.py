"""Run a decoder that somebody else exported: its own attention, and key-value memory that grows by a copy each step.

The second engine behind `TextEngine`; `models.runtime.engine` is the fast one. Knows tokens as numbers only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.artifact.names import EMBEDDINGS, HEAD, PLAIN, graph_file, layer_file
from models.artifact.shape import LlamaShape
from models.artifact.store import Artifact
from models.runtime.engine import Floats, check_room, chunks
from models.runtime.providers import short_name
from models.runtime.sessions import EngineOptions, open_session

Array = NDArray[Any]


def exported_weights(artifact: Artifact) -> dict[str, Array]:
    """All tensors of an artifact with an exported graph."""
    files = [EMBEDDINGS, *map(layer_file, range(artifact.manifest.architecture.n_layers)), HEAD]
    return {name: value for file in files if artifact.has(file) for name, value in artifact.tensors(file).items()}


class ExportedDecoder:
    """A loaded model; `sequence()` lends one of a few sequences."""

    def __init__(self, shape: LlamaShape, graph: bytes, weights: Mapping[str, Array], options: EngineOptions) -> None:
        self.context = min(options.context, shape.context)
        self.session = open_session(graph, weights, options, "the exported graph")
        self._places = threading.BoundedSemaphore(options.sequences)

    @classmethod
    def open(cls, artifact: Artifact, options: EngineOptions) -> ExportedDecoder:
        """Load an artifact; raises `ArtifactError`."""
        graph = artifact.read(graph_file(PLAIN, 0))
        return cls(artifact.manifest.architecture, graph, exported_weights(artifact), options)

    @property
    def provider(self) -> str:
        """The execution provider in use, by its short name."""
        return short_name(self.session.get_providers()[0])

    @contextmanager
    def sequence(
        self, _deadline: float = math.inf, gone: Callable[[], bool] | None = None
    ) -> Iterator[GrowingSequence]:
        """Lend an empty sequence; no pass is shared here, so the deadline orders nothing."""
        with self._places:
            yield self.fresh(gone)

    def fresh(self, gone: Callable[[], bool] | None = None) -> GrowingSequence:
        """Make an empty sequence."""
        return GrowingSequence(self.session, self.context, gone)


class GrowingSequence:
    """One growing token sequence; each step hands the present keys and values on as the next step's past."""

    def __init__(self, session: ort.InferenceSession, context: int, gone: Callable[[], bool] | None = None) -> None:
        self._session, self._context, self._gone = session, context, gone
        self._results = [output.name for output in session.get_outputs()]
        self._wanted = {given.name for given in session.get_inputs()}
        self._empty = {
            given.name: ort.OrtValue.ortvalue_from_numpy(_empty(given.shape))
            for given in session.get_inputs()
            if given.name.startswith("past_")
        }
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length, self._past = 0, self._empty

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._context - self.length

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read ids and return logits (V,) for the next token."""
        check_room(ids, self._context, self.room)
        for chunk in chunks(ids, self._gone):
            found = self._step(chunk)
        return np.asarray(found[0, -1], np.float32)

    def all_logits(self, ids: Sequence[int]) -> Floats:
        """Read ids at once and return whatever positions' logits (…, V) the graph gives."""
        return np.asarray(self._step(ids)[0], np.float32)

    def _step(self, ids: Sequence[int]) -> Floats:
        start, self.length = self.length, self.length + len(ids)
        fed = {
            "input_ids": np.asarray([ids], np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(start, self.length, dtype=np.int64)[None],
        }
        feed = {name: ort.OrtValue.ortvalue_from_numpy(v) for name, v in fed.items() if name in self._wanted}
        found = dict(
            zip(self._results, self._session.run_with_ort_values(self._results, feed | self._past), strict=True)
        )
        self._past = {name: found[name.replace("past_", "present_", 1)] for name in self._empty}
        return np.asarray(found["logits"].numpy())


def _empty(dims: Sequence[int | str]) -> Array:
    """No keys or values yet: one row, and nothing along the other axis that the graph leaves open."""
    sizes = [dim if isinstance(dim, int) else 0 for dim in dims]
    return np.zeros([1, *sizes[1:]], np.float32)
