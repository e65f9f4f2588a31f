"""Build an artifact from a source: pack, write and measure, layer by layer. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.artifact.manifest import QUANTISATIONS, Energy, Manifest
from models.artifact.names import EXITS, LABELS, TOKENIZER, graph_file
from models.artifact.store import Artifact, ArtifactWriter, write_artifact
from models.build.adapter import Adapter
from models.build.graph import Dims
from models.build.losses import Losses, describe
from models.build.measure import Measurement
from models.build.pack import Packing, graphs
from models.build.progress import Report
from models.build.prune import Pruning
from models.build.quantise import Array
from models.build.source import SkilledSource, SkillHead, TensorSource
from models.errors import ArtifactError, SourceError

BUILDER = 4
"""Raised whenever the same source would give another artifact: cached builds are then made again."""


OWN, OPTIMUM = "own", "optimum"
"""Who makes the graph: `models.build.graph`, or optimum's exporter."""


@dataclass(frozen=True)
class BuildKey:
    """Everything that decides what comes out; equal keys mean the artifact need not be built again."""

    source: str
    adapter: str | None
    quantisation: str
    merged: bool
    pruned_layers: int = 0
    via: str = OWN
    prefill: bool = False
    builder: int = BUILDER


def build(
    source: TensorSource,
    out: Path,
    quant: str,
    adapter: Path | None,
    report: Report,
    *,
    merge: bool = False,
    texts: Sequence[Sequence[int]] = (),
    prune: int = 0,
    prefill: bool = False,
) -> Artifact:
    """Write the artifact of `source` to `out` and return it; an equal one that is there already is returned as it is.

    The adapter stays beside the weights, so that chats meet the base model as it was, or is merged into them.
    `texts` are token sequences to measure the loss on; `prune` drops so many layers first; `prefill` adds a second copy
    of each projection for passes over many tokens. Raises `SourceError` or
    `ArtifactError`; whatever happens, `out` holds the old artifact or the new one, never a part. One layer is in
    memory at a time.
    """
    if quant not in QUANTISATIONS:
        raise SourceError(f"quantisation '{quant}' is unknown; use one of {', '.join(QUANTISATIONS)}")
    added = Adapter.open(adapter) if adapter else None
    key = BuildKey(
        source.digest(), added.digest if added else None, quant, merge and added is not None, prune, prefill=prefill
    )
    cached = up_to_date(out, key, report)
    if cached:
        return cached
    head = _skill_head(source, added)
    pruning = Pruning.of(source, prune, head, texts, report) if prune else None
    source = pruning.source if pruning else source
    exits, exit_norms = (head.exits, head.exit_norms) if head else ((), None)
    packing = Packing(source, quant, added, merge, exits, exit_norms, prefill)
    packing.check()
    measure = Measurement(packing, head, texts)
    artifact = write_artifact(out, lambda writer: _fill(writer, packing, measure, head, key, pruning, report))
    report(1, 1, describe(artifact.manifest.losses))
    return artifact


def up_to_date(out: Path, key: BuildKey, report: Report) -> Artifact | None:
    """Return the artifact in `out` if it is whole and was made by the same key."""
    try:
        artifact = Artifact.open(out)
    except ArtifactError:
        return None
    sizes = {name: out / name for name in artifact.manifest.files}
    whole = all(p.is_file() and p.stat().st_size == artifact.manifest.files[n].size_bytes for n, p in sizes.items())
    if not whole or artifact.manifest.made.get("key") != asdict(key):
        return None
    report(1, 1, f"{out} is up to date; {describe(artifact.manifest.losses)}")
    return artifact


def _skill_head(source: TensorSource, adapter: Adapter | None) -> SkillHead | None:
    if adapter:
        adapter.check(source)
        head: SkillHead | None = adapter.skill_head()
    else:
        head = source.skill_head() if isinstance(source, SkilledSource) else None
    if head:
        head.check(source.shape.width)
    elif not source.has_lm_head:
        raise SourceError("the source has neither a vocabulary head nor skills; there is nothing it could answer")
    return head


def _fill(
    writer: ArtifactWriter,
    packing: Packing,
    measure: Measurement,
    head: SkillHead | None,
    key: BuildKey,
    pruning: Pruning | None,
    report: Report,
) -> Manifest:
    """Write all files, each layer as soon as it is packed."""
    source, shape, quant = packing.source, packing.shape, packing.quant
    writer.add_bytes(TOKENIZER, json.dumps(json.loads(source.tokenizer().to_str()), ensure_ascii=False).encode())
    dims: dict[str, Dims] = {}

    def add(tensors: Mapping[str, Array]) -> None:
        writer.add_grouped(tensors)
        dims.update({name: value.shape for name, value in tensors.items()})

    steps = shape.n_layers + 2
    report(0, steps, f"{quant}: head and embeddings")
    embeddings = packing.embeddings()
    add(embeddings or packing.top())  # the texts that measure are embedded from what was written
    measure.begin(writer)
    for n in range(shape.n_layers):
        tensors = packing.layer(n)
        add(tensors)
        measure.layer(n, tensors)
        del tensors  # before the next layer is packed
        report(n + 1, steps, f"{quant}: layer {n + 1} of {shape.n_layers}")
    if embeddings:
        add(packing.top())
    chosen = [(variant, False) for variant in packing.variants]
    for variant, prefill in [*chosen, *([(packing.variants[-1], True)] if packing.prefill else [])]:
        made = graphs(shape, packing.exits, source.has_lm_head, dims, variant, prefill=prefill)
        for number, (_, graph) in enumerate(made):
            writer.add_bytes(graph_file(variant, number, prefill=prefill), graph)
    if head:
        writer.add_tensors(LABELS, {"labels": head.labels, "inputs": head.inputs})
    report(shape.n_layers + 1, steps, "comparing with the source")
    found, checked = measure.end(writer)
    if pruning:
        return _manifest(
            source, key, head, found | pruning.losses, {"checked": checked, "pruned": pruning.choice.as_dict()}
        )
    manifest = _manifest(source, key, head, found, {"checked": checked})
    if packing.adapter is None or packing.adapter.exit_heads is None:
        return manifest
    writer.add_tensors(EXITS, packing.adapter.exit_tensors)
    return replace(manifest, exit_heads=packing.adapter.exit_heads)


def _manifest(
    source: TensorSource, key: BuildKey, head: SkillHead | None, found: Losses, more: Mapping[str, Any]
) -> Manifest:
    stamp = "-".join([key.quantisation, key.source[:8], *([key.adapter[:8]] if key.adapter else [])])
    energy = Energy(**head.energy) if head and head.energy else Energy()
    made = {"key": asdict(key), "with": {name: version(name) for name in ("edgecascade", "onnx", "numpy")}}
    base = Manifest(
        model_id=source.model_id,
        model_version=stamp,
        architecture=source.shape,
        quantisation=key.quantisation,
        eos_ids=tuple(source.eos_ids),
        chat_template=source.chat_template,
        lm_head=source.has_lm_head,
        energy=energy,
        losses=found,
        made={**made, **more},
    )
    return replace(base, skills=head.skills, exits=head.exits, calibration=head.calibration) if head else base
