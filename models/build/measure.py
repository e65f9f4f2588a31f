"""Measures a build while its layers go by: what it lost, and whether the graph computes what the source model does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models.artifact.names import EMBEDDINGS, HEAD
from models.build import reference
from models.build.hub_source import HubSource
from models.build.layerwise import LayerwiseHead
from models.build.losses import Losses, Probe, Side, check, intent_losses, probe, token_losses
from models.build.pack import Packing
from models.build.quantise import Array
from models.build.reference import Expected, PlainForward
from models.build.source import SkillHead, TensorSource

CHECKED_TEXTS, CHECKED_TOKENS = 2, 16
"""How many texts are held against the source model, and from how many tokens each starts."""
NUMPY = "a plain numpy forward pass"


class Written(Protocol):
    """Reads back what was written."""

    def tensors(self, name: str) -> dict[str, Array]:
        """Tensors of one file, nothing if there is none."""


class Measurement:
    """Call `begin` when head and embeddings are written, `layer` for each layer, then `end`."""

    def __init__(self, packing: Packing, head: SkillHead | None, texts: Sequence[Sequence[int]]) -> None:
        source = packing.source
        self._packing, self._head = packing, head
        self._exact = replace(packing, quant="fp32")
        found = probe(source.tokenizer(), head, source.shape, texts, lm_head=source.has_lm_head)
        # With an adapter merged into it the model is no longer the source's: there is nothing to hold it against.
        prompts = [] if packing.merge else [ids[:CHECKED_TOKENS] for ids in found.tokens[:CHECKED_TEXTS]]
        self._expected = _expected(source, prompts)
        self._plain = PlainForward(source, prompts) if prompts and not self._expected else None
        self._prompts = prompts
        quantised = packing.quant != "fp32"
        self._ours = Side(source.shape, found, packing.split, exact=False) if quantised else None
        extra = [case.ids for case in self._expected] or prompts
        self._reference = Side(source.shape, found if quantised else Probe(), packing.split, exact=True, extra=extra)
        self._final_norm = np.asarray(source.tensor("output_norm.weight"), np.float32)

    def begin(self, written: Written) -> None:
        """Embed the texts."""
        inputs = self._head.inputs if self._head else None
        if self._ours:
            found = written.tensors(EMBEDDINGS) or written.tensors(HEAD)
            self._ours.embed({name.partition(".")[2]: value for name, value in found.items()}, inputs)
        self._reference.embed({"w": self._packing.source.tensor("token_embd.weight")}, inputs)

    def layer(self, n: int, tensors: Mapping[str, Array]) -> None:
        """Pass layer `n`, given as it was packed."""
        if self._ours:
            self._ours.layer(n, tensors, self._final_norm)
        self._reference.layer(n, self._exact.layer(n) if self._ours else tensors, self._final_norm)
        if self._plain:
            self._plain.layer(n)

    def end(self, written: Written) -> tuple[Losses, dict[str, Any]]:
        """Return the losses, and how near the fp32 graph is to the source model; raises `SourceError` if it is not."""
        source, losses = self._packing.source, Losses()
        checked: dict[str, Any] = {}
        if source.has_lm_head:
            table = source.tensor("output.weight" if source.has("output.weight") else "token_embd.weight")
            exact = LayerwiseHead(source.shape, {"head.w": table}, exact=True)
            if self._ours:
                ours = LayerwiseHead(source.shape, written.tensors(HEAD) | written.tensors(EMBEDDINGS), exact=False)
                losses |= token_losses(self._ours, ours, self._reference, exact)
            checked = self._check(exact, table) if self._prompts else {}
        if self._ours and self._head:
            losses |= intent_losses(self._ours, self._reference, self._head)
        return losses, checked

    def _check(self, head: LayerwiseHead, table: Array) -> dict[str, Any]:
        states = self._reference.own()
        expected, name = self._expected, _transformers() if self._expected else NUMPY
        if self._plain:
            pairs = zip(self._prompts, self._plain.logits(table), strict=True)
            expected = [Expected(ids, logits, len(ids)) for ids, logits in pairs]
        return check(name, expected, lambda index: np.concatenate(list(head.rows(states[index]))))


def _expected(source: TensorSource, prompts: Sequence[Sequence[int]]) -> list[Expected]:
    """What transformers says, or nothing where it is not installed or cannot read the source."""
    if not prompts or not isinstance(source, HubSource) or not reference.can_load():
        return []
    return reference.expect(reference.load(Path(source.path)), prompts)


def _transformers() -> str:
    from importlib.metadata import version

    return f"transformers {version('transformers')}"
