"""Open a tier's graphs on onnxruntime: what to read of an artifact, and a session for each segment of its layers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.artifact.names import (
    FRAMES,
    HEAD,
    LOGITS_FROM,
    PLAIN,
    Span,
    adapter_file,
    graph_file,
    layer_file,
    of_small_passes,
    prefill_file,
    spans,
)
from models.artifact.store import Artifact
from models.errors import ArtifactError
from models.runtime.providers import CPU, int8_products_are_exact, usable
from models.runtime.slowed import SlowedSession, Throttle

Array = NDArray[Any]
SPIN_US = 1000
"""How long idle threads wait busily: longer than the pause between two steps, and no burden on who comes next."""


@dataclass(frozen=True)
class EngineOptions:
    """`spin` lets idle threads wait busily: faster, but it costs power; one that `rests` does so within a pass only.

    `sequences` may be open at the same time. A shard lets them share passes in so many `groups`; 0: as many as there
    are shards.

    `prefix_cache_bytes` keep keys and values of prompts for others that begin alike; `providers` are names of
    `models.runtime.providers`, the first that works is used. `slowdown`: each forward pass lasts so many times as long;
    for benches that stand for slower machines. `slowdown_file` holds another factor, which may change meanwhile.

    onnxruntime's attention rounds otherwise for one token than for several. With `exact_drafts` it never meets a token
    alone, so that on row-invariant products logits are bitwise the same with a draft and without; a step costs a little
    more, passes are not shared, and prompts take no segments for many tokens.
    """

    threads: int = 2
    spin: bool = True
    context: int = 2048
    sequences: int = 4
    prefix_cache_bytes: int = 0
    providers: Sequence[str] = (CPU,)
    exact_drafts: bool = False
    slowdown: float = 1.0
    slowdown_file: Path | None = None
    rests: bool = False
    groups: int = 0


@dataclass(frozen=True)
class Segment:
    """One graph with its weights; the weights are let go of once the session has packed them.

    `given` are weights that go in with each pass.
    """

    span: Span
    graph: bytes
    weights: Mapping[str, Array]
    given: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def for_many_tokens(cls, span: Span, graph: bytes, weights: Mapping[str, Array]) -> Segment:
        """Of all that a span has, what a pass over many tokens needs: it has no head, and is given the adapter."""
        given = {name: value for name, value in weights.items() if name.startswith("adapter.")}
        kept = {name: v for name, v in weights.items() if not of_small_passes(name) and name not in given}
        return cls(replace(span, head=False), graph, kept, given)


def segments(artifact: Artifact, variant: str, *, prefill: bool = False, cuts: Sequence[int] = ()) -> Iterator[Segment]:
    """Read the segments of a graph variant, one at a time; `prefill`: those for passes over many tokens.

    Where the artifact is open for some layers only, segments are those of these layers, graphs cut to fit; `cuts` are
    numbers of layers passed at which they are cut besides.
    """
    m = artifact.manifest
    for number, whole in enumerate(spans(m.architecture.n_layers, m.exits, m.lm_head and variant == PLAIN)):
        span = whole.within(artifact.layers)
        if span is None:
            continue
        graph = artifact.read(graph_file(variant, number, prefill=prefill))
        for part in span.cut_after(cuts):
            yield _segment(artifact, variant, part, _fitted(graph, whole, part), prefill=prefill)


def _fitted(graph: bytes, whole: Span, part: Span) -> bytes:
    if part.layers == whole.layers:
        return graph
    from models.runtime.cut import cut  # shards and exits only have onnx

    return cut(graph, whole, part.layers)


def _segment(artifact: Artifact, variant: str, span: Span, graph: bytes, *, prefill: bool) -> Segment:
    adapters = [adapter_file(layer) for layer in span.layers] if variant == FRAMES else []
    weights = artifact.tensors(*map(layer_file, span.layers), *filter(artifact.has, adapters))
    if prefill:
        weights |= artifact.tensors(*map(prefill_file, span.layers))
    if span.stop == artifact.manifest.architecture.n_layers:
        top = artifact.tensors(HEAD)
        weights |= top if span.head and not prefill else {span.norm: top[span.norm]}
    make = Segment.for_many_tokens if prefill else Segment
    return make(span, graph, weights)


def takes_rows(artifact: Artifact) -> bool:
    """Whether the model's graph gives logits at several positions, wherever its last layers are."""
    from onnx import ModelProto  # as above

    m = artifact.manifest
    number = len(spans(m.architecture.n_layers, m.exits, m.lm_head)) - 1
    model = ModelProto.FromString(artifact.read(graph_file(PLAIN, number)))
    return any(given.name == LOGITS_FROM for given in model.graph.input)


