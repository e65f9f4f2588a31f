"""Families without torch: the build's own check, folders that are not whole, layers that are dropped, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.artifact.shape import LlamaShape
from models.build.assemble import build
from models.build.families import FAMILIES, family_of
from models.build.fetch import open_folder, open_source
from models.build.gguf_source import GgufSource
from models.build.hub_fetch import fetch_model
from models.build.hub_source import HubSource
from models.build.losses import LOGIT_TOLERANCE
from models.build.recipes import build_tier
from models.errors import ModelError, SourceError
from models.runtime.local import LocalTier
from models.runtime.tier import Completion, Limits
from tests.tiny_models import SHAPE, VOCABULARY, quiet, random_tensors, write_adapter, write_gguf

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 32},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20,
        "rope_theta": 1e5,
        "rope_local_base_freq": 1e4,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
}


def shapes(model_type: str, shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a family by its GGUF name."""
    kv, found = shape.n_kv_heads * shape.head_dim, {}
    for n in range(shape.n_layers):
        at = f"blk.{n}"
        found |= {
            f"{at}.attn_q.weight": (shape.query_width, shape.width),
            f"{at}.attn_k.weight": (kv, shape.width),
            f"{at}.attn_v.weight": (kv, shape.width),
            f"{at}.attn_output.weight": (shape.width, shape.query_width),
            f"{at}.attn_norm.weight": (shape.width,),
            f"{at}.ffn_norm.weight": (shape.width,),
        }
        experts = [f".{e}" for e in range(shape.n_experts)] or [""]
        for expert in experts:
            found |= {f"{at}.ffn_{part}{expert}.weight": (shape.mlp_width, shape.width) for part in ("gate", "up")}
            found[f"{at}.ffn_down{expert}.weight"] = (shape.width, shape.mlp_width)
        if shape.n_experts:
            found[f"{at}.ffn_gate_inp.weight"] = (shape.n_experts, shape.width)
        if model_type == "qwen2":
            found |= {f"{at}.attn_{p}.bias": found[f"{at}.attn_{p}.weight"][:1] for p in "qkv"}
        for extra in ("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"):
            if extra in FAMILIES[model_type].layer:
                found[f"{at}.{extra}.weight"] = (shape.head_dim if "attn_" in extra[:5] else shape.width,)
    return found | {"token_embd.weight": (shape.vocab_size, shape.width), "output_norm.weight": (shape.width,)}


