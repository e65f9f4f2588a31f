"""transformers in fp32: the GGUF's weights, dequantised by its own reader. What it says is the reference."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import Entrant, Floats, Greedy, Model, Reader
from bench.peers.ours import tokenizer

CHUNK = 256
"""Ids read at once where the logits of all of them are asked for."""


def entrants(model: Model) -> list[Entrant]:
    """One row."""
    return [reference(model)]


def reference(model: Model) -> Entrant:
    """The dequantised weights."""
    about = f"transformers {version('transformers')}, sdpa, last logits only"
    return Entrant("transformers", "fp32", checkpoint(model), about)


def checkpoint(model: Model) -> Path:
    """The folder of the dequantised weights in Hugging Face's layout."""
    return model.home / "hugging-face"


def prepare(model: Model, _entrant: Entrant) -> None:
    """Write the checkpoint; a stopped run leaves none."""
    out = checkpoint(model)
    if out.is_dir():
        return
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    loaded = AutoModelForCausalLM.from_pretrained(model.file.parent, gguf_file=model.file.name, dtype=torch.float32)
    vars(loaded.config).pop("quantization_config", None)  # what names a quantisation is refused when it is saved
    part = out.with_name(out.name + ".part")
    loaded.save_pretrained(part, max_shard_size="8GB")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(model.file)).save_pretrained(part)
    part.rename(out)


def warm_up() -> None:
    """Import torch and the model's class."""
    import transformers.models.llama.modeling_llama  # noqa: F401


def load(entrant: Entrant, threads: int, _context: int) -> Reader:
    """Load the checkpoint; its cache grows as it goes and needs no room set aside."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(entrant.path, dtype=torch.float32, attn_implementation="sdpa")
    return _Reader(loaded.eval())


def weight_bytes(entrant: Entrant) -> int:
    """The checkpoint, whose table of embeddings is its head too."""
    return sum(path.stat().st_size for path in entrant.path.glob("*.safetensors"))


class _Reader(Greedy):
    def __init__(self, model: Any) -> None:
        self._model = model
        self._past: Any = None

    def reset(self) -> None:
        self._past = None

    def logits(self, ids: Sequence[int]) -> Floats:
        found: Floats = self._read(ids, keep=1)[-1]
        return found

    def all_logits(self, ids: Sequence[int]) -> Floats:
        return np.concatenate([self._read(ids[at : at + CHUNK], keep=0) for at in range(0, len(ids), CHUNK)])

    def _read(self, ids: Sequence[int], keep: int) -> Floats:
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([list(ids)]), past_key_values=self._past, use_cache=True, logits_to_keep=keep
            )
        self._past = out.past_key_values
        found: Floats = out.logits[0].numpy()
        return found
