"""Distil the device tier: a few million parameters taught by the edge tier on labelled and made-up utterances.

The loss is cross-entropy with the labels plus, where the teacher is right, the Kullback-Leibler divergence from its
softened distribution (Hinton et al. 2015, arXiv 1503.02531), at the end and at each exit. The undistilled twin sees
the same utterances for the same steps with the labels only. A gentle course may follow on the weights of either: the
device that ships learnt from labels alone first, then from the teacher too.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from models.artifact.shape import LlamaShape
from models.build.augment import Crossing, Neighbours, SlotSwapper
from models.build.batches import IGNORE, Batch, Encoder, Row, add_noise, batches
from models.build.datasets import Example, foreign, skill_set
from models.build.progress import Report
from models.build.source import TensorSource
from models.build.student import STUDENT_SHAPE, Student, projected_embedding
from models.build.teach import Lesson, load_teacher, teach
from models.build.tokenizers import cut_vocabulary
from models.build.training import CHECKPOINT, LabelLoss, Schedule, Trainer, finished_weights
from models.skills import OUT_OF_SCOPE, SkillSet

_SCHEDULE = Schedule(epochs=6, learning_rate=2e-3, token_budget=1600, warmup_steps=200, weight_decay=0.05)


@dataclass(frozen=True)
class DistilSettings:
    """What makes a device tier; a fixed seed makes it again. `taught=False` trains the undistilled twin."""

    taught: bool = True
    seed: int = 11
    utterance_seed: int = 11
    vocab_size: int = 4096
    shape: LlamaShape = STUDENT_SHAPE
    exits: tuple[int, ...] = (2, 4)
    schedule: Schedule = _SCHEDULE
    temperature: float = 2.0
    label_share: float = 0.5
    exit_weight: float = 0.3
    smoothing: float = 0.1
    noise: float = 0.08
    dropout: float = 0.1
    copies: int = 2
    swap: float = 0.6
    neighbour: float = 0.15
    foreign_per_skill: int = 800
    oos_repeat: int = 2


GENTLE = DistilSettings(
    seed=12,
    schedule=replace(_SCHEDULE, epochs=2, learning_rate=6e-4, warmup_steps=50),
    temperature=1.0,
    smoothing=0.05,
    noise=0.05,
)
"""A second course on the same utterances, on weights that a first one made."""


def made_up(
    train: Sequence[Example], skills: SkillSet, neighbours: Neighbours, settings: DistilSettings
) -> list[Example]:
    """The utterances to learn from: the training set, out-of-scope ones, and `copies` made-up ones of each."""
    rng = random.Random(settings.utterance_seed)
    swapper, strangers = SlotSwapper(train), foreign(train, skills)
    rare = [e for e in train if e.skill == "assistant" and e.intent == OUT_OF_SCOPE]
    pool = [*train, *rare * (settings.oos_repeat - 1)]
    for name in skills.names:
        mine = [e for e in strangers if e.skill == name]
        pool.extend(rng.sample(mine, min(settings.foreign_per_skill, len(mine))))
    made, crossing = list(pool), Crossing(pool)
    for copy in range(settings.copies):
        for example in pool:
            if example.tags:
                new = swapper.swap(example, settings.swap, rng) if copy % 2 == 0 else None
            else:
                new = (
                    neighbours.replace(example, settings.neighbour, rng)
                    if copy % 2 == 0
                    else crossing.cross(example, rng)
                )
            if new is not None:
                made.append(new)
    return made


class TaughtLoss:
    """Distillation loss at every exit and the end; without lessons, labels alone."""

    def __init__(self, skills: SkillSet, lesson: Lesson | None, settings: DistilSettings) -> None:
        self._labels = LabelLoss(skills, settings.smoothing)
        self._lesson, self._settings = lesson, settings

    def __call__(self, outputs: list[Tensor], labels: Tensor, batch: Batch) -> Tensor:
        """Weighted sum over exits; the last output has weight one."""
        weights = [self._settings.exit_weight] * (len(outputs) - 1) + [1.0]
        losses = [w * self._one(hidden, labels, batch) for w, hidden in zip(weights, outputs, strict=True)]
        return torch.stack(losses).sum()

    def _one(self, hidden: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        if self._lesson is None:
            return self._labels(hidden, labels, batch)
        total, count = {"intent": hidden.new_zeros(()), "tag": hidden.new_zeros(())}, {"intent": 0, "tag": 0}
        s = self._settings
        for kind, logits, gold, rows in self._labels.split(hidden, labels, batch):
            taught = torch.from_numpy(self._targets(kind, batch, rows.tolist())).float()
            total[kind] = total[kind] + mixed_loss(logits, gold, taught, s).sum()
            count[kind] += len(logits)
        return total["intent"] / max(count["intent"], 1) + total["tag"] / max(count["tag"], 1)

    def _targets(self, kind: str, batch: Batch, rows: list[int]) -> Any:
        assert self._lesson is not None  # noqa: S101 - narrowed by the caller
        if kind == "intent":
            return np.stack([self._lesson.intents[int(batch.keys[i])] for i in rows])
        order = list(dict.fromkeys(rows))
        return np.concatenate([self._lesson.tags[int(batch.keys[i])] for i in order])


def mixed_loss(logits: Tensor, gold: Tensor, taught: Tensor, settings: DistilSettings) -> Tensor:
    """Loss (N,) from labels `gold` (N,) and teacher logits `taught` (N, rows); a teacher who is wrong is not heard.

    Conditional teaching (Meng et al. 2019, arXiv 1904.12399): where the teacher's pick is the label, its softened
    distribution takes the share `1 - label_share`; elsewhere the label alone counts.
    """
    t, share = settings.temperature, settings.label_share
    told = F.cross_entropy(logits, gold, reduction="none", ignore_index=IGNORE, label_smoothing=settings.smoothing)
    softened = F.kl_div(F.log_softmax(logits / t, -1), F.softmax(taught / t, -1), reduction="none").sum(-1) * t * t
    return torch.where(taught.argmax(-1) == gold, share * told + (1 - share) * softened, told)


@dataclass(frozen=True)
class Curriculum:
    """All rows of a run and the noise put on them."""

    rows: Sequence[Row]
    settings: DistilSettings
    vocab_size: int

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of epoch `number`; the same for the same seed."""
        seed = self.settings.seed * 1000 + number
        rng, noise = random.Random(seed), np.random.default_rng(seed)
        for batch in batches(self.rows, self.settings.schedule.token_budget, rng):
            yield add_noise(batch, self.settings.noise, self.vocab_size, noise)


