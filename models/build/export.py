"""Hands a trained device model to `build`: torch parameters under GGUF's names, in a folder of our own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.build.folder_source import FolderSource, write_folder_source
from models.build.pack import NORMS, PARTS
from models.build.power import DEVICE_ENERGY
from models.build.source import SkillHead
from models.build.student import Student
from models.build.torch_llama import site_shapes
from models.skills import SkillSet

Array = NDArray[np.float32]


def write_student(model: Student, skills: SkillSet, tokenizer: Tokenizer, folder: Path) -> FolderSource:
    """Write the model as a source that `build` takes; it answers skills only, and stops at no token."""
    norms = _array(model.exit_norms) if model.exits else None
    head = SkillHead(skills, _array(model.labels), _array(model.inputs), model.exits, norms, energy=DEVICE_ENERGY)
    return write_folder_source(
        folder,
        model_id="edgecascade-device",
        shape=model.shape,
        tensors=student_tensors(model),
        tokenizer=tokenizer,
        head=head,
    )


def student_tensors(model: Student) -> dict[str, Array]:
    """Every weight by its GGUF name; fused projections are cut into their parts."""
    tensors = {"token_embd.weight": _array(model.embedding), "output_norm.weight": _array(model.final_norm)}
    sites = site_shapes(model.shape)
    for index, layer in enumerate(model.layers):
        for site, (_, outs) in sites.items():
            parts = torch.split(getattr(layer, site), list(outs))
            names = [f"blk.{index}.{part}.weight" for part in PARTS[site]]
            tensors |= {name: _array(part) for name, part in zip(names, parts, strict=True)}
        tensors |= {f"blk.{index}.{origin}.weight": _array(getattr(layer, name)) for name, origin in NORMS.items()}
    return tensors


def _array(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.detach().float().cpu().numpy(), dtype=np.float32)
