"""The training loop that `adapt` and `distil` share: losses over labels, cosine schedule, resumable checkpoints."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.build.batches import IGNORE, Batch
from models.build.datasets import Example
from models.build.progress import Report
from models.errors import DataError
from models.skills import OUT_OF_SCOPE, SkillSet


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: int
    learning_rate: float
    token_budget: int
    warmup_steps: int = 60
    weight_decay: float = 0.01
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Part:
    """What one skill's intents or tags have in a batch: `logits` (N, rows), `gold` (N,), batch `rows` (N,).

    `prior` (rows,) is how much commoner than the mean each label is in training, as a log; zeros for tags.
    """

    kind: str
    logits: Tensor
    prior: Tensor
    gold: Tensor
    rows: Tensor

    def told(self, smoothing: float) -> Tensor:
        """Cross-entropy (N,) with the labels as if each were equally common.

        The prior is added while training only, so the plain logits owe nothing to how often a label was seen
        (logit-adjusted loss, Menon et al. 2021, arXiv 2007.07314).
        """
        return F.cross_entropy(
            self.logits + self.prior, self.gold, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing
        )


class LabelLoss:
    """Cross-entropy of intents and tags, each over the skill's own rows, with label smoothing."""

    def __init__(
        self, skills: SkillSet, smoothing: float, train: Iterable[Example] = (), tag_weight: float = 1.0
    ) -> None:
        self._intents = [skills.intent_rows(name) for name in skills.names]
        self._tags = [skills.tag_rows(name) for name in skills.names]
        self._priors = log_priors(skills, train)
        self._smoothing, self._tag_weight = smoothing, tag_weight

    def split(self, hidden: Tensor, labels: Tensor, batch: Batch) -> Iterator[Part]:
        """Yield a `Part` for each skill present, intents then tags."""
        skill = torch.from_numpy(batch.skill)
        answer = hidden[torch.arange(len(skill)), torch.from_numpy(batch.answer_at)]
        tag_at, tags = torch.from_numpy(batch.tag_at), torch.from_numpy(batch.tags)
        for index, (intents, tag_rows) in enumerate(zip(self._intents, self._tags, strict=True)):
            rows = (skill == index).nonzero()[:, 0]
            if len(rows):
                gold = torch.from_numpy(batch.intent)[rows]
                yield Part("intent", answer[rows] @ labels[intents].T, self._priors[index], gold, rows)
            mine = (skill[tag_at[:, 0]] == index).nonzero()[:, 0]
            if len(mine):
                spots = tag_at[mine]
                logits = hidden[spots[:, 0], spots[:, 1]] @ labels[tag_rows].T
                yield Part("tag", logits, logits.new_zeros(()), tags[mine], spots[:, 0])

    def __call__(self, hidden: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Mean over intents plus weighted mean over tags."""
        total = {"intent": hidden.new_zeros(()), "tag": hidden.new_zeros(())}
        count = {"intent": 0, "tag": 0}
        for part in self.split(hidden, labels, batch):
            total[part.kind] = total[part.kind] + part.told(self._smoothing).sum()
            count[part.kind] += len(part.gold)
        intent = total["intent"] / max(count["intent"], 1)
        return intent + self._tag_weight * total["tag"] / max(count["tag"], 1)


def log_priors(skills: SkillSet, train: Iterable[Example]) -> list[Tensor]:
    """Log of how often each intent (n_intents,) of each skill is trained on, against the skill's mean.

    `out_of_scope` stays at zero, as do intents that were not counted: how common they are is made, not observed.
    """
    counts = Counter((example.skill, example.intent) for example in train)
    priors = []
    for skill in skills.skills:
        seen = [counts[skill.name, i] for i in skill.intents if i != OUT_OF_SCOPE and counts[skill.name, i]]
        mean = sum(seen) / max(len(seen), 1)
        shares = [1.0 if i == OUT_OF_SCOPE else (counts[skill.name, i] or mean) / (mean or 1) for i in skill.intents]
        priors.append(torch.tensor([math.log(share or 1.0) for share in shares]))
    return priors


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
        self, stream: Iterable[Batch], loss_of: Callable[[Batch], Tensor], report: Report, save_every_s: float = 180.0
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
