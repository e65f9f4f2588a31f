"""llama.cpp through llama-cpp-python's C interface: what its own command line does, without the wrapper's copies.

Batches of 512 as its own bench has them, the weights mapped, keys and values in fp16, flash attention on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import ContenderError
from bench.peers import Entrant, Floats, Greedy, Model, Reader

BATCH = 512
ABOUT = "n_batch 512, mmap, fp16 cache, flash attention on"
_REMOTE = "RPC "
"""Begins the name of a setting that keeps the head and so many of the last layers in another process."""


def entrants(model: Model) -> list[Entrant]:
    """The file itself and Q4_0."""
    asis = Entrant("llama.cpp", "file", model.file, f"the GGUF itself; {ABOUT}")
    q4_0 = Entrant("llama.cpp", "Q4_0", model.q4_0, f"8-bit head; {ABOUT}")
    return [q4_0] if model.same else [asis, q4_0]


def remote(file: Path, layers: int) -> Entrant:
    """The file with its head and last `layers` in a server of llama.cpp's RPC backend, on loopback."""
    return Entrant("llama.cpp", f"{_REMOTE}{layers}", file, f"the last {layers} layers and the head over RPC")


def prepare(_model: Model, _entrant: Entrant) -> None:
    """The file is there already."""


def warm_up() -> None:
    """Load the library."""
    import llama_cpp

    llama_cpp.llama_backend_init()


def load(entrant: Entrant, threads: int, context: int) -> Reader:
    """Load the file; raises `ContenderError`."""
    if entrant.setting.startswith(_REMOTE):
        from bench.peers.llama_rpc import devices

        layers = int(entrant.setting.removeprefix(_REMOTE))
        return _Reader(str(entrant.path).encode(), threads, context, devices(threads), layers + 1)
    return _Reader(str(entrant.path).encode(), threads, context)


def weight_bytes(entrant: Entrant) -> int:
    """All tensors of the file but an embedding table that is not the head as well."""
    import gguf

    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(str(entrant.path)).tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    return sum(tensors.values())


class _Reader(Greedy):
    """`devices` take the last `moved` of layers and head; None: all stays in this process."""

    def __init__(self, path: bytes, threads: int, context: int, devices: Any = None, moved: int = 0) -> None:
        import llama_cpp as api

        self._api: Any = api
        settings = api.llama_model_default_params()
        if devices is not None:
            settings.devices, settings.n_gpu_layers = ctypes.cast(devices, ctypes.c_void_p), moved
        self._model = api.llama_model_load_from_file(path, settings)
        if not self._model:
            raise ContenderError("llama.cpp refuses the file")
        wanted = api.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = context, BATCH, BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        wanted.no_perf = True
        self._context = api.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise ContenderError("llama.cpp makes no context")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def reset(self) -> None:
        wipe = False
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), wipe)

    def logits(self, ids: Sequence[int]) -> Floats:
        for at in range(0, len(ids), BATCH):
            piece = ids[at : at + BATCH]
            tokens = (ctypes.c_int32 * len(piece))(*piece)
            batch = self._api.llama_batch_get_one(tokens, len(piece))
            if self._api.llama_decode(self._context, batch):
                raise ContenderError("llama.cpp could not decode")
        found = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (self._vocab_size,))
