"""optimum-onnx's ORTModelForCausalLM: the export that its users get, in fp32 and in its dynamic int8."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.peers import Entrant, Floats, Greedy, Model, Reader
from bench.peers.transformers import checkpoint
from bench.peers.transformers import prepare as prepare_checkpoint

FILES = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}


def entrants(model: Model) -> list[Entrant]:
    """fp32 and dynamic int8."""
    about = {"fp32": "its own export", "int8": "its export, dynamic int8 for AVX512-VNNI"}
    stem = model.home / f"optimum-{version('optimum-onnx')}"
    return [Entrant("optimum", name, Path(f"{stem}-{name}"), about[name]) for name in FILES]


def prepare(model: Model, entrant: Entrant) -> None:
    """Export, and quantise if asked to; a stopped run leaves nothing."""
    if entrant.path.is_dir():
        return
    from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    prepare_checkpoint(model, entrant)
    part = entrant.path.with_name(entrant.path.name + ".part")
    if entrant.setting == "fp32":
        ORTModelForCausalLM.from_pretrained(checkpoint(model), export=True).save_pretrained(part)
    else:
        exported = entrants(model)[0]
        prepare(model, exported)
        quantiser = ORTQuantizer.from_pretrained(exported.path, file_name=FILES["fp32"])
        how = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        quantiser.quantize(quantization_config=how, save_dir=part)
    part.rename(entrant.path)


def warm_up() -> None:
    """Import the model's class."""
    from optimum.onnxruntime import ORTModelForCausalLM  # noqa: F401


def load(entrant: Entrant, threads: int, _context: int) -> Reader:
    """Load the graph; its cache grows as it goes and needs no room set aside."""
    import onnxruntime as ort
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    torch.set_num_threads(threads)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    name = FILES[entrant.setting]
    return _Reader(ORTModelForCausalLM.from_pretrained(entrant.path, file_name=name, session_options=settings))


def weight_bytes(entrant: Entrant) -> int:
    """The graph's files, embeddings included: they are the head too."""
    return sum(path.stat().st_size for path in entrant.path.glob("*.onnx*"))


class _Reader(Greedy):
    def __init__(self, model: Any) -> None:
        self._model = model
        self._past: Any = None
        self._length = 0

    def reset(self) -> None:
        self._past, self._length = None, 0

    def logits(self, ids: Sequence[int]) -> Floats:
        import torch

        self._length += len(ids)
        mask = torch.ones((1, self._length), dtype=torch.int64)
        out = self._model(
            input_ids=torch.tensor([list(ids)]), attention_mask=mask, past_key_values=self._past, use_cache=True
        )
        self._past = out.past_key_values
        found: Floats = out.logits[0, -1].numpy()
        return found
