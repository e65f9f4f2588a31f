"""Push a few texts through a decoder one layer at a time: the whole model is never in memory.

T tokens, C width, V vocabulary. Every text has its own residual stream (T, C).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, load_model_from_string

from models.artifact.names import DRAFT, FRAMES, PLAIN, Span
from models.artifact.shape import LlamaShape
from models.build.graph import FAST_ACTIVATIONS, decoder_graph, head_graph
from models.build.quantise import Array
from models.build.source import Floats
from models.runtime.engine import Embeddings
from models.runtime.layers import rotary_tables

ROWS_AT_ONCE = 32
"""Positions whose logits are made together."""


class LayerwiseDecoder:
    """The streams of some texts in one model; `exact` is for fp32 weights, which are then used where they lie.

    Texts of the variant FRAMES meet the adapter beside the weights, those of PLAIN do not. Call `embed`, then `layer`
    for each layer in order; `hidden` (T, C) is then each text's normalised state.
    """

    def __init__(self, shape: LlamaShape, texts: Sequence[tuple[str, Sequence[int]]], *, exact: bool) -> None:
        self._shape, self._exact = shape, exact
        self._texts = texts
        self.states: list[Floats] = []
        self.hidden: list[Floats] = []

    def embed(self, embeddings: Embeddings) -> None:
        """Begin with the embeddings of every text."""
        self.states = [embeddings.rows(ids) for _, ids in self._texts]

    def layer(self, n: int, tensors: Mapping[str, Array], final_norm: Floats) -> None:
        """Pass layer `n`, whose tensors are given."""
        for variant in (PLAIN, FRAMES):
            chosen = [index for index, (kind, _) in enumerate(self._texts) if kind == variant]
            if chosen:
                self._pass(n, {**tensors, "final_norm": final_norm}, variant, chosen)

    def _pass(self, n: int, tensors: Mapping[str, Array], variant: str, chosen: Sequence[int]) -> None:
        unused = ("prefill.",) if variant == FRAMES else ("prefill.", "adapter.")
        weights = {name: v for name, v in tensors.items() if not name.startswith(unused)}
        span = Span(n, n + 1, "final_norm", head=False)
        whole = replace(self._shape, n_layers=self._shape.n_layers + 1)  # so that every layer hands its stream on
        dims = {name: value.shape for name, value in weights.items()}
        graph = decoder_graph(whole, span, dims, adapter=variant == FRAMES, accuracy_level=FAST_ACTIVATIONS)
        used = {name for name in weights if not name.endswith("exit_norm")}
        run = _Runner(graph, {name: weights[name] for name in used}, exact=self._exact)
        self.hidden = self.hidden or [np.zeros(0, np.float32) for _ in self._texts]
        for index in chosen:
            feed = _feed(self._shape, n, self.states[index])
            hidden, carried = run(["hidden", "carried"], feed)
            self.hidden[index], self.states[index] = hidden[0], carried[0]


class LayerwiseHead:
    """The vocabulary head: hidden states to logits, a few positions at a time."""

    def __init__(self, shape: LlamaShape, tensors: Mapping[str, Array], *, exact: bool) -> None:
        weights = {name: value for name, value in tensors.items() if name.startswith("head.")}
        graph = head_graph(shape, {name: value.shape for name, value in tensors.items()})
        table = {key.removeprefix("embeddings."): v for key, v in tensors.items() if key.startswith("embeddings.")}
        self._given = Embeddings(table, None, shape.width).flat() if f"{DRAFT}.q" in tensors else {}
        self._run = _Runner(graph, weights, exact=exact)

    def rows(self, hidden: Floats) -> Iterator[Floats]:
        """Logits (≤ ROWS_AT_ONCE, V) of (T, C), piece by piece."""
        for at in range(0, len(hidden), ROWS_AT_ONCE):
            found = self._run(["logits"], {"hidden": hidden[None, at : at + ROWS_AT_ONCE], **self._given})[0]
            yield np.asarray(found[0], np.float32)


class _Runner:
    """A graph with its weights. onnxruntime copies initializers: `exact` weights are fed in as inputs instead."""

    def __init__(self, graph: bytes, weights: Mapping[str, Array], *, exact: bool) -> None:
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # sessions come and go
        self._fed = weights if exact else {}
        if not exact:
            values = [ort.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
            settings.add_external_initializers(list(weights), values)
        opened = _with_inputs(graph) if exact else graph
        self._session = ort.InferenceSession(opened, settings, providers=["CPUExecutionProvider"])

    def __call__(self, results: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
        """Run the graph."""
        return list(self._session.run(list(results), {**feed, **self._fed}))


def _with_inputs(graph: bytes) -> bytes:
    """Turn external initializers into inputs."""
    model = load_model_from_string(graph)
    outside = [i for i in model.graph.initializer if i.data_location == TensorProto.EXTERNAL]
    inside = [i for i in model.graph.initializer if i.data_location != TensorProto.EXTERNAL]
    model.graph.input.extend(helper.make_tensor_value_info(i.name, i.data_type, i.dims) for i in outside)
    del model.graph.initializer[:]
    model.graph.initializer.extend(inside)
    return bytes(model.SerializeToString())


def _feed(shape: LlamaShape, n: int, x: Floats) -> dict[str, Array]:
    n_tokens = len(x)
    empty = np.zeros((1, shape.n_kv_heads, n_tokens, shape.head_dim), np.float32)
    return {
        "x": x[None],
        "last_position": np.array([n_tokens - 1], np.int32),
        "total_length": np.array([n_tokens], np.int32),
        f"past_key.{n}": empty,
        f"past_value.{n}": empty,
        **rotary_tables(shape, n_tokens),
    }