@dataclass(frozen=True)
class Classroom:
    """What teacher and student share: skills, utterances, the teacher's tokenizer and the student's."""

    skills: SkillSet
    utterances: list[Example]
    tokenizer: Tokenizer
    taken_ids: list[int]
    teacher_tokenizer: Tokenizer


def classroom(source: TensorSource, train: Sequence[Example], settings: DistilSettings) -> Classroom:
    """Cut the tokenizer and make the utterances."""
    skills, teacher_tokenizer = skill_set(train), source.tokenizer()
    words = sorted({w.lower() for e in train for w in e.text.split()})
    counted = [f" {w.lower()}" for e in train for w in e.text.split()]
    cut, taken = cut_vocabulary(teacher_tokenizer, counted, settings.vocab_size)
    neighbours = Neighbours(words, teacher_tokenizer, source.tensor("token_embd.weight"))
    return Classroom(skills, made_up(train, skills, neighbours, settings), cut, taken, teacher_tokenizer)


def lesson_for(room: Classroom, source: TensorSource, adapter: Path, cache: Path, report: Report) -> Lesson:
    """The edge's outputs for all utterances, kept in `cache` so that a stopped run goes on."""
    if cache.exists():
        kept = torch.load(cache, weights_only=False)
        return Lesson(kept["intents"], kept["tags"])
    encoder = Encoder(room.teacher_tokenizer, room.skills, source.shape.vocab_size)
    rows = [encoder.row(e, key) for key, e in enumerate(room.utterances)]
    edge = load_teacher(source, room.skills, adapter)
    lesson = teach(edge, edge.labels, room.skills, rows, report)
    torch.save({"intents": lesson.intents, "tags": lesson.tags}, cache)
    return lesson


def beginner(source: TensorSource, room: Classroom, settings: DistilSettings) -> Student:
    """A device model that has learnt nothing yet."""
    torch.manual_seed(settings.seed)
    embedding = projected_embedding(source.tensor("token_embd.weight"), room.taken_ids, settings.shape.width)
    return Student(settings.shape, settings.exits, room.skills.n_inputs, room.skills.n_rows, embedding)


def distil(
    source: TensorSource,
    train: Sequence[Example],
    adapter: Path,
    out: Path,
    settings: DistilSettings,
    report: Report,
    start: Path | None = None,
) -> tuple[Student, Classroom]:
    """Train a device model (or its twin) and return it with its classroom; goes on from its checkpoint in `out`.

    `start` is the folder of a finished run whose weights it begins with.
    """
    out.mkdir(parents=True, exist_ok=True)
    room = classroom(source, train, settings)
    lesson = lesson_for(room, source, adapter, out / "lesson.pt", report) if settings.taught else None
    encoder = Encoder(room.tokenizer, room.skills, len(room.taken_ids))
    data = Curriculum([encoder.row(e, k) for k, e in enumerate(room.utterances)], settings, len(room.taken_ids))
    model = beginner(source, room, settings).train()
    if start:
        model.load_state_dict(finished_weights(start / CHECKPOINT))
        torch.manual_seed(settings.seed)
    epochs = settings.schedule.epochs
    total = sum(
        sum(1 for _ in batches(data.rows, settings.schedule.token_budget, random.Random(settings.seed * 1000 + e)))
        for e in range(epochs)
    )
    identity = {
        "source": source.digest(),
        "settings": json.dumps(asdict(settings), sort_keys=True),
        "examples": len(train),
    } | ({"start": hashlib.sha256((start / CHECKPOINT).read_bytes()).hexdigest()} if start else {})
    trainer = Trainer(model, settings.schedule, total, out / CHECKPOINT, identity)
    trainer.resume()
    loss = TaughtLoss(room.skills, lesson, settings)
    stream = (batch for e in range(epochs) for batch in data.epoch(e))
    trainer.run(stream, lambda b: loss(model(torch.from_numpy(b.ids), settings.dropout), model.labels, b), report)
    return model.eval(), room
