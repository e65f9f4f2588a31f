"""Read a GGUF file: shape, tokenizer, chat template and weights, dequantised tensor by tensor."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.artifact.shape import LlamaShape
from models.build.families import GGUF_ARCHITECTURES
from models.build.source import with_special_tokens
from models.build.tokenizers import SPLITTERS, byte_level_bpe
from models.errors import SourceError

Floats = NDArray[np.float32]

ROWS_AT_ONCE = 512

__all__ = ["Floats", "GgufSource", "LlamaShape"]


class GgufSource:
    """An open GGUF file; raises `SourceError` with one sentence for anything it cannot take."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise SourceError(f"{path} is not a file; name a .gguf file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SourceError(f"{path} is not a GGUF file (its first four bytes are not 'GGUF')")
        try:
            self._reader = gguf.GGUFReader(str(path))
        except Exception as error:  # the reader raises whatever numpy raises on a short or garbled map
            raise SourceError(f"{path} is damaged or truncated: GGUF's header or tensors cannot be read") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._architecture = str(self._get("general.architecture"))
        if self._architecture not in GGUF_ARCHITECTURES:
            known = ", ".join(f"'{name}'" for name in GGUF_ARCHITECTURES)
            raise SourceError(f"{path} holds architecture '{self._architecture}'; this reader takes {known}")
        self.shape = self._shape()
        if fault := self.shape.fault():
            raise SourceError(f"{path} is damaged: it gives a '{fault}' that cannot be")

    def digest(self) -> str:
        """SHA-256 of the file, in hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _get(self, key: str, default: Any = None) -> Any:
        found = self._reader.fields.get(key)
        if found is None:
            if default is None:
                raise SourceError(f"{self.path} lacks the key '{key}'")
            return default
        return found.contents()

    def _shape(self) -> LlamaShape:
        def number(key: str, default: Any = None) -> Any:
            return self._get(f"{self._architecture}.{key}", default)

        width, heads = int(number("embedding_length")), int(number("attention.head_count"))
        if number("rope.scaling.type", "none") != "none":
            raise SourceError(f"{self.path} uses rope scaling, which this reader takes as the tensor 'rope_freqs' only")
        if number("attention.sliding_window", 0):
            raise SourceError(f"{self.path} has a sliding window, which this reader does not take; use its folder")
        return LlamaShape(
            n_layers=int(number("block_count")),
            width=width,
            n_heads=heads,
            n_kv_heads=int(number("attention.head_count_kv", heads)),
            head_dim=int(number("attention.key_length", number("rope.dimension_count", width // heads))),
            mlp_width=int(number("feed_forward_length")),
            vocab_size=len(self._get("tokenizer.ggml.tokens")),
            context=int(number("context_length")),
            rope_theta=float(number("rope.freq_base", 10000.0)),
            norm_eps=float(number("attention.layer_norm_rms_epsilon")),
            rope_divisors=self._rope_divisors(),
        )

    def _rope_divisors(self) -> tuple[float, ...]:
        """Llama 3's stretched frequencies, which GGUF stores as a tensor."""
        return tuple(map(float, self.tensor("rope_freqs.weight"))) if self.has("rope_freqs.weight") else ()

    @property
    def model_id(self) -> str:
        """The file's name without its quantisation."""
        return re.sub(r"[.-](I?Q\d\w*|B?F16|F32)$", "", self.path.stem, flags=re.IGNORECASE)

    @property
    def has_lm_head(self) -> bool:
        """A GGUF's model always predicts tokens."""
        return True

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        turn_end = self._reader.fields.get("tokenizer.ggml.eot_token_id")
        return tuple(sorted({self.eos_id} | ({int(turn_end.contents())} if turn_end else set())))

    @property
    def chat_template(self) -> str:
        """The Jinja template of the model's chats ('' for a base model)."""
        fields, tokens = self._reader.fields, self.tokens
        if "tokenizer.chat_template" not in fields:
            return ""
        ids = {name: fields.get(f"tokenizer.ggml.{name}_id") for name in ("bos_token", "eos_token")}
        texts = {name: tokens[int(found.contents())] for name, found in ids.items() if found}
        return with_special_tokens(str(self._get("tokenizer.chat_template")), texts)

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return int(self._get("tokenizer.ggml.eos_token_id"))

    @property
    def tokens(self) -> list[str]:
        """The vocabulary, in id order."""
        return list(self._get("tokenizer.ggml.tokens"))

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The BPE merges, in rank order."""
        pairs = (merge.split(" ", 1) for merge in self._get("tokenizer.ggml.merges"))
        return [(left, right) for left, right in pairs]

    @property
    def splitter(self) -> str:
        """How text is cut before BPE."""
        kind, pre = self._get("tokenizer.ggml.model"), self._get("tokenizer.ggml.pre", "gpt-2")
        if kind != "gpt2" or pre not in SPLITTERS:
            raise SourceError(
                f"{self.path} has a '{kind}/{pre}' tokenizer; this reader takes gpt2 with {', '.join(SPLITTERS)}"
            )
        return str(pre)

    def tokenizer(self) -> Tokenizer:
        """Build the model's tokenizer."""
        tokens, kinds = self.tokens, self._get("tokenizer.ggml.token_type")
        special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
        return byte_level_bpe(tokens, self.merges, special, self.splitter)

    def quantisation(self, name: str) -> str:
        """Name of the tensor's block format in the file, such as 'Q4_1'."""
        return str(self._tensor(name).tensor_type.name)

    def blocks(self, name: str) -> NDArray[np.uint8]:
        """The tensor's raw blocks (rows, bytes), rows in the file's order."""
        return np.asarray(self._tensor(name).data)

    def tensor(self, name: str) -> Floats:
        """Return a tensor as fp32, dequantised, in Hugging Face's layout (rotary halves split)."""
        raw = self._tensor(name)
        try:
            values = _dequantised(raw)
        except (NotImplementedError, ValueError) as error:
            raise SourceError(
                f"{self.path}: tensor '{name}' is stored as {raw.tensor_type.name}, which cannot be read"
            ) from error
        reorder = self.row_order(name)
        return values if reorder is None else values[reorder]

    def row_order(self, name: str) -> NDArray[np.int64] | None:
        """Row order that undoes GGUF's interleaved rotary layout of q and k, or None for other tensors."""
        if not GGUF_ARCHITECTURES[self._architecture] or not name.startswith("blk."):
            return None
        shape = self.shape
        heads = {"attn_q": shape.n_heads, "attn_k": shape.n_kv_heads}.get(name.split(".")[-2], 0)
        if not heads:
            return None
        rows = np.arange(heads * shape.head_dim)
        return rows.reshape(heads, shape.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def has(self, name: str) -> bool:
        """Whether the file holds the tensor."""
        return name in self._tensors

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise SourceError(f"{self.path} lacks the tensor '{name}'")
        return self._tensors[name]


def _dequantised(raw: Any) -> Floats:
    """A tensor in fp32, a few rows at a time: the library needs several times the memory of what it returns."""
    rows = np.asarray(raw.data)
    if rows.ndim == 1:
        return np.asarray(gguf.quants.dequantize(rows, raw.tensor_type), np.float32)
    values = np.empty(tuple(int(n) for n in raw.shape[::-1]), np.float32)
    for at in range(0, len(rows), ROWS_AT_ONCE):
        values[at : at + ROWS_AT_ONCE] = gguf.quants.dequantize(rows[at : at + ROWS_AT_ONCE], raw.tensor_type)
    return values