def variants(artifact: Artifact) -> list[str]:
    """The graph variants that the artifact has; raises `ArtifactError` if what it must have is not among them."""
    found = [variant for variant in (PLAIN, FRAMES) if artifact.has(graph_file(variant, 0))]
    if not found or (artifact.manifest.lm_head and PLAIN not in found):
        raise ArtifactError(f"{artifact.path} has no graph to run; build the artifact again")
    return found


@dataclass(frozen=True)
class Loaded:
    """A segment's session, and the weights that go in with each pass."""

    span: Span
    session: ort.InferenceSession
    given: Mapping[str, Array]

    def takes(self, name: str) -> bool:
        """Whether the graph has an input of that name."""
        return any(wanted.name == name for wanted in self.session.get_inputs())

    def without_adapter(self) -> Loaded:
        """The same session with an adapter that adds nothing."""
        sizes = [value.size for value in self.given.values()]
        nothing = np.zeros(max(sizes, default=0), np.float32)
        zeros = {name: nothing[: value.size].reshape(value.shape) for name, value in self.given.items()}
        return replace(self, given=zeros)


def load(parts: Iterable[Segment], options: EngineOptions, *, rests: bool = False) -> list[Loaded]:
    """Open the sessions of segments; decoders may share them. `rests` is explained in `open_session`."""
    return [Loaded(part.span, _session(part, options, rests=rests), part.given) for part in parts]


@dataclass(frozen=True)
class Parts:
    """What one variant runs: segments, and those for passes over many tokens, where there are such."""

    segments: Iterable[Segment | Loaded]
    long: Sequence[Loaded] = ()


def parts_of(artifact: Artifact, options: EngineOptions, exits: Sequence[int] = ()) -> Iterator[tuple[str, Parts]]:
    """Each variant with its parts, which are loaded one variant after the other.

    What answers skills is cut at `exits`, numbers of layers passed; what only writes text is not.
    """
    many = _for_many_tokens(artifact, options, exits)
    bare = [part.without_adapter() for part in many]
    found = variants(artifact)
    for variant in found:
        if artifact.manifest.lm_head and variant == PLAIN:
            yield variant, Parts(segments(artifact, variant, cuts=() if FRAMES in found else exits), bare)
        else:  # who writes no text reads many tokens at once
            yield variant, Parts(many or segments(artifact, variant, cuts=exits))


def _for_many_tokens(artifact: Artifact, options: EngineOptions, exits: Sequence[int]) -> list[Loaded]:
    """The sessions for passes over many tokens, if they were built and this processor is exact with them."""
    variant = variants(artifact)[-1]
    if not artifact.has(graph_file(variant, 0, prefill=True)) or not int8_products_are_exact():
        return []
    return load(segments(artifact, variant, prefill=True, cuts=exits), options, rests=True)


def open_session(
    graph: bytes,
    weights: Mapping[str, Array],
    options: EngineOptions,
    what: str,
    *,
    rests: bool = False,
    one_of_many: bool = False,
) -> ort.InferenceSession:
    """Make a session of a graph and weights from memory; raises `ArtifactError`, which names `what` was refused.

    One that `rests` has threads that never wait busily between passes, where they would be in another session's way.
    `one_of_many` keeps no memory of its own between passes: a hundred sessions would each hold what one pass needs.
    """
    settings = ort.SessionOptions()
    settings.enable_cpu_mem_arena = not one_of_many
    settings.intra_op_num_threads, settings.inter_op_num_threads = options.threads, 1
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spin else "0")
    settings.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    settings.add_session_config_entry("session.force_spinning_stop", "1" if rests or options.rests else "0")
    # Weights come from memory alone: a graph that names a file of weights is refused.
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    values = [ort.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
    try:
        settings.add_external_initializers(list(weights), values)
        session = ort.InferenceSession(
            graph, settings, providers=usable(options.providers, ort.get_available_providers())
        )
    except Exception as error:  # onnxruntime's own errors share no narrower base
        raise ArtifactError(f"onnxruntime refuses {what}: {error}") from error
    if options.slowdown == 1 and options.slowdown_file is None:
        return session
    file = options.slowdown_file
    factor = options.slowdown if file is None else Throttle(file, options.slowdown)
    return SlowedSession(session, factor, work=time.thread_time if options.threads == 1 else None)


def _session(part: Segment, options: EngineOptions, *, rests: bool = False) -> ort.InferenceSession:
    what = f"layers {part.span.first} to {part.span.stop - 1}"
    return open_session(part.graph, part.weights, options, what, rests=rests)
