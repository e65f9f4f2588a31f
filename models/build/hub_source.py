"""A model as a folder in Hugging Face's layout: `config.json`, safetensors, `tokenizer.json`. Read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from models.artifact.shape import LlamaShape
from models.artifact.tensors import Array, tensor_readers
from models.build.families import family_of
from models.build.source import Floats, with_special_tokens
from models.errors import ArtifactError, SourceError

INDEX = "model.safetensors.index.json"


class HubFolder:
    """What a folder says besides its weights; raises `SourceError` with one sentence if that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _told(path):
            self.config: dict[str, Any] = json.loads((path / "config.json").read_bytes())
            self._tokenizer_json = (path / "tokenizer.json").read_text("utf-8")
            self.files = _tensor_files(path)

    @property
    def model_id(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def chat_template(self) -> str:
        """The Jinja template of chats, '' if the model does not chat."""
        beside, settings = self.path / "chat_template.jinja", self._json("tokenizer_config.json")
        template = beside.read_text("utf-8") if beside.is_file() else settings.get("chat_template")
        named = {name: settings.get(name) for name in ("bos_token", "eos_token")}
        texts = {name: t["content"] if isinstance(t, dict) else t for name, t in named.items() if t}
        return with_special_tokens(template, texts) if isinstance(template, str) else ""

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end an answer."""
        found = self._json("generation_config.json").get("eos_token_id", self.config.get("eos_token_id"))
        return () if found is None else tuple(found) if isinstance(found, list) else (int(found),)

    @property
    def has_lm_head(self) -> bool:
        """A causal language model predicts tokens."""
        return True

    def digest(self) -> str:
        """SHA-256 over config, tokenizer and weights, in hex."""
        parts = [json.dumps(self.config, sort_keys=True).encode(), self._tokenizer_json.encode()]
        digests = [hashlib.sha256(part).digest() for part in parts]
        for file in self.files:
            with file.open("rb") as opened:
                digests.append(hashlib.file_digest(opened, "sha256").digest())
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return Tokenizer.from_str(self._tokenizer_json)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
        return found


class HubSource(HubFolder):
    """A folder of a family that has a fused graph; raises `SourceError` for anything it cannot take."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._tensors: dict[str, Callable[[], Array]] = {}
        with _told(path):
            self._family = family_of(self.config)
            self.shape: LlamaShape = self._family.shape(self.config)
            self._maps = [_mapped(file) for file in self.files]
            for file, data in zip(self.files, self._maps, strict=True):
                self._tensors |= tensor_readers(data, str(file))
        self._group = ""
        if fault := self.shape.fault():
            raise SourceError(f"{path} is damaged: its config gives a '{fault}' that cannot be")

    def has(self, name: str) -> bool:
        """Whether the tensor is there; a tied head is not."""
        if name == "output.weight" and self.config.get("tie_word_embeddings", self._family.tied):
            return False
        return self._family.stored(name, self.shape).name in self._tensors

    def tensor(self, name: str) -> Floats:
        """A tensor in fp32."""
        self._let_go(name)
        at = self._family.stored(name, self.shape)
        if at.name not in self._tensors:
            raise SourceError(f"{self.path} lacks the tensor '{at.name}'")
        values = np.asarray(self._tensors[at.name](), np.float32)
        if at.count:
            return values[at.first : at.first + at.count]
        return (
            values + np.float32(self._family.norm_offset) if values.ndim == 1 and self._family.norm_offset else values
        )

    def _let_go(self, name: str) -> None:
        """Free the memory of what was read of the files, whenever another layer is asked for; views stay valid."""
        group = name[: name.find(".", len("blk."))]
        if group != self._group and hasattr(mmap, "MADV_DONTNEED"):
            for data in self._maps:
                if isinstance(data, mmap.mmap):
                    data.madvise(mmap.MADV_DONTNEED)
        self._group = group


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a folder is read into one sentence."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path} is not a whole model folder: {error.filename} cannot be read") from error
    except (AttributeError, ValueError, KeyError, TypeError, ArtifactError) as error:
        raise SourceError(f"{path} is damaged: {error}") from error


def _tensor_files(path: Path) -> list[Path]:
    """The files of an index, or all there are, in order of their names."""
    index = path / INDEX
    if not index.is_file():
        return sorted(path.glob("*.safetensors"))
    names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    if foreign := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{INDEX} names the file '{foreign[0]}', which is not in the folder")
    return [path / name for name in sorted(names)]


def _mapped(file: Path) -> mmap.mmap | bytes:
    """The file's bytes, read from the disk when they are looked at."""
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""
