"""Build an artifact from a source: pack, measure what was lost, write. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.artifact.manifest import QUANTISATIONS, Energy, Manifest
from models.artifact.names import LABELS, TOKENIZER, graph_file
from models.artifact.store import Artifact, ArtifactWriter, write_artifact
from models.build.adapter import Adapter
from models.build.losses import Losses, describe, losses
from models.build.pack import PackedModel, pack
from models.build.progress import Report
from models.build.source import SkilledSource, SkillHead, TensorSource
from models.errors import ArtifactError, SourceError

BUILDER = 2
"""Raised whenever the same source would give another artifact: cached builds are then made again."""


@dataclass(frozen=True)
class BuildKey:
    """Everything that decides what comes out; equal keys mean the artifact need not be built again."""

    source: str
    adapter: str | None
    quantisation: str
    merged: bool
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
) -> Artifact:
    """Write the artifact of `source` to `out` and return it; an equal one that is there already is returned as it is.

    The adapter stays beside the weights, so that chats meet the base model as it was, or is merged into them.
    `texts` are token sequences to measure the loss on. Raises `SourceError` or `ArtifactError`; whatever happens,
    `out` holds the old artifact or the new one, never a part.
    """
    if quant not in QUANTISATIONS:
        raise SourceError(f"quantisation '{quant}' is unknown; use one of {', '.join(QUANTISATIONS)}")
    added = Adapter.open(adapter) if adapter else None
    key = BuildKey(source.digest(), added.digest if added else None, quant, merge and added is not None)
    cached = _cached(out, key)
    if cached:
        report(1, 1, f"{out} is up to date; {describe(cached.manifest.losses)}")
        return cached
    head = _skill_head(source, added)
    packed = _packed(source, quant, added, head, report, merge=merge)
    found = {} if quant == "fp32" else _losses(source, packed, added, head, report, merge=merge, texts=texts)
    manifest = _manifest(source, key, head, found)
    report(1, 1, describe(found))
    return write_artifact(out, lambda writer: _fill(writer, source, packed, head, manifest))


def _cached(out: Path, key: BuildKey) -> Artifact | None:
    try:
        artifact = Artifact.open(out)
    except ArtifactError:
        return None
    sizes = {name: out / name for name in artifact.manifest.files}
    whole = all(p.is_file() and p.stat().st_size == artifact.manifest.files[n].size_bytes for n, p in sizes.items())
    return artifact if whole and artifact.manifest.made.get("key") == asdict(key) else None


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


def _packed(
    source: TensorSource, quant: str, adapter: Adapter | None, head: SkillHead | None, report: Report, *, merge: bool
) -> PackedModel:
    exits, norms = (head.exits, head.exit_norms) if head else ((), None)
    return pack(source, quant, adapter, report, merge=merge, exits=exits, exit_norms=norms)


def _losses(
    source: TensorSource,
    packed: PackedModel,
    adapter: Adapter | None,
    head: SkillHead | None,
    report: Report,
    *,
    merge: bool,
    texts: Sequence[Sequence[int]],
) -> Losses:
    reference = _packed(source, "fp32", adapter, head, report, merge=merge)
    report(0, 1, "comparing with fp32")
    return losses(packed, reference, source.tokenizer(), head, texts)


def _manifest(source: TensorSource, key: BuildKey, head: SkillHead | None, found: Mapping[str, Any]) -> Manifest:
    stamp = "-".join([key.quantisation, key.source[:8], *([key.adapter[:8]] if key.adapter else [])])
    energy = Energy(**head.energy) if head and head.energy else Energy()
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
        made={"key": asdict(key), "with": {name: version(name) for name in ("edgecascade", "onnx", "numpy")}},
    )
    return replace(base, skills=head.skills, exits=head.exits, calibration=head.calibration) if head else base


def _fill(
    writer: ArtifactWriter, source: TensorSource, packed: PackedModel, head: SkillHead | None, manifest: Manifest
) -> Manifest:
    writer.add_bytes(TOKENIZER, json.dumps(json.loads(source.tokenizer().to_str()), ensure_ascii=False).encode())
    for variant in packed.variants:
        for number, segment in enumerate(packed.segments(variant)):
            writer.add_bytes(graph_file(variant, number), segment.graph)
    writer.add_grouped(packed.tensors)
    if head:
        arrays = {"labels": head.labels, "inputs": head.inputs}
        writer.add_tensors(LABELS, arrays)
    return manifest
