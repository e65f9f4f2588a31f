"""Train the edge adapter: LoRA on a frozen Llama, with a label head for skills.

Result: `adapter.safetensors` (fp16) and `adapter.json` (skills, source digest, settings, how it was made).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from models.build.adapter import CARD, TENSORS
from models.build.augment import SlotSwapper
from models.build.batches import Batch, Encoder, add_noise, batches
from models.build.datasets import Example, foreign, skill_set
from models.build.power import EDGE_ENERGY
from models.build.progress import Report
from models.build.source import TensorSource
from models.build.torch_llama import LabelDecoder, Layer
from models.build.training import CHECKPOINT, LabelLoss, Schedule, Trainer
from models.errors import DataError
from models.skills import OUT_OF_SCOPE, SkillSet

_FIRST_SCHEDULE = Schedule(epochs=3, learning_rate=8e-4, token_budget=900)


@dataclass(frozen=True)
class AdaptSettings:
    """What makes an adapter; a fixed seed makes it again."""

    rank: int = 16
    first_layer: int = 4
    seed: int = 7
    schedule: Schedule = _FIRST_SCHEDULE
    noise: float = 0.08
    swap: float = 0.25
    smoothing: float = 0.1
    foreign_per_skill: int = 400
    oos_repeat: int = 4
    shares: tuple[tuple[str, float], ...] = ()
    """How often an epoch sees a skill's examples, where it is not once: 0.5 is every other one, 2 is all twice."""
    keep: float = 0.0
    """Weight of the adapter that a second course started from, averaged with what came out."""


COURSES = (
    AdaptSettings(),
    AdaptSettings(
        seed=8,
        schedule=Schedule(epochs=2, learning_rate=4e-4, token_budget=700, warmup_steps=40),
        noise=0.05,
        smoothing=0.05,
        shares=(("assistant", 0.5), ("home", 0.7)),
        keep=0.25,
    ),
    AdaptSettings(
        seed=9,
        schedule=Schedule(epochs=3, learning_rate=5e-4, token_budget=700, warmup_steps=60),
        smoothing=0.05,
        oos_repeat=2,
        shares=(("assistant", 0.8), ("home", 0.5), ("banking", 2.0)),
        keep=0.25,
    ),
)
"""The courses behind the adapter that ships, each on top of the one before and averaged with it: a first one, a
gentler one with less of the skills that learn fast, and one with our own out-of-scope queries and more `banking`."""


def adapt(
    source: TensorSource,
    train: Sequence[Example],
    out: Path,
    settings: AdaptSettings,
    report: Report,
    start: Path | None = None,
) -> None:
    """Train an adapter and write it to `out`; a stopped run goes on from its checkpoint in `out`.

    `start` is an adapter folder to begin with instead of fresh weights: a second, gentler course.
    """
    torch.manual_seed(settings.seed)
    skills = skill_set(train)
    tokenizer = source.tokenizer()
    model = edge_model(source, skills, settings)
    init_labels(model, skills, tokenizer)
    if start:
        load_adapter(model, start)
    data = TrainingMix(train, skills, tokenizer, source.shape.vocab_size, settings)
    identity = {
        "source": source.digest(),
        "settings": json.dumps(asdict(settings), sort_keys=True),
        "examples": len(train),
        "start": hashlib.sha256((start / TENSORS).read_bytes()).hexdigest() if start else None,
    }
    total = sum(sum(1 for _ in data.epoch(e)) for e in range(settings.schedule.epochs))
    trainer = Trainer(model, settings.schedule, total, out / CHECKPOINT, identity)
    trainer.resume()
    loss = LabelLoss(skills, settings.smoothing)
    stream = (batch for e in range(settings.schedule.epochs) for batch in data.epoch(e))
    trainer.run(stream, lambda batch: loss(model(torch.from_numpy(batch.ids)), model.labels, batch), report)
    if start:
        average(model, start, settings.keep)
    write_adapter(model, skills, out, {**identity, "steps": total})