def write_folder(folder: Path, model_type: str = "llama", seed: int | None = None, **changes: Any) -> Path:
    """Write a random model of a family in Hugging Face's layout, and return its folder."""
    rng = np.random.default_rng(seed)
    config = {**CONFIG, "model_type": model_type, "tie_word_embeddings": True, **MODELS[model_type], **changes}
    family = family_of(config)
    shape = family.shape(config)
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, dims in shapes(model_type, shape).items():
        scale = 1.5 / dims[-1] ** 0.5 if len(dims) > 1 else 0.2
        values = scale * rng.normal(size=dims) + (1 - family.norm_offset if "norm" in name else 0)
        at = family.stored(name, shape)
        parts.setdefault(at.name, []).append((at.first, values.astype(np.float32)))
    tensors = {name: np.concatenate([v for _, v in sorted(p, key=lambda pair: pair[0])]) for name, p in parts.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = GgufSource(write_gguf(folder.with_suffix(".gguf"))).tokenizer()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    return folder


def greedy(path: Path) -> list[int]:
    tier = LocalTier.open(path, "edge", threads=1)
    return [token.id for token in tier.generate(Completion(" the"), Limits(max_tokens=12))]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("quant", ["fp32", "int4"])
def test_every_family_passes_the_build_s_own_check(tmp_path: Path, model_type: str, quant: str) -> None:
    m = build(HubSource(write_folder(tmp_path / "model", model_type)), tmp_path / "out", quant, None, quiet).manifest
    assert 0 < m.made["checked"]["largest_logit_difference"] < 1e-3 < LOGIT_TOLERANCE
    assert m.architecture == HubSource(tmp_path / "model").shape, "every number comes back out of the manifest"
    assert len(greedy(tmp_path / "out")) > 0


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "model")
    monkeypatch.setattr(
        "models.build.layerwise.rotary_tables",
        lambda shape, n: dict.fromkeys(("cos", "sin"), np.ones((n, 8), np.float32)),
    )
    with pytest.raises(SourceError, match="does not compute what"):
        build(HubSource(folder), tmp_path / "out", "int8", None, quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_a_gguf_gives_the_same_artifact_as_the_folder(tmp_path: Path, model_type: str) -> None:
    """The same weights under GGUF's names, and for Llama with q and k interleaved and the stretched frequencies."""
    changes: dict[str, Any] = {"use_sliding_window": False, "head_dim": 16}
    folder = HubSource(write_folder(tmp_path / "model", model_type, **changes))
    s = folder.shape
    tensors = {name: folder.tensor(name) for name in shapes(model_type, s)}
    if model_type == "llama":
        tensors["rope_freqs.weight"] = np.asarray(s.rope_divisors, np.float32)
        for name, values in tensors.items():
            if ".attn_q." in name or ".attn_k." in name:
                halves = values.reshape(-1, 2, s.head_dim // 2, s.width)
                tensors[name] = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    path = write_gguf(tmp_path / "same.gguf", architecture=model_type, shape=s, tensors=tensors, splitter="qwen2")
    ours = build(GgufSource(path), tmp_path / "a", "fp32", None, quiet).manifest
    theirs = build(folder, tmp_path / "b", "fp32", None, quiet).manifest
    weights = [name for name in ours.files if name.endswith("safetensors")]
    assert {n: ours.files[n] for n in weights} == {n: theirs.files[n] for n in weights}
    assert ours.architecture.rope_divisors == pytest.approx(theirs.architecture.rope_divisors)
    assert greedy(tmp_path / "a") == greedy(tmp_path / "b")


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    whole = HubSource(write_folder(tmp_path / "model", seed=3))
    folder = write_folder(tmp_path / "shards", seed=3)
    names = list(HubSource(folder)._tensors)
    tensors = {name: np.array(HubSource(folder)._tensors[name]()) for name in names}
    (folder / "model.safetensors").unlink()
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    save_file({"stray": np.zeros(1)}, folder / "consolidated.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), "utf-8")
    assert "stray" not in HubSource(folder)._tensors
    for name in ("blk.1.attn_q.weight", "token_embd.weight"):
        assert np.array_equal(HubSource(folder).tensor(name), whole.tensor(name))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def unknown_family(folder: Path) -> None:
    change(folder, model_type="mamba")


def other_activation(folder: Path) -> None:
    change(folder, hidden_act="relu")


def other_rope(folder: Path) -> None:
    change(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0})


def no_heads(folder: Path) -> None:
    change(folder, num_attention_heads=-4, head_dim=16)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lost_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def shard_elsewhere(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


BROKEN = [
    no_config, no_tokenizer, unknown_family, other_activation, other_rope, no_heads, truncated, empty, no_weights,
    lost_shard, shard_elsewhere,
]  # fmt: skip


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_folder_ends_in_one_sentence_and_leaves_nothing(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = write_folder(tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError) as caught:
        build_tier(str(folder), tmp_path / "cache", tmp_path / "deep" / "out", "int4", None, "own", 0, quiet)
    assert len(str(caught.value)) > 20
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "model.gguf"}


def test_a_truncated_gguf_leaves_nothing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(SourceError, match="damaged or truncated"):
        build_tier(str(path), tmp_path / "cache", tmp_path / "out", "int4", None, "own", 0, quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("via", "prune", "word"),
    [("onnx", 0, "--via onnx is unknown"), ("optimum", 2, "own graph only"), ("own", 3, "one must stay")],
)
def test_what_cannot_be_asked_for_is_one_sentence(tmp_path: Path, via: str, prune: int, word: str) -> None:
    folder = write_folder(tmp_path / "model")
    with pytest.raises(SourceError, match=word):
        build_tier(str(folder), tmp_path / "cache", tmp_path / "out", "int4", None, via, prune, quiet)


def test_optimum_reads_hugging_face_s_folders_only(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        open_folder(str(write_gguf(tmp_path / "model.gguf")), tmp_path, quiet)


def test_a_model_of_the_hub_is_fetched_once(tmp_path: Path) -> None:
    asked = []

    def download(model_id: str, folder: Path) -> None:
        asked.append(model_id)
        write_folder(folder)

    first = fetch_model("hub:some/model", tmp_path, quiet, download)
    assert fetch_model("hub:some/model", tmp_path, quiet, download) == first
    assert asked == ["some/model"]
    assert HubSource(first).model_id == "model"


@pytest.mark.parametrize("error", [ConnectionError("no route"), TimeoutError(), KeyboardInterrupt()])
def test_a_download_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def download(_model_id: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}", "utf-8")
        raise error

    with pytest.raises((SourceError, KeyboardInterrupt)) as caught:
        fetch_model("hub:some/model", tmp_path, quiet, download)
    if isinstance(caught.value, SourceError):
        assert "cannot be reached" in str(caught.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("name", ["hub:model", "hub:../model", "hub:a/b/c", "hub:"])
def test_what_is_no_name_of_the_hub_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="hub:owner/name"):
        open_source(name, tmp_path, quiet)


@pytest.mark.parametrize("idle", [0, 1, 2])
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_pruning_finds_the_layer_that_does_nothing(
    tmp_path: Path, idle: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer whose results are zero is dropped, in fp32 without any loss."""
    changed = random_tensors()
    for name in ("attn_output", "ffn_down"):
        changed[f"blk.{idle}.{name}.weight"][:] = 0
    if kind == "gguf":
        monkeypatch.setattr("tests.tiny_models.random_tensors", lambda seed, shape: changed)
        source: Any = GgufSource(write_gguf(tmp_path / "model.gguf"))
    else:
        folder = write_folder(tmp_path / "model", rms_norm_eps=SHAPE.norm_eps)
        tensors = {n: np.array(HubSource(folder)._tensors[n]()) for n in HubSource(folder)._tensors}
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{idle}.{name}.weight"][:] = 0
        save_file(tensors, folder / "model.safetensors")
        source = HubSource(folder)
    build(source, tmp_path / "whole", "fp32", None, quiet)
    m = build(source, tmp_path / "out", "fp32", None, quiet, prune=1).manifest
    assert m.architecture.n_layers == SHAPE.n_layers - 1
    assert m.made["pruned"]["layers"] == [idle]
    assert m.made["pruned"]["angular_distance"] < 1e-3 < m.made["pruned"]["largest_angular_distance"]
    assert m.losses["pruning_mean_kl"] < 1e-6
    assert greedy(tmp_path / "out") == greedy(tmp_path / "whole")


def test_pruning_says_what_it_cost(tmp_path: Path) -> None:
    source = HubSource(write_folder(tmp_path / "model", "mistral", seed=1))
    m = build(source, tmp_path / "out", "int8", None, quiet, prune=2).manifest
    assert m.losses["pruning_mean_kl"] > 0.1 > m.losses["token_mean_kl"]
    assert m.architecture.local_layers == (0,), "the layer that is left keeps its window"
    assert build(source, tmp_path / "out", "int8", None, quiet, prune=2).manifest == m
    assert build(source, tmp_path / "out", "int8", None, quiet).manifest.architecture.n_layers == 3


def test_a_model_with_skills_is_not_pruned(tmp_path: Path) -> None:
    source = GgufSource(write_gguf(tmp_path / "model.gguf"))
    adapter = write_adapter(tmp_path / "adapter", source)
    with pytest.raises(SourceError, match="--prune is for models that write text"):
        build(source, tmp_path / "out", "int8", adapter, quiet, prune=1)


MEASURE = """
import re, sys
from pathlib import Path
from models.build.assemble import build
from models.build.hub_source import HubSource
from tests.test_families import write_folder
from tests.tiny_models import quiet
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
root = Path(sys.argv[1])
build(HubSource(write_folder(root / "small")), root / "first", sys.argv[2], None, quiet)
before = peak()
build(HubSource(root / "large"), root / "out", sys.argv[2], None, quiet, texts=[[5, 6, 7, 8]])
print(peak() - before)
"""
"""`getrusage` would tell the parent's peak as well, which a child inherits."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("quant", ["int4", "fp32"])
def test_a_build_holds_one_layer_at_a_time(tmp_path: Path, quant: str) -> None:
    """Of eight layers, the one that is read, its copies and what the test itself needs: never the whole source."""
    folder = write_folder(tmp_path / "large", num_hidden_layers=8, hidden_size=512, intermediate_size=2560)
    source_bytes = (folder / "model.safetensors").stat().st_size
    layer_bytes = (source_bytes - 4 * 512 * len(VOCABULARY)) // 8
    said = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), quant], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1], env={"PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak_bytes = int(said.stdout)
    assert layer_bytes < peak_bytes < 5 * layer_bytes < source_bytes
