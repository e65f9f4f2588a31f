"""What the teacher says about utterances: its distribution over intents and, word by word, over tags."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from models.build.adapt import AdaptSettings, edge_model
from models.build.batches import Batch, Row, batches
from models.build.progress import Report
from models.build.source import TensorSource
from models.build.torch_llama import LabelDecoder
from models.skills import SkillSet

Logits = dict[int, NDArray[np.float16]]


@dataclass(frozen=True)
class Lesson:
    """Teacher logits for rows by key: `intents[key]` (n_intents,), `tags[key]` (n_words, n_tags) or empty, fp16."""

    intents: Logits
    tags: Logits


def load_teacher(source: TensorSource, skills: SkillSet, adapter: Path) -> LabelDecoder:
    """The adapted edge model with its LoRA merged, ready for inference in bf16."""
    made = json.loads(json.loads((adapter / "adapter.json").read_text("utf-8"))["settings"])
    model = edge_model(source, skills, AdaptSettings(rank=made["rank"], first_layer=made["first_layer"]))
    tensors = load_file(adapter / "adapter.safetensors")
    with torch.no_grad():
        model.labels.copy_(tensors["labels"])
        model.inputs.copy_(tensors["inputs"])
        for index, layer in enumerate(model.layers):
            for site in list(layer.lora):
                prefix = f"layers.{index}.{site}"
                parts = [tensors[f"{prefix}.b{j}"].float() for j in range(len(layer.lora[site].b))]
                a = tensors[f"{prefix}.a"].float().chunk(len(parts))
                delta = torch.cat([b @ a_part for b, a_part in zip(parts, a, strict=True)])
                base = getattr(layer, site)
                base.copy_((base.float() + delta).to(base.dtype))
                del layer.lora[site]
    return model.eval()


@torch.no_grad()
def teach(
    states: Callable[[Tensor], Tensor],
    labels: Tensor,
    skills: SkillSet,
    rows: Sequence[Row],
    report: Report,
    token_budget: int = 1800,
) -> Lesson:
    """Run a teacher, ids (B, T) → `states` (B, T, C), over rows; each row's `key` must be unique."""
    lesson = Lesson({}, {})
    done = 0
    for batch in batches(rows, token_budget):
        _collect(lesson, states(torch.from_numpy(batch.ids)), labels, skills, batch)
        done += len(batch.keys)
        report(done, len(rows), "teacher")
    return lesson


def _collect(lesson: Lesson, hidden: Tensor, labels: Tensor, skills: SkillSet, batch: Batch) -> None:
    answers = hidden[torch.arange(len(batch.keys)), torch.from_numpy(batch.answer_at)]
    logits = F.linear(answers, labels).to(torch.float16).numpy()
    at = torch.from_numpy(batch.tag_at)
    tag_logits = F.linear(hidden[at[:, 0], at[:, 1]], labels).to(torch.float16).numpy()
    for i, key in enumerate(batch.keys):
        name = skills.names[batch.skill[i]]
        lesson.intents[int(key)] = logits[i, skills.intent_rows(name)]
        mine = batch.tag_at[:, 0] == i
        lesson.tags[int(key)] = tag_logits[mine][:, skills.tag_rows(name)] if mine.any() else tag_logits[:0]
