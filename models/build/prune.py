"""Drop the layers that change the residual stream least.

Gromov et al. 2024, arXiv 2403.17887: of all blocks of N neighbouring layers, drop the one between whose input and
output the angle, averaged over positions, is smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.artifact.names import PLAIN
from models.artifact.shape import LlamaShape
from models.build.layerwise import LayerwiseDecoder, LayerwiseHead
from models.build.losses import Losses, Probe, Side, probe, token_losses
from models.build.pack import Packing
from models.build.progress import Report
from models.build.source import Floats, GridSource, SkillHead, TensorSource
from models.errors import SourceError
from models.runtime.engine import Embeddings


@dataclass(frozen=True)
class Choice:
    """Layers `first` … `first + count - 1` go; `distance` is their angle over π, `largest` that of the worst block."""

    first: int
    count: int
    distance: float
    largest: float

    @property
    def dropped(self) -> range:
        """The layers that go."""
        return range(self.first, self.first + self.count)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "layers": list(self.dropped),
            "angular_distance": round(self.distance, 5),
            "largest_angular_distance": round(self.largest, 5),
        }


def choose(source: TensorSource, count: int, texts: Sequence[Sequence[int]], report: Report) -> Choice:
    """Pick the block of `count` layers to drop; raises `SourceError` if fewer than one would be left."""
    n_layers = source.shape.n_layers
    if not 0 < count < n_layers:
        raise SourceError(f"--prune {count} is not possible: the model has {n_layers} layers, and one must stay")
    directions = _directions(source, texts, report)
    starts = range(n_layers - count + 1)
    distances = [_distance(directions[at], directions[at + count]) for at in starts]
    first = int(np.argmin(distances))
    return Choice(first, count, distances[first], max(distances))


def _directions(source: TensorSource, texts: Sequence[Sequence[int]], report: Report) -> list[Floats]:
    """The residual stream before each layer and after the last, as unit vectors (T, C) of all texts' positions."""
    packing = Packing(source, "fp32")
    packing.check()
    decoder = LayerwiseDecoder(source.shape, [(PLAIN, ids) for ids in texts], exact=True)
    decoder.embed(Embeddings({"w": source.tensor("token_embd.weight")}, None, source.shape.width))
    norm = np.asarray(source.tensor("output_norm.weight"), np.float32)
    found = [_units(decoder.states)]
    for n in range(source.shape.n_layers):
        decoder.layer(n, packing.layer(n), norm)
        found.append(_units(decoder.states))
        report(n + 1, source.shape.n_layers, f"looking for layers to drop: layer {n + 1} of {source.shape.n_layers}")
    return found


def _units(states: Sequence[Floats]) -> Floats:
    joined = np.concatenate(list(states))
    return np.asarray(joined / np.linalg.norm(joined, axis=-1, keepdims=True), np.float32)


def _distance(a: Floats, b: Floats) -> float:
    return float(np.arccos(np.clip((a * b).sum(-1), -1, 1)).mean() / np.pi)


class PrunedSource:
    """A source without some of its layers; the others move up."""

    def __init__(self, source: TensorSource, choice: Choice) -> None:
        self._source = source
        self._kept = [n for n in range(source.shape.n_layers) if n not in choice.dropped]
        self._mark = f"-{choice.first}..{choice.first + choice.count}"
        local = tuple(new for new, old in enumerate(self._kept) if old in source.shape.local_layers)
        self.shape: LlamaShape = replace(source.shape, n_layers=len(self._kept), local_layers=local)

    @property
    def model_id(self) -> str:
        """The source's name, and how many layers are left."""
        return f"{self._source.model_id}-{len(self._kept)}-layers"

    @property
    def chat_template(self) -> str:
        """The Jinja template of chats."""
        return self._source.chat_template

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end an answer."""
        return self._source.eos_ids

    @property
    def has_lm_head(self) -> bool:
        """Whether the model predicts tokens of its vocabulary."""
        return self._source.has_lm_head

    def digest(self) -> str:
        """The source's digest, marked with what was dropped."""
        return self._source.digest() + self._mark

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._source.tokenizer()

    def has(self, name: str) -> bool:
        """Whether the tensor is there."""
        return self._source.has(self._old(name))

    def tensor(self, name: str) -> Floats:
        """A tensor in fp32."""
        return self._source.tensor(self._old(name))

    def _old(self, name: str) -> str:
        if not name.startswith("blk."):
            return name
        _, layer, rest = name.split(".", 2)
        return f"blk.{self._kept[int(layer)]}.{rest}"


class PrunedGridSource(PrunedSource):
    """The same for a source whose grids are kept."""

    def __init__(self, source: TensorSource, grids: GridSource, choice: Choice) -> None:
        super().__init__(source, choice)
        self._grids = grids

    def quantisation(self, name: str) -> str:
        """The block format."""
        return self._grids.quantisation(self._old(name))

    def blocks(self, name: str) -> NDArray[np.uint8]:
        """Raw blocks, rows in the file's order."""
        return self._grids.blocks(self._old(name))

    def row_order(self, name: str) -> NDArray[np.int64] | None:
        """The order that brings the rows into `tensor`'s, or None."""
        return self._grids.row_order(self._old(name))


@dataclass(frozen=True)
class Pruning:
    """A pruned source, what was dropped, and what that alone cost in fp32."""

    source: PrunedSource
    choice: Choice
    losses: Losses

    @classmethod
    def of(
        cls, source: TensorSource, count: int, head: SkillHead | None, texts: Sequence[Sequence[int]], report: Report
    ) -> Pruning:
        """Drop `count` layers; raises `SourceError` if that is not possible."""
        if head:
            raise SourceError("--prune is for models that write text: skills were trained on all layers")
        found = probe(source.tokenizer(), None, source.shape, texts, lm_head=True)
        choice = choose(source, count, found.tokens, report)
        pruned = (
            PrunedGridSource(source, source, choice) if isinstance(source, GridSource) else PrunedSource(source, choice)
        )
        sides = [_passed(some, found, report) for some in (pruned, source)]
        table = source.tensor("output.weight" if source.has("output.weight") else "token_embd.weight")
        vocabulary = LayerwiseHead(source.shape, {"head.w": table}, exact=True)
        return cls(pruned, choice, token_losses(sides[0], vocabulary, sides[1], vocabulary, "pruning"))


def _passed(source: TensorSource, found: Probe, report: Report) -> Side:
    """The probe's texts after all layers, in fp32."""
    side = Side(source.shape, found, split=False, exact=True)
    side.embed({"w": source.tensor("token_embd.weight")}, None)
    packing, norm = Packing(source, "fp32"), np.asarray(source.tensor("output_norm.weight"), np.float32)
    for n in range(source.shape.n_layers):
        side.layer(n, packing.layer(n), norm)
        report(n + 1, source.shape.n_layers, f"measuring {source.shape.n_layers} layers")
    return side
