"""Our engine on our artifacts; the one module of `bench` that opens `models`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from bench.peers import Entrant, Floats, Greedy, Model, Reader
from models.artifact.names import HEAD, PLAIN
from models.artifact.store import Artifact
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.runtime.engine import Decoder, Embeddings
from models.runtime.sessions import EngineOptions, segments
from models.runtime.sessions import load as open_segments

TWICE = "+prefill"
"""Ends the name of a setting that stores weights a second time, for passes over many tokens."""
SEQUENCES = 8
"""Sequences that may be open at once."""
ABOUT = {
    "int4": "the file's own grid, its 8-bit head",
    "int4+prefill": "int4, and in int8 for long passes",
    "Q4_0": "the Q4_0 file's grid, 8-bit head",
    "int4-folded": "the file's grid, its offsets folded into the product",
    "int4-gptq": "4 bits calibrated on texts",
    "int4-gptq+prefill": "int4-gptq, and in int8 for long passes",
    "int8": "8 bits in blocks of 64, the head as in the file",
    "fp32": "the file's weights dequantised",
}


def entrants(model: Model) -> list[Entrant]:
    """The file's grid, Q4_0's, and our other quantisations; of random weights only what needs no texts."""
    if not model.trained:  # there is nothing to calibrate, which would take longest
        settings: Sequence[str] = ("int4", "int4+prefill", "int8")
    else:
        others = ("int4-folded", "int4-gptq", "int4-gptq+prefill", "int8")
        settings = ("int4", *others) if model.same else ("int4", "Q4_0", *others)
    return [_entrant(model, setting) for setting in settings]


def reference(model: Model) -> Entrant:
    """The dequantised weights."""
    return _entrant(model, "fp32")


def _entrant(model: Model, setting: str) -> Entrant:
    return Entrant("ours", setting, model.home / f"ours-{setting}", ABOUT[setting])


def prepare(model: Model, entrant: Entrant) -> None:
    """Build the artifact; one that is up to date is left."""
    requantised = entrant.setting == "Q4_0"
    source = GgufSource(model.q4_0 if requantised else model.file)
    quant, twice = entrant.setting.removesuffix(TWICE), entrant.setting.endswith(TWICE)
    build(source, entrant.path, "int4" if requantised else quant, None, lambda *_: None, prefill=twice)


def tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file."""
    return GgufSource(path).tokenizer()


def warm_up() -> None:
    """All imports stand above."""


def load(entrant: Entrant, threads: int, context: int) -> Reader:
    """Load the artifact."""
    artifact = Artifact.open(entrant.path)
    shape = artifact.manifest.architecture
    options = EngineOptions(threads=threads, context=context, sequences=SEQUENCES)
    embeddings = Embeddings(artifact.embeddings(), None, shape.width)
    twice = entrant.setting.endswith(TWICE)
    long = open_segments(segments(artifact, PLAIN, prefill=True), options, rests=True) if twice else ()
    return _Reader(Decoder(shape, segments(artifact, PLAIN), embeddings, options, long=long))


def weight_bytes(entrant: Entrant) -> int:
    """Layers and head; a table of embeddings of its own is only looked up."""
    files = Artifact.open(entrant.path).manifest.files
    return sum(entry.size_bytes for name, entry in files.items() if name.startswith("layer-") or name == HEAD)


class _Reader(Greedy):
    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._lent = decoder.sequence()
        self._sequence = self._lent.__enter__()

    def reset(self) -> None:
        self._sequence.reset()

    def logits(self, ids: Sequence[int]) -> Floats:
        return self._sequence.logits(ids)

    def another(self) -> Reader:
        return _Reader(self._decoder)
