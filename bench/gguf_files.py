"""GGUF files to measure with: another one's weights in Q4_0, and random weights in a given shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Array = NDArray[Any]

BLOCK = 32
NO_CODE = 0x80
"""−128, which Q8_0 leaves out."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ t", "h e")


@dataclass(frozen=True)
class Shape:
    """A Llama-style decoder whose table of embeddings is also its head."""

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    mlp_width: int
    vocab_size: int
    rope_theta: float
    context: int = 2048
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.n_heads


SHAPES = {
    "qwen05": Shape(24, 896, 14, 2, 4864, 151_936, 1_000_000.0),
    "1b": Shape(16, 2048, 32, 8, 8192, 128_256, 500_000.0),
}
"""Qwen2.5-0.5B without the biases of its attention, so that every reader takes it as a Llama, and Llama 3.2 1B."""


def requantise(source: Path, target: Path) -> None:
    """Write `source` with all matrices but the embeddings and the head in Q4_0, rounded as llama.cpp rounds."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in {"general.architecture", "general.file_type"}:
            writer.add_key_value(
                field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        values, kind = tensor.data, tensor.tensor_type
        if len(tensor.shape) > 1 and not tensor.name.startswith(("token_embd", "output")):
            values = gguf.quants.quantize(gguf.quants.dequantize(values, kind), Kind.Q4_0)
            kind = Kind.Q4_0
        writer.add_tensor(tensor.name, np.array(values), raw_dtype=kind)
    _finish(writer)


def write_random(target: Path, shape: Shape, seed: int = 0) -> None:
    """Write random weights: matrices in Q4_0, embeddings in Q8_0, scaled so that activations keep their size."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(target), "llama")
    _describe(writer, shape)
    for name, rows, columns in _tensors(shape):
        if not columns:
            writer.add_tensor(name, np.ones(rows, np.float32))
        else:
            kind = Kind.Q8_0 if name == "token_embd.weight" else Kind.Q4_0
            writer.add_tensor(name, _blocks(rng, rows, columns, kind), raw_dtype=kind)
    _finish(writer)


def _describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    alphabet = [chr(n) for n in range(33, 127)]
    known = [*SPECIAL, *alphabet, "Ġ", "Ġt", "he"]
    writer.add_block_count(shape.n_layers)
    writer.add_embedding_length(shape.width)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_feed_forward_length(shape.mlp_width)
    writer.add_context_length(shape.context)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*known, *(f"<{n}>" for n in range(len(known), shape.vocab_size))])
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [1] * (shape.vocab_size - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Names with rows and columns; a vector has no columns."""
    kv_width = shape.n_kv_heads * shape.head_dim
    yield "token_embd.weight", shape.vocab_size, shape.width
    for n in range(shape.n_layers):
        yield f"blk.{n}.attn_norm.weight", shape.width, 0
        yield f"blk.{n}.attn_q.weight", shape.width, shape.width
        yield f"blk.{n}.attn_k.weight", kv_width, shape.width
        yield f"blk.{n}.attn_v.weight", kv_width, shape.width
        yield f"blk.{n}.attn_output.weight", shape.width, shape.width
        yield f"blk.{n}.ffn_norm.weight", shape.width, 0
        yield f"blk.{n}.ffn_gate.weight", shape.mlp_width, shape.width
        yield f"blk.{n}.ffn_up.weight", shape.mlp_width, shape.width
        yield f"blk.{n}.ffn_down.weight", shape.width, shape.mlp_width
    yield "output_norm.weight", shape.width, 0


def _blocks(rng: np.random.Generator, rows: int, columns: int, kind: Kind) -> Bytes:
    """Random codes under one scale: a uniform code of 16 steps spreads by 4.6, one of 256 by 73.9."""
    spread, size = (4.6, 16) if kind is Kind.Q4_0 else (73.9, 32)
    blocks = rng.integers(0, 256, (rows, columns // BLOCK, 2 + size), np.uint8)
    if kind is Kind.Q8_0:
        blocks[..., 2:] |= blocks[..., 2:] == NO_CODE
    blocks[..., :2] = np.frombuffer(np.float16(columns**-0.5 / spread).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
