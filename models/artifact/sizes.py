"""How large the parts of a tier are, as its manifest says: what whoever places its layers must know."""

from __future__ import annotations

from dataclasses import dataclass

from models.artifact.manifest import FUSED, Manifest
from models.artifact.names import EMBEDDINGS, HEAD, LABELS, in_range
from models.errors import ArtifactError

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Sizes:
    """Bytes of each layer's weights, of what the first and the last layer bring along, and of what the two share.

    `kv_bytes` are a token's keys and values in one layer, `hidden_bytes` its state between two layers, in fp32.
    """

    layers: tuple[int, ...]
    first: int
    last: int
    shared: int
    kv_bytes: int
    hidden_bytes: int


def sizes(manifest: Manifest) -> Sizes:
    """The parts of a tier that can be cut between layers; raises `ArtifactError` for one that cannot."""
    if manifest.graph != FUSED or not manifest.lm_head:
        raise ArtifactError(f"{manifest.model_id} cannot be cut: only a tier that writes text by our own graph can be")
    shape = manifest.architecture
    n_layers, tied = shape.n_layers, EMBEDDINGS not in manifest.files
    weights = {name: entry.size_bytes for name, entry in manifest.files.items() if name.endswith(".safetensors")}

    def needed(layer: int) -> set[str]:
        return {name for name in weights if in_range(name, range(layer, layer + 1), n_layers, tied)}

    def size(names: set[str]) -> int:
        return sum(weights[name] for name in names)

    ends = {EMBEDDINGS, HEAD, LABELS}
    first, last = needed(0) & ends, needed(n_layers - 1) & ends
    return Sizes(
        layers=tuple(size(needed(n) - ends) for n in range(n_layers)),
        first=size(first),
        last=size(last),
        shared=size(first & last),
        kv_bytes=2 * shape.n_kv_heads * shape.head_dim * FLOAT_BYTES,
        hidden_bytes=shape.width * FLOAT_BYTES,
    )
