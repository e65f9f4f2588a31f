"""A micro-pair: an adapter and a distilled student, trained in seconds on utterances made by grammar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from models.artifact.shape import LlamaShape
from models.build import grammar
from models.build.folder_source import FolderSource, write_folder_source
from models.build.tokenizers import byte_level_bpe
from models.errors import DataError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SHAPE = LlamaShape(
    n_layers=2,
    width=32,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    vocab_size=0,
    context=128,
    rope_theta=1e4,
    norm_eps=1e-5,
)
TRAIN, HELD = grammar.make(600, seed=3), grammar.make(120, seed=4)


def quiet(_done: int, _total: int, _text: str) -> None:
    """Take no notice of progress."""


def word_tokenizer() -> Tokenizer:
    """Byte-level BPE whose merges build every word of the grammar."""
    tokens, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in sorted({w for e in TRAIN for w in e.text.split()}):
        piece = "Ġ"
        for letter in word:
            if (piece, letter) not in merges:
                merges.append((piece, letter))
                tokens.append(piece + letter)
            piece += letter
    return byte_level_bpe(tokens, merges, (), "gpt-2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """A random little Llama in the place of the edge model."""
    rng, tokenizer = np.random.default_rng(0), word_tokenizer()
    shape = LlamaShape(**{**vars(SHAPE), "vocab_size": tokenizer.get_vocab_size()})
    c, kv, m = shape.width, shape.n_kv_heads * shape.head_dim, shape.mlp_width
    sizes = {"attn_q": (c, c), "attn_k": (kv, c), "attn_v": (kv, c), "attn_output": (c, c)}
    sizes |= {"ffn_gate": (m, c), "ffn_up": (m, c), "ffn_down": (c, m)}
    tensors = {"token_embd.weight": rng.normal(size=(shape.vocab_size, c)), "output_norm.weight": np.ones(c)}
    for layer in range(shape.n_layers):
        tensors |= {f"blk.{layer}.{n}.weight": rng.normal(size=s) / np.sqrt(s[1]) for n, s in sizes.items()}
        tensors |= {f"blk.{layer}.{n}.weight": np.ones(c) for n in ("attn_norm", "ffn_norm")}
    return write_folder_source(
        tmp_path_factory.mktemp("source"),
        model_id="micro",
        shape=shape,
        tensors={k: v.astype(np.float32) for k, v in tensors.items()},
        tokenizer=tokenizer,
        head=None,
        lm_head=True,
    )


@pytest.fixture(scope="module")
def adapter(source: FolderSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained on the grammar."""
    from models.build.adapt import adapt

    out = tmp_path_factory.mktemp("adapter")
    adapt(source, TRAIN, out, adapt_settings(epochs=12), quiet)
    return out


def adapt_settings(epochs: int):
    from models.build.adapt import AdaptSettings
    from models.build.training import Schedule

    schedule = Schedule(epochs=epochs, learning_rate=1e-2, token_budget=600, warmup_steps=10)
    return AdaptSettings(rank=8, first_layer=0, schedule=schedule, noise=0.0, swap=0.2)


def accuracy(path: Path) -> float:
    """Share of held-out utterances whose whole frame is right, by the runtime itself."""
    import json

    from models.runtime.local import LocalTier
    from models.runtime.tier import Limits, SkillQuery

    tier, right = LocalTier.open(path, "device"), 0
    for example in HELD:
        text = "".join(t.text for t in tier.generate(SkillQuery(example.skill, example.text), Limits()))
        right += json.loads(text) == example.frame.as_dict()
    return right / len(HELD)


def test_an_adapter_teaches_a_frozen_model_its_skills(source: FolderSource, adapter: Path, tmp_path: Path) -> None:
    from models.build.assemble import build

    build(source, tmp_path / "edge", "fp32", adapter, quiet)
    assert accuracy(tmp_path / "edge") > 0.8


def student_settings(**changes: Any) -> Any:
    from models.build.distil import DistilSettings
    from models.build.training import Schedule

    shape = LlamaShape(**{**vars(SHAPE), "n_layers": 3})
    schedule = Schedule(epochs=8, learning_rate=5e-3, token_budget=600, warmup_steps=10)
    plain = DistilSettings(vocab_size=400, shape=shape, exits=(1, 2), schedule=schedule, noise=0.0, dropout=0.0)
    return replace(plain, **changes)


