"""Read a trained adapter: low-rank updates, label head and card."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.artifact.manifest import ExitHeads
from models.artifact.names import EXITS, SITES
from models.artifact.tensors import Array, read_tensors, tensor_pieces
from models.build.source import Floats, SkillHead, TensorSource
from models.errors import ArtifactError, DataError, SourceError
from models.skills import SkillSet

TENSORS, CARD = "adapter.safetensors", "adapter.json"
EXIT_CARD = "exits.json"
_NAME = re.compile(r"layers\.(\d+)\.(\w+)\.(a|b\d+)")


def recalibrate_card(folder: Path, calibration: Mapping[str, Any]) -> None:
    """Write another calibration into an adapter's card, in one step; raises `SourceError` if it is no adapter."""
    card = dict(Adapter.open(folder).card) | {"calibration": dict(calibration)}
    part = folder / f"{CARD}.part"
    part.write_text(json.dumps(card, indent=1) + "\n", "utf-8")
    part.replace(folder / CARD)


def write_exits(folder: Path, heads: ExitHeads, tensors: Mapping[str, Array]) -> None:
    """Write exits beside an adapter; raises `SourceError` if it is none."""
    Adapter.open(folder)
    (folder / EXITS).write_bytes(b"".join(tensor_pieces(tensors)))
    (folder / EXIT_CARD).write_text(json.dumps(heads.as_dict(), indent=1) + "\n", "utf-8")


def _exits(folder: Path) -> tuple[bytes, ExitHeads, dict[str, Array]] | None:
    """All bytes of an adapter's exits, their card and weights; None if it has none."""
    if not (folder / EXIT_CARD).exists():
        return None
    data, text = (folder / EXITS).read_bytes(), (folder / EXIT_CARD).read_bytes()
    return data + text, ExitHeads.from_dict(json.loads(text)), read_tensors(data, str(folder / EXITS))


@dataclass(frozen=True)
class Update:
    """y += B A x at one fused projection: `a` (R, K), `b` (N, R), block diagonal where parts are fused."""

    a: Floats
    b: Floats


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: `adapter.safetensors` and `adapter.json`, and the same of `exits` where there are any."""

    path: Path
    digest: str
    card: Mapping[str, Any]
    tensors: Mapping[str, Array]
    exit_heads: ExitHeads | None = None
    exit_tensors: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Read the folder; raises `SourceError`."""
        try:
            data, text = (path / TENSORS).read_bytes(), (path / CARD).read_bytes()
            card = json.loads(text)
            SkillSet.from_dict(card["skills"])
            tensors = read_tensors(data, str(path / TENSORS))
            heads = _exits(path)
        except OSError as error:
            raise SourceError(
                f"{path} is not an adapter: it needs {TENSORS} and {CARD}; make one with 'edgecascade adapt'"
            ) from error
        except (ValueError, KeyError, TypeError, DataError, ArtifactError) as error:
            raise SourceError(f"the adapter in {path} is damaged: {error}") from error
        if heads is None:
            return cls(path, hashlib.sha256(data + text).hexdigest(), card, tensors)
        more, exit_heads, exit_tensors = heads
        return cls(path, hashlib.sha256(data + text + more).hexdigest(), card, tensors, exit_heads, exit_tensors)

    @property
    def has_updates(self) -> bool:
        """Whether there are low-rank updates, not a label head only."""
        return any(_NAME.fullmatch(name) for name in self.tensors)

    def updates(self, layer: int) -> dict[str, Update]:
        """Return the updates of one layer by site."""
        return {s: self._update(f"layers.{layer}.{s}") for s in SITES if f"layers.{layer}.{s}.a" in self.tensors}

    def _update(self, at: str) -> Update:
        a = self.tensors[f"{at}.a"].astype(np.float32)
        parts: list[Floats] = []
        while (name := f"{at}.b{len(parts)}") in self.tensors:
            parts.append(self.tensors[name].astype(np.float32))
        if not parts or sum(p.shape[1] for p in parts) != len(a):
            raise SourceError(f"the adapter's '{at}' has parts that do not fit together")
        b = np.zeros((sum(len(p) for p in parts), len(a)), np.float32)
        row = column = 0
        for part in parts:
            b[row : row + len(part), column : column + part.shape[1]] = part
            row, column = row + len(part), column + part.shape[1]
        return Update(a, b)

    def check(self, source: TensorSource) -> None:
        """Raise `SourceError` if the adapter was trained on another model or names a layer that is not there."""
        if self.card.get("source") not in {None, source.digest()}:
            raise SourceError(f"the adapter in {self.path} was trained on another model; name that one or adapt again")
        for name in self.tensors:
            found = _NAME.fullmatch(name)
            known = found and found[2] in SITES and int(found[1]) < source.shape.n_layers
            if not known and name not in {"labels", "inputs"}:
                raise SourceError(f"the adapter in {self.path} has the unknown tensor '{name}'")

    def skill_head(self) -> SkillHead:
        """Label head and inputs; raises `SourceError` if they do not fit the skills."""
        skills = SkillSet.from_dict(self.card["skills"])
        labels, inputs = (self.tensors.get(n, np.zeros((0, 0))).astype(np.float32) for n in ("labels", "inputs"))
        head = SkillHead(
            skills, labels, inputs, calibration=self.card.get("calibration", {}), energy=self.card.get("energy", {})
        )
        head.check(labels.shape[-1])
        return head
