"""Train one exit's head on states that the tier left between two layers; the base and its adapter are not touched.

The loss is that of the labels and, where the last layer is right, of what it says: a head learns from both. B rows, T
positions (the prompt's tokens, then the echo's word ends), C width, R what a state shrinks to, W words of a batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.build.batches import IGNORE
from models.build.exit_states import Kept
from models.build.progress import Report
from models.build.training import Schedule, Trainer
from models.runtime.exits import MATRICES, stored
from models.skills import SkillSet

_SCHEDULE = Schedule(epochs=6, learning_rate=2e-3, token_budget=0, warmup_steps=100, weight_decay=0.05)


@dataclass(frozen=True)
class ExitSettings:
    """What makes a head; a fixed seed makes it again."""

    seed: int = 17
    shrunk: int = 256
    pools: int = 2
    mixed: int = 256
    tag_mixed: int = 128
    rows: int = 64
    schedule: Schedule = _SCHEDULE
    smoothing: float = 0.05
    label_share: float = 0.5
    dropout: float = 0.15


class ExitNet(nn.Module):
    """What `models.runtime.exits.Scorer` computes, in torch."""

    def __init__(self, width: int, skills: SkillSet, settings: ExitSettings) -> None:
        super().__init__()
        s = settings
        self.queries = nn.Parameter(0.02 * torch.randn(len(skills.skills), s.pools, s.shrunk))
        self.down = nn.Linear(width, s.shrunk)
        self.mix, self.out = nn.Linear((1 + s.pools) * s.shrunk, s.mixed), nn.Linear(s.mixed, skills.n_rows)
        self.tag_mix, self.tag_out = nn.Linear(4 * s.shrunk, s.tag_mixed), nn.Linear(s.tag_mixed, skills.n_rows)
        self._dropout = nn.Dropout(s.dropout)

    def forward(self, batch: ExitBatch) -> tuple[Tensor, Tensor]:
        """Logits of all rows of the label head, at the intents (B, n_rows) and at the words (W, n_rows)."""
        small = _gelu(self.down(batch.states))
        scores = torch.einsum("bpr,btr->bpt", self.queries[batch.skill], small) * (4 / math.sqrt(small.shape[-1]))
        inside = torch.arange(small.shape[1]) <= batch.answer_at[:, None]
        weights = scores.masked_fill(~inside[:, None], -1e9).softmax(-1)
        pools = torch.einsum("bpt,btr->bpr", weights, small).flatten(1)
        answer = small[torch.arange(len(small)), batch.answer_at]
        mixed = _gelu(self.mix(self._dropout(torch.cat([answer, pools], -1))))
        return self.out(self._dropout(mixed)), self._tags(small, answer, batch)

    def _tags(self, small: Tensor, answer: Tensor, batch: ExitBatch) -> Tensor:
        row, at = batch.word_at.T
        start, stop = batch.answer_at[row] + 1, batch.stops[row]
        before = torch.where((at > start)[:, None], small[row, at - 1], 0.0)
        after = torch.where((at + 1 < stop)[:, None], small[row, (at + 1).clamp(max=small.shape[1] - 1)], 0.0)
        joined = torch.cat([small[row, at], before, after, answer[row]], -1)
        tags: Tensor = self.tag_out(_gelu(self.tag_mix(self._dropout(joined))))
        return tags

    def tensors(self) -> dict[str, Any]:
        """The weights as an artifact stores them: matrices in 8 bits, the rest in fp16."""
        found: dict[str, Any] = {"queries": self.queries.detach().numpy().astype(np.float16)}
        for name in MATRICES:
            linear = getattr(self, name)
            found |= stored(name, linear.weight.detach().numpy())
            found[f"{name}.bias"] = linear.bias.detach().numpy().astype(np.float16)
        return found


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class ExitBatch:
    """Padded rows: `states` (B, T, C); `stops` (B,) how long each is; `word_at` (W, 2) = (row, position).

    `taught_intent` (B, n_rows) and `taught_tags` (W, n_rows) are the last layer's logits.
    """

    states: Tensor
    answer_at: Tensor
    stops: Tensor
    skill: Tensor
    intent: Tensor
    word_at: Tensor
    tags: Tensor
    taught_intent: Tensor
    taught_tags: Tensor


def collate(kept: Sequence[Kept], labels: Tensor) -> ExitBatch:
    """Pad rows on the right."""
    lengths = [len(k.states) for k in kept]
    states = np.zeros((len(kept), max(lengths), kept[0].states.shape[1]), np.float32)
    for number, k in enumerate(kept):
        states[number, : lengths[number]] = k.states
    words = [(n, k.row.answer_at + 1 + w) for n, k in enumerate(kept) for w in range(len(k.row.tags))]
    column = {name: torch.tensor([getattr(k.row, name) for k in kept]) for name in ("answer_at", "skill", "intent")}
    last = [torch.from_numpy(k.final.astype(np.float32)) @ labels.T for k in kept]
    return ExitBatch(
        states=torch.from_numpy(states),
        stops=torch.tensor(lengths),
        word_at=torch.tensor(words, dtype=torch.long).reshape(-1, 2),
        tags=torch.tensor([tag for k in kept for tag in k.row.tags], dtype=torch.long),
        taught_intent=torch.stack([rows[0] for rows in last]),
        taught_tags=torch.cat([rows[1:] for rows in last]),
        **column,
    )


class ExitLoss:
    """Mean over intents plus mean over tags; a last layer that is wrong is not heard (Meng et al. 2019, 1904.12399)."""

    def __init__(self, skills: SkillSet, settings: ExitSettings) -> None:
        self._intents = [skills.intent_rows(name) for name in skills.names]
        self._tags = [skills.tag_rows(name) for name in skills.names]
        self._settings = settings

    def __call__(self, net: ExitNet, batch: ExitBatch) -> Tensor:
        """The loss of one batch."""
        intents, tags = net(batch)
        word_skill = batch.skill[batch.word_at[:, 0]]
        total = intents.new_zeros(())
        for number, (rows, tag_rows) in enumerate(zip(self._intents, self._tags, strict=True)):
            mine, words = batch.skill == number, word_skill == number
            if mine.any():
                found = self._one(intents[mine][:, rows], batch.intent[mine], batch.taught_intent[mine][:, rows])
                total = total + found.sum() / len(batch.skill)
            if words.any():
                found = self._one(tags[words][:, tag_rows], batch.tags[words], batch.taught_tags[words][:, tag_rows])
                total = total + found.sum() / len(word_skill)
        return total

    def _one(self, logits: Tensor, gold: Tensor, taught: Tensor) -> Tensor:
        share = self._settings.label_share
        told = F.cross_entropy(
            logits, gold, reduction="none", ignore_index=IGNORE, label_smoothing=self._settings.smoothing
        )
        shown = F.kl_div(F.log_softmax(logits, -1), F.softmax(taught, -1), reduction="none").sum(-1)
        return torch.where(taught.argmax(-1) == gold, share * told + (1 - share) * shown, told)


def train_exit(
    kept: Sequence[Kept], labels: Any, skills: SkillSet, settings: ExitSettings, checkpoint: Path, report: Report
) -> dict[str, Any]:
    """Train a head on the rows and return its weights; a stopped run goes on from its checkpoint."""
    torch.manual_seed(settings.seed)
    table = torch.from_numpy(np.asarray(labels, np.float32))
    net = ExitNet(kept[0].states.shape[1], skills, settings)
    per_epoch = -(-len(kept) // settings.rows)
    identity = {"settings": repr(settings), "rows": len(kept), "passed": kept[0].passed}
    trainer = Trainer(net, settings.schedule, per_epoch * settings.schedule.epochs, checkpoint, identity)
    trainer.resume()
    loss, groups = ExitLoss(skills, settings), _groups([len(k.states) for k in kept], settings)
    trainer.run(groups, lambda group: loss(net, collate([kept[i] for i in group], table)), report)
    return net.eval().tensors()


def _groups(lengths: Sequence[int], settings: ExitSettings) -> Iterator[Sequence[int]]:
    """Row numbers, batch by batch through all epochs; neighbours in length share a batch."""
    pool = 64 * settings.rows
    for epoch in range(settings.schedule.epochs):
        rng = random.Random(settings.seed * 1000 + epoch)
        order = list(range(len(lengths)))
        rng.shuffle(order)
        groups: list[list[int]] = []
        for start in range(0, len(order), pool):
            near = sorted(order[start : start + pool], key=lengths.__getitem__)
            groups += [near[i : i + settings.rows] for i in range(0, len(near), settings.rows)]
        rng.shuffle(groups)
        yield from groups