class TrainingMix:
    """The batches of each epoch: all examples, out-of-scope ones repeated, foreign ones sampled anew; noise added."""

    def __init__(
        self, train: Sequence[Example], skills: SkillSet, tokenizer: Tokenizer, vocab_size: int, settings: AdaptSettings
    ) -> None:
        self._train, self._settings, self._skills, self._vocab_size = train, settings, skills, vocab_size
        self._encoder = Encoder(tokenizer, skills, vocab_size)
        self._swapper = SlotSwapper(train)
        self._foreign = foreign(train, skills)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of epoch `number`; the same for the same seed."""
        s = self._settings
        rng, noise = random.Random(s.seed * 1000 + number), np.random.default_rng(s.seed * 1000 + number)
        rare = [e for e in self._train if e.skill == "assistant" and e.intent == OUT_OF_SCOPE]
        extra: list[Example] = []
        for name in self._skills.names:
            pool = [e for e in self._foreign if e.skill == name]
            extra.extend(rng.sample(pool, min(s.foreign_per_skill, len(pool))))
        shares = dict(s.shares)
        seen = [e for e in self._train for _ in range(_times(shares.get(e.skill, 1.0), rng))]
        mix = [*seen, *rare * (s.oos_repeat - 1), *extra]
        rows = [self._encoder.row(self._swapper.swap(e, s.swap, rng)) for e in mix]
        for batch in batches(rows, s.schedule.token_budget, rng):
            yield add_noise(batch, s.noise, self._vocab_size, noise)


def _times(share: float, rng: random.Random) -> int:
    """A whole number whose mean is `share`."""
    return int(share) + (rng.random() < share % 1)


def edge_model(
    source: TensorSource, skills: SkillSet, settings: AdaptSettings, dtype: torch.dtype = torch.bfloat16
) -> LabelDecoder:
    """The source's weights, frozen in `dtype`, with fresh LoRA from `first_layer` up."""

    def get(name: str) -> Tensor:
        return torch.from_numpy(source.tensor(name)).to(dtype)

    def fused(layer: int, *parts: str) -> Tensor:
        return torch.cat([get(f"blk.{layer}.{part}.weight") for part in parts])

    layers = []
    for index in range(source.shape.n_layers):
        weights = {
            "qkv": fused(index, "attn_q", "attn_k", "attn_v"),
            "out": fused(index, "attn_output"),
            "gate_up": fused(index, "ffn_gate", "ffn_up"),
            "down": fused(index, "ffn_down"),
            "attn_norm": fused(index, "attn_norm"),
            "mlp_norm": fused(index, "ffn_norm"),
        }
        rank = settings.rank if index >= settings.first_layer else 0
        layers.append(Layer(source.shape, weights, rank, frozen=True))
    return LabelDecoder(
        source.shape, get("token_embd.weight"), get("output_norm.weight"), layers, skills.n_inputs, skills.n_rows
    )


def init_labels(model: LabelDecoder, skills: SkillSet, tokenizer: Tokenizer) -> None:
    """Start each label and input at the mean embedding of its name's tokens; a little noise tells twins apart."""
    table = model.frozen_embedding.float()

    def mean(text: str) -> Tensor:
        return table[tokenizer.encode(" " + text).ids].mean(0)

    with torch.no_grad():
        for row, name in enumerate(skills.row_names()):
            words = _readable(name.split("/", 1)[1])
            model.labels[row] = mean(words) + 0.02 * torch.randn(model.shape.width)
        for row, text in enumerate([*skills.names, "answer"]):
            model.inputs[row] = mean(text)


def load_adapter(model: LabelDecoder, folder: Path) -> None:
    """Copy a written adapter into a model of the same layout; raises `DataError` if it has another one."""
    tensors = load_file(folder / TENSORS)
    wanted = adapter_tensors(model)
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in wanted.items()}:
        raise DataError(f"the adapter in {folder} has other ranks, layers or skills than the run's settings ask for")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def average(model: LabelDecoder, folder: Path, keep: float) -> None:
    """Move the parameters the share `keep` back towards a written adapter (Wortsman et al. 2022, arXiv 2109.01903)."""
    kept = load_file(folder / TENSORS)
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            parameter.lerp_(kept[name].to(parameter.dtype), keep)


def adapter_tensors(model: LabelDecoder) -> dict[str, Tensor]:
    """The trained parameters by the names they have on disk: `layers.N.SITE.a`, `.b0`…, `labels`, `inputs`."""
    tensors: dict[str, Tensor] = {"labels": model.labels, "inputs": model.inputs}
    for index, layer in enumerate(model.layers):
        for site, lora in layer.lora.items():
            tensors[f"layers.{index}.{site}.a"] = lora.a
            tensors.update({f"layers.{index}.{site}.b{j}": b for j, b in enumerate(lora.b)})
    return tensors


def _readable(label: str) -> str:
    """`SearchCreativeWork` → `search creative work`; `B-object_name` → `b object name`."""
    spaced = "".join(f" {c}" if c.isupper() else c for c in label)
    return " ".join(spaced.replace("_", " ").replace("-", " ").replace("?", "").lower().split())


def write_adapter(model: LabelDecoder, skills: SkillSet, out: Path, made: dict[str, Any]) -> None:
    """Write the trained tensors as fp16, and the card."""
    out.mkdir(parents=True, exist_ok=True)
    halves = {k: v.detach().to(torch.float16).contiguous() for k, v in adapter_tensors(model).items()}
    save_file(halves, out / TENSORS)
    card = {"skills": skills.as_dict(), "energy": EDGE_ENERGY, **made}
    (out / CARD).write_text(json.dumps(card, indent=1) + "\n", "utf-8")
