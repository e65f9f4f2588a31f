"""From a trained student to a folder that `build` reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.build.distil import Classroom
from models.build.folder_source import FolderSource, write_folder_source
from models.build.source import SkillHead
from models.build.student import Student
from models.build.torch_llama import site_shapes

_PARTS = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}
_NORMS = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}


def write_device(model: Student, room: Classroom, out: Path, model_id: str) -> FolderSource:
    """Write the student under GGUF's tensor names, with its label head and exits."""
    state = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    tensors: dict[str, NDArray[np.float32]] = {
        "token_embd.weight": state["embedding"],
        "output_norm.weight": state["final_norm"],
    }
    for index in range(model.shape.n_layers):
        for site, (_, widths) in site_shapes(model.shape).items():
            cuts = np.cumsum(widths)[:-1]
            parts = np.split(state[f"layers.{index}.{site}"], cuts)
            tensors.update({f"blk.{index}.{n}.weight": part for n, part in zip(_PARTS[site], parts, strict=True)})
        tensors.update({f"blk.{index}.{new}.weight": state[f"layers.{index}.{old}"] for old, new in _NORMS.items()})
    head = SkillHead(room.skills, state["labels"], state["inputs"], model.exits, state["exit_norms"])
    return write_folder_source(
        out, model_id=model_id, shape=model.shape, tensors=tensors, tokenizer=room.tokenizer, head=head
    )
