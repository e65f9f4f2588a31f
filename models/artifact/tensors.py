"""Read and write safetensors files, straight from and to numpy, a tensor at a time."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ArtifactError

Array = NDArray[Any]
_KINDS = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "U8": "|u1", "I8": "|i1", "I32": "<i4", "I64": "<i8", "BF16": "<u2"}
_NAMES = {"<i8": "I64", "<f8": "F64", "<f4": "F32", "<i4": "I32", "<f2": "F16", "|i1": "I8", "|u1": "U8", "|b1": "BOOL"}
"""Types by numpy's names, in the order in which `safetensors` lays them out."""
_HEADER_LIMIT_BYTES = 100_000_000


def read_tensors(data: bytes | memoryview, where: str) -> dict[str, Array]:
    """Return read-only views on the tensors in `data`, bfloat16 widened to fp32; `ArtifactError` names `where`."""
    return {name: read() for name, read in tensor_readers(data, where).items()}


def tensor_readers(data: bytes | memoryview | mmap.mmap, where: str) -> dict[str, Callable[[], Array]]:
    """Like `read_tensors`, but each tensor is a function that reads it: a file may be larger than memory."""
    view = memoryview(data)
    start = 8 + int.from_bytes(view[:8], "little")
    if start > min(len(view), _HEADER_LIMIT_BYTES):
        raise ArtifactError(f"{where} is not a whole safetensors file: its header does not fit")
    try:
        header = json.loads(bytes(view[8:start]))
        header.pop("__metadata__", None)
        return {name: _reader(view[start:], entry) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where} is not a whole safetensors file: {error}") from error


def _reader(body: memoryview, entry: Mapping[str, Any]) -> Callable[[], Array]:
    start, stop = entry["data_offsets"]
    kind, dims = np.dtype(_KINDS[entry["dtype"]]), entry["shape"]
    if not 0 <= start <= stop <= len(body) or stop - start != math.prod(dims) * kind.itemsize:
        raise ValueError("a tensor does not fit")

    def read() -> Array:
        values = np.frombuffer(body[start:stop], kind).reshape(dims)
        return np.left_shift(values, np.uint32(16)).view(np.float32) if entry["dtype"] == "BF16" else values

    return read


def tensor_pieces(tensors: Mapping[str, Array]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file's header, then each tensor's bytes, laid out as the library `safetensors` does.

    The library joins all tensors in memory before it writes; a layer in fp32 is large enough for that to matter.
    """
    ranks = list(_NAMES)
    order = sorted(tensors, key=lambda name: (ranks.index(tensors[name].dtype.str), name))
    header: dict[str, Any] = {}
    at = 0
    for name in order:
        value = tensors[name]
        header[name] = {"dtype": _NAMES[value.dtype.str], "shape": value.shape, "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data
