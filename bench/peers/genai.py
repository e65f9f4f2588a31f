"""onnxruntime-genai: the graph of its own builder in int4, in its own token loop."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.errors import ContenderError
from bench.peers import Entrant, Floats, Model, Reader
from bench.peers.transformers import checkpoint
from bench.peers.transformers import prepare as prepare_checkpoint

OPTIONS = ("prune_lm_head=true",)
"""Last logits only; all else is its default: fused queries, keys and values, activations in int8, one tied table."""
SETTINGS = {"int4": (), "int4-head8": ("algo_config=rtn_last",)}
"""The default rounding cannot share an 8-bit head with the embeddings in 0.15.2 (its graph does not load)."""
ABOUT = {"int4": "blocks of 32, head in 4 bits too", "int4-head8": "blocks of 32, 8-bit head"}


def entrants(model: Model) -> list[Entrant]:
    """Its default, and the same with an 8-bit head, as all others have it."""
    stem = model.home / f"genai-{version('onnxruntime-genai')}"
    about = {name: f"{text}; last logits only" for name, text in ABOUT.items()}
    return [Entrant("genai", name, Path(f"{stem}-{name}"), about[name]) for name in SETTINGS]


def prepare(model: Model, entrant: Entrant) -> None:
    """Run its builder; a stopped run leaves nothing."""
    if entrant.path.is_dir():
        return
    prepare_checkpoint(model, entrant)
    part = entrant.path.with_name(entrant.path.name + ".part")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint(model)), "-o", str(part)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(model.home), "--extra_options", *OPTIONS]
    subprocess.run([*command, *SETTINGS[entrant.setting]], check=True)  # noqa: S603
    part.rename(entrant.path)


def warm_up() -> None:
    """Load the library."""
    import onnxruntime_genai  # noqa: F401


def load(entrant: Entrant, threads: int, context: int) -> Reader:
    """Load the folder; no token ends an answer, so that all read as many."""
    import onnxruntime_genai as api

    changes = {
        "model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}, "eos_token_id": []},
        "search": {"max_length": context, "do_sample": False, "past_present_share_buffer": True},
    }
    config = api.Config(str(entrant.path))
    config.overlay(json.dumps(changes))
    return _Reader(api, api.Model(config), context)


def weight_bytes(entrant: Entrant) -> int:
    """The graph's weights; with an 8-bit head the table of embeddings is another and is only looked up."""
    return sum(path.stat().st_size for path in entrant.path.glob("*.onnx.data"))


class _Reader:
    def __init__(self, api: Any, model: Any, context: int) -> None:
        settings = api.GeneratorParams(model)
        settings.set_search_options(do_sample=False, max_length=context)
        self._generator = api.Generator(model, settings)

    def reset(self) -> None:
        self._generator.rewind_to(0)

    def logits(self, ids: Sequence[int]) -> Floats:
        self._generator.append_tokens(list(ids))
        found: Floats = self._generator.get_logits()[0, -1]
        return found

    def start(self, ids: Sequence[int]) -> int:
        self._generator.append_tokens(list(ids))
        return self.step()

    def step(self) -> int:
        if self._generator.is_done():
            raise ContenderError("onnxruntime-genai ended its answer early")
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])