def test_a_student_learns_from_the_teacher_and_runs_quantised(
    source: FolderSource, adapter: Path, tmp_path: Path
) -> None:
    from models.build.assemble import build
    from models.build.distil import distil
    from models.build.export import write_student

    model, room = distil(source, TRAIN, adapter, tmp_path / "run", student_settings(), quiet)
    student = write_student(model, room.skills, room.tokenizer, tmp_path / "student")
    artifact = build(student, tmp_path / "device", "int8", None, quiet)
    assert artifact.manifest.exits == (1, 2)
    assert accuracy(tmp_path / "device") > 0.8


def test_a_second_course_goes_on_from_a_twin(source: FolderSource, adapter: Path, tmp_path: Path) -> None:
    from models.build.distil import distil
    from models.build.training import finished_weights

    short = replace(student_settings().schedule, epochs=1, learning_rate=1e-5)
    twin, _ = distil(source, TRAIN, adapter, tmp_path / "twin", student_settings(taught=False), quiet)
    second, _ = distil(
        source, TRAIN, adapter, tmp_path / "second", student_settings(schedule=short), quiet, tmp_path / "twin"
    )
    assert not torch.equal(twin.labels, second.labels)
    assert torch.allclose(twin.labels, second.labels, atol=1e-2), "it did not begin where the twin ended"
    with pytest.raises(DataError, match="finish that training first"):
        finished_weights(tmp_path / "nowhere" / "checkpoint.pt")


def test_a_stopped_run_goes_on_to_the_same_adapter(source: FolderSource, tmp_path: Path) -> None:
    from models.build.adapt import adapt

    class StoppedError(Exception):
        pass

    def stop(done: int, _total: int, _text: str) -> None:
        if done == 5:
            raise StoppedError

    settings = adapt_settings(epochs=1)
    adapt(source, TRAIN, tmp_path / "whole", settings, quiet)
    monkey = tmp_path / "stopped"
    from models.build.training import Trainer

    run = Trainer.run
    try:
        Trainer.run = lambda self, stream, loss, report: run(self, stream, loss, report, save_every_s=0.0)  # type: ignore[method-assign]
        with pytest.raises(StoppedError):
            adapt(source, TRAIN, monkey, settings, stop)
        adapt(source, TRAIN, monkey, settings, quiet)
    finally:
        Trainer.run = run  # type: ignore[method-assign]
    whole, stopped = ((tmp_path / n / "adapter.safetensors").read_bytes() for n in ("whole", "stopped"))
    assert whole == stopped


def test_a_checkpoint_of_other_settings_is_refused(source: FolderSource, adapter: Path) -> None:
    from models.build.adapt import adapt
    from models.errors import DataError

    with pytest.raises(DataError, match="other settings"):
        adapt(source, TRAIN, adapter, adapt_settings(epochs=13), quiet)


def test_exits_are_trained_calibrated_and_written_without_touching_the_rest(
    source: FolderSource, adapter: Path, tmp_path: Path
) -> None:
    from models.artifact.store import Artifact
    from models.build.assemble import build
    from models.build.exit_net import ExitSettings
    from models.build.exits import measure_exits, train_exits
    from models.build.training import Schedule

    schedule = Schedule(epochs=20, learning_rate=5e-3, token_budget=0, warmup_steps=10)
    settings = ExitSettings(schedule=schedule, rows=32, dropout=0.0)
    before = build(source, tmp_path / "edge", "fp32", adapter, quiet)
    heads, tensors, found = train_exits(before, TRAIN, HELD, tmp_path / "work", quiet, (1,), settings)
    artifact = before.with_exit_heads(heads, tensors)
    judged = found["room"]
    assert judged.right.mean() > 0.6, "a head after one of two layers has learnt something"
    assert judged.at(heads.thresholds["room"])[2] <= 2
    again, threshold = measure_exits(artifact, HELD, tmp_path / "work", quiet)["room"]
    assert threshold == heads.thresholds["room"]
    assert (again.right == judged.right).all()
    assert all(artifact.manifest.files[name] == entry for name, entry in before.manifest.files.items())
    assert Artifact.open(artifact.path).fault("exits.safetensors") is None
    resumed = train_exits(before, TRAIN, HELD, tmp_path / "work", quiet, (1,), settings)
    assert all((resumed[1][name] == value).all() for name, value in tensors.items()), "a finished run is found again"
