"""A model as a folder of our own: what training hands to `build`.

`model.safetensors` has GGUF's tensor names with rotary halves split, and `labels`, `inputs`, `exit_norms` where there
are skills; `source.json` the numbers; `tokenizer.json` the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer

from models.artifact.shape import LlamaShape
from models.artifact.tensors import Array, read_tensors
from models.build.source import Floats, SkillHead
from models.errors import ArtifactError, DataError, SourceError
from models.skills import SkillSet

TENSORS, CARD, TOKENIZER = "model.safetensors", "source.json", "tokenizer.json"


class FolderSource:
    """An open folder; raises `SourceError` with one sentence for anything it cannot take."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            files = {name: (path / name).read_bytes() for name in (TENSORS, CARD, TOKENIZER)}
            self._card: dict[str, Any] = json.loads(files[CARD])
            self._tensors = read_tensors(files[TENSORS], str(path / TENSORS))
            self.shape = LlamaShape.from_dict(self._card["architecture"])
            self._tokenizer_json = files[TOKENIZER].decode("utf-8")
            self._head = self._skill_head()
        except OSError as error:
            raise SourceError(f"{path} is not a model folder: {error.filename} cannot be read") from error
        except (ValueError, KeyError, TypeError, ArtifactError, DataError) as error:
            raise SourceError(f"{path} is damaged: {error}") from error
        self._digest = hashlib.sha256(b"".join(hashlib.sha256(files[n]).digest() for n in sorted(files))).hexdigest()

    @property
    def model_id(self) -> str:
        """A short name for the manifest."""
        return str(self._card["id"])

    @property
    def chat_template(self) -> str:
        """The Jinja template of chats, '' if the model does not chat."""
        return str(self._card["chat_template"])

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end an answer."""
        return tuple(self._card["eos_ids"])

    @property
    def has_lm_head(self) -> bool:
        """Whether the model predicts tokens of its vocabulary."""
        return bool(self._card["lm_head"])

    def digest(self) -> str:
        """SHA-256 over the three files' own, in hex."""
        return self._digest

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return Tokenizer.from_str(self._tokenizer_json)

    def has(self, name: str) -> bool:
        """Whether the tensor is there."""
        return name in self._tensors

    def tensor(self, name: str) -> Floats:
        """A tensor in fp32."""
        if name not in self._tensors:
            raise SourceError(f"{self.path} lacks the tensor '{name}'")
        return self._tensors[name].astype(np.float32)

    def skill_head(self) -> SkillHead | None:
        """The label head, or None."""
        return self._head

    def _skill_head(self) -> SkillHead | None:
        if not self._card["skills"]:
            return None
        exits = tuple(self._card["exits"])
        return SkillHead(
            SkillSet.from_dict(self._card["skills"]),
            self.tensor("labels"),
            self.tensor("inputs"),
            exits,
            self.tensor("exit_norms") if exits else None,
            self._card["calibration"],
            self._card["energy"],
        )


def write_folder_source(
    folder: Path,
    *,
    model_id: str,
    shape: LlamaShape,
    tensors: Mapping[str, Array],
    tokenizer: Tokenizer,
    head: SkillHead | None,
    eos_ids: Sequence[int] = (),
    chat_template: str = "",
    lm_head: bool = False,
) -> FolderSource:
    """Write a folder that `FolderSource` reads; `tensors` go by GGUF's names. The card is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    added: dict[str, Array] = {}
    if head:
        head.check(shape.width)
        added = {"labels": head.labels, "inputs": head.inputs}
        added |= {"exit_norms": head.exit_norms} if head.exit_norms is not None else {}
    card = {
        "id": model_id,
        "architecture": shape.as_dict(),
        "lm_head": lm_head,
        "eos_ids": list(eos_ids),
        "chat_template": chat_template,
        "skills": head.skills.as_dict() if head else None,
        "exits": list(head.exits) if head else [],
        "calibration": dict(head.calibration) if head else {},
        "energy": dict(head.energy) if head else {},
    }
    (folder / TENSORS).write_bytes(save({k: np.ascontiguousarray(v) for k, v in {**tensors, **added}.items()}))
    (folder / TOKENIZER).write_text(tokenizer.to_str(), "utf-8")
    part = folder / f"{CARD}.part"
    part.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")
    part.replace(folder / CARD)
    return FolderSource(folder)
