"""The training loop that `adapt` and `distil` share: losses over labels, cosine schedule, resumable checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.build.batches import IGNORE, Batch
from models.build.progress import Report
from models.errors import DataError
from models.skills import SkillSet

Part = TypeVar("Part")
"""What one step learns from."""
CHECKPOINT = "checkpoint.pt"
"""A run's file in its folder."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: int
    learning_rate: float
    token_budget: int
    warmup_steps: int = 60
    weight_decay: float = 0.01
    clip_norm: float = 1.0


class LabelLoss:
    """Cross-entropy of intents and tags, each over the skill's own rows, with label smoothing."""

    def __init__(self, skills: SkillSet, smoothing: float, tag_weight: float = 1.0) -> None:
        self._intents = [skills.intent_rows(name) for name in skills.names]
        self._tags = [skills.tag_rows(name) for name in skills.names]
        self._smoothing, self._tag_weight = smoothing, tag_weight

    def split(self, hidden: Tensor, labels: Tensor, batch: Batch) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield `(kind, logits (N, rows), targets (N,), batch rows (N,))` for each skill present, intents then tags."""
        skill = torch.from_numpy(batch.skill)
        answer = hidden[torch.arange(len(skill)), torch.from_numpy(batch.answer_at)]
        tag_at, tags = torch.from_numpy(batch.tag_at), torch.from_numpy(batch.tags)
        for index, (intents, tag_rows) in enumerate(zip(self._intents, self._tags, strict=True)):
            rows = (skill == index).nonzero()[:, 0]
            if len(rows):
                yield "intent", answer[rows] @ labels[intents].T, torch.from_numpy(batch.intent)[rows], rows
            mine = (skill[tag_at[:, 0]] == index).nonzero()[:, 0]
            if len(mine):
                spots = tag_at[mine]
                logits = hidden[spots[:, 0], spots[:, 1]] @ labels[tag_rows].T
                yield "tag", logits, tags[mine], spots[:, 0]

    def __call__(self, hidden: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Mean over intents plus weighted mean over tags."""
        total = {"intent": hidden.new_zeros(()), "tag": hidden.new_zeros(())}
        count = {"intent": 0, "tag": 0}
        for kind, logits, targets, _ in self.split(hidden, labels, batch):
            loss = F.cross_entropy(
                logits, targets, reduction="sum", ignore_index=IGNORE, label_smoothing=self._smoothing
            )
            total[kind] = total[kind] + loss
            count[kind] += len(targets)
        intent = total["intent"] / max(count["intent"], 1)
        return intent + self._tag_weight * total["tag"] / max(count["tag"], 1)


def finished_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of a run that has ended; raises `DataError` if there is no checkpoint."""
    if not checkpoint.is_file():
        raise DataError(f"{checkpoint} is missing; finish that training first")
    weights: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["model"]
    return weights


class Trainer:
    """Runs optimiser steps over a stream of batches; checkpoints let a stopped run go on where it was."""

    def __init__(
        self, model: nn.Module, schedule: Schedule, total_steps: int, checkpoint: Path, identity: dict[str, Any]
    ) -> None:
        self._model, self._schedule, self._total = model, schedule, total_steps
        self._checkpoint, self._identity = checkpoint, identity
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(
            trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, betas=(0.9, 0.98), fused=True
        )
        self._trained, self.step = trained, 0

    def resume(self) -> int:
        """Load the checkpoint, if any, and return the step to go on from; `DataError` if it is another run's."""
        if self._checkpoint.exists():
            state = torch.load(self._checkpoint, weights_only=True)
            if state["identity"] != self._identity:
                raise DataError(f"{self._checkpoint} belongs to a run with other settings; remove it to start afresh")
            self._model.load_state_dict(state["model"])
            self._optimiser.load_state_dict(state["optimiser"])
            self.step = int(state["step"])
        return self.step

    def save(self) -> None:
        """Write the checkpoint; a stop in the middle leaves the one before."""
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self._checkpoint.with_suffix(".part")
        state = {
            "identity": self._identity,
            "step": self.step,
            "model": self._model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }
        torch.save(state, part)
        part.replace(self._checkpoint)

    def run(
        self, stream: Iterable[Part], loss_of: Callable[[Part], Tensor], report: Report, save_every_s: float = 180.0
    ) -> None:
        """Train on the stream; batches up to the resumed step are passed over."""
        saved_at, smooth, done = time.monotonic(), 0.0, self.step
        for number, batch in enumerate(stream):
            if number < done:
                continue
            self._set_rate()
            loss = loss_of(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self._trained, self._schedule.clip_norm)
            self._optimiser.step()
            self._optimiser.zero_grad(set_to_none=True)
            self.step += 1
            smooth = loss.item() if number == done else 0.98 * smooth + 0.02 * loss.item()
            report(self.step, self._total, f"loss {smooth:.3f}")
            if time.monotonic() - saved_at > save_every_s:
                self.save()
                saved_at = time.monotonic()
        self.save()

    def _set_rate(self) -> None:
        warm = min(1.0, (self.step + 1) / self._schedule.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / max(self._total, 1))))
        for group in self._optimiser.param_groups:
            group["lr"] = self._schedule.learning_rate * warm * max(cosine, 0.02)
