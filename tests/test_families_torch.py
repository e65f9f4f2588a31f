"""Every family against transformers' own forward pass: tiny random models, with a fresh seed each time."""

from __future__ import annotations

import importlib
import inspect
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from models.artifact.names import layer_file
from models.build.assemble import build
from models.build.fetch import open_folder, open_source
from models.build.optimum_export import build_exported
from models.build.tokenizers import SPLITTERS, byte_level_bpe
from models.runtime.local import LocalTier
from models.runtime.tier import Completion, Limits
from tests.tiny_models import MERGES, SPECIAL, VOCABULARY, quiet

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0] * 8,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, rope scaling llama3": ("LlamaConfig", {"rope_scaling": LLAMA3}),
    "llama, rope scaling linear": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral, a window of 8": ("MistralConfig", {"sliding_window": 8, "head_dim": 32}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, a window from layer 1 on": (
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "phi3": ("Phi3Config", {"sliding_window": 9}),
    "phi3, longrope": ("Phi3Config", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "qwen3-moe, weights of experts normed": (
        "Qwen3MoeConfig",
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 4, "head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 24, "rope_theta": 5e4,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    ),
}  # fmt: skip
PLAIN_HEADS = ("GPT2Config", "GPTNeoXConfig", "BloomConfig")
"""Families whose attention has as many key-value heads as heads."""
PROMPT = " the harbour wakes before the town does"


def tokenizer() -> Tokenizer:
    return byte_level_bpe(VOCABULARY, [tuple(m.split(" ")) for m in MERGES], SPECIAL, "gpt-2")


def write_model(folder: Path, config_class: str, changes: dict[str, Any]) -> Any:
    """Save a random model, scaled so that every part matters, and return it."""
    seed = random.SystemRandom().randrange(2**31)
    (folder.parent / f"seed-{seed}").touch()
    torch.manual_seed(seed)
    common = {k: v for k, v in COMMON.items() if k != "num_key_value_heads" or config_class not in PLAIN_HEADS}
    config = getattr(transformers, config_class)(**{**common, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer().to_str(), "utf-8")
    return model


def greedy_ids(model: Any, n_tokens: int) -> list[int]:
    ids = torch.tensor([tokenizer().encode(PROMPT).ids])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=n_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def written(artifact: Path, n_tokens: int) -> list[int]:
    tier = LocalTier.open(artifact, "edge", threads=1)
    return [token.id for token in tier.generate(Completion(PROMPT), Limits(max_tokens=n_tokens))]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fused_graph_computes_what_transformers_does(tmp_path: Path, name: str) -> None:
    """The build itself compares logits, and fails beyond its tolerance; the text is decoded here token by token."""
    model = write_model(tmp_path / "model", *FAMILIES[name])
    source = open_source(str(tmp_path / "model"), tmp_path, quiet)
    exact = build(source, tmp_path / "fp32", "fp32", None, quiet).manifest
    checked = exact.made["checked"]
    assert checked["against"] == f"transformers {transformers.__version__}"
    assert checked["largest_logit_difference"] < 1e-3
    assert checked["greedy_tokens_equal"] == 32
    wanted = greedy_ids(model, 24)
    end = wanted.index(2) + 1 if 2 in wanted else len(wanted)
    assert written(tmp_path / "fp32", 24) == wanted[:end]
    # One router that picks another expert changes more than all roundings of a dense model.
    bounds = {"int8": 0.4, "int4": 1.5} if exact.architecture.n_experts else {"int8": 0.01, "int4": 0.5}
    for quant, most in bounds.items():
        lost = build(source, tmp_path / quant, quant, None, quiet).manifest.losses
        assert lost["token_mean_kl"] < most
        assert lost["token_positions"] > 100


EXPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_positions": 128}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "bloom": ("BloomConfig", {"seq_length": 128}),
    **{name: FAMILIES[name] for name in ("llama", "mistral, a window of 8", "qwen2", "qwen3", "phi3", "gemma3")},
}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_graph_of_optimum_s_runs_in_the_same_engine(tmp_path: Path, name: str) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    model = write_model(tmp_path / "model", *EXPORTED[name])
    folder = open_folder(str(tmp_path / "model"), tmp_path, quiet)
    artifact = build_exported(folder, tmp_path / "fp32", "fp32", quiet)
    m = artifact.manifest
    assert (m.graph, m.lm_head, m.architecture.n_layers) == ("exported", True, model.config.num_hidden_layers)
    assert m.made["checked"]["largest_logit_difference"] < 1e-3
    assert m.made["checked"]["greedy_tokens_equal"] == 32
    assert {layer_file(n) for n in range(m.architecture.n_layers)} <= set(m.files)
    assert artifact.manifest.files["graph-plain-0.onnx"].size_bytes < 400_000, "the weights are not in the graph"
    wanted = greedy_ids(model, 24)
    end = wanted.index(2) + 1 if 2 in wanted else len(wanted)
    assert written(tmp_path / "fp32", 24) == wanted[:end]
    for quant, most in (("int8", 0.01), ("int4", 0.5)):
        lost = build_exported(folder, tmp_path / quant, quant, quiet).manifest.losses
        assert lost["token_mean_kl"] < most
        assert len(written(tmp_path / quant, 4)) > 0


def test_words_are_cut_as_llama_3_and_qwen_do() -> None:
    converter = importlib.import_module("transformers.convert_slow_tokenizer").TikTokenConverter
    published = {
        "llama-bpe": inspect.signature(converter.__init__).parameters["pattern"].default,
        "qwen2": importlib.import_module("transformers.models.qwen2.tokenization_qwen2").PRETOKENIZE_REGEX,
    }
    text = "It's 12345 o'clock,\n\n  naïve—日本語 2nd\t<tag> DON'T   stop!\r\n "
    for name, pattern in published.items():
        words = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        assert SPLITTERS[name].pre_tokenize_str(text) == words.pre_tokenize_str(text)
