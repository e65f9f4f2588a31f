"""A Llama-family model as a folder in Hugging Face's layout: `config.json`, safetensors, `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from models.artifact.shape import LlamaShape
from models.artifact.tensors import Array, read_tensors
from models.build.source import Floats, with_special_tokens
from models.errors import ArtifactError, SourceError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class HubSource:
    """An open folder; raises `SourceError` with one sentence for anything it cannot take."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._config = json.loads((path / "config.json").read_bytes())
            self._tokenizer_json = (path / "tokenizer.json").read_text("utf-8")
            files = {p.name: p.read_bytes() for p in sorted(path.glob("*.safetensors"))}
            self._tensors: dict[str, Array] = {}
            for name, data in files.items():
                self._tensors |= read_tensors(data, str(path / name))
            self.shape = _shape(self._config, path)
        except OSError as error:
            raise SourceError(f"{path} is not a model folder: {error.filename} cannot be read") from error
        except (ValueError, KeyError, TypeError, ArtifactError) as error:
            raise SourceError(f"{path} is damaged: {error}") from error
        parts = [json.dumps(self._config, sort_keys=True).encode(), self._tokenizer_json.encode(), *files.values()]
        self._digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    @property
    def model_id(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def chat_template(self) -> str:
        """The Jinja template of chats, '' if the model does not chat."""
        beside, settings = self.path / "chat_template.jinja", self._json("tokenizer_config.json")
        template = beside.read_text("utf-8") if beside.is_file() else settings.get("chat_template")
        named = {name: settings.get(name) for name in ("bos_token", "eos_token")}
        texts = {name: t["content"] if isinstance(t, dict) else t for name, t in named.items() if t}
        return with_special_tokens(template, texts) if isinstance(template, str) else ""

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end an answer."""
        found = self._json("generation_config.json").get("eos_token_id", self._config.get("eos_token_id", []))
        return tuple(found) if isinstance(found, list) else (int(found),)

    @property
    def has_lm_head(self) -> bool:
        """A causal language model predicts tokens."""
        return True

    def digest(self) -> str:
        """SHA-256 over config, tokenizer and weights, in hex."""
        return self._digest

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return Tokenizer.from_str(self._tokenizer_json)

    def has(self, name: str) -> bool:
        """Whether the tensor is there; a tied head is not."""
        if name == "output.weight" and self._config.get("tie_word_embeddings"):
            return False
        return _hub_name(name) in self._tensors

    def tensor(self, name: str) -> Floats:
        """A tensor in fp32."""
        found = self._tensors.get(_hub_name(name))
        if found is None:
            raise SourceError(f"{self.path} lacks the tensor '{_hub_name(name)}'")
        return found.astype(np.float32)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
        return found


def _hub_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_TOP.get(stem, stem)}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_LAYER.get(part, part)}.{kind}"


def _shape(config: dict[str, Any], path: Path) -> LlamaShape:
    if config.get("model_type") != "llama":
        raise SourceError(f"{path} holds architecture '{config.get('model_type')}'; this reader takes 'llama'")
    odd = [k for k in ("rope_scaling", "attention_bias", "mlp_bias") if config.get(k)]
    rotary = config.get("rope_parameters") or {}
    if odd or rotary.get("rope_type", "default") != "default":
        raise SourceError(f"{path} uses '{(odd or ['rope_parameters'])[0]}', which is not supported")
    heads = int(config["num_attention_heads"])
    return LlamaShape(
        n_layers=int(config["num_hidden_layers"]),
        width=int(config["hidden_size"]),
        n_heads=heads,
        n_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        mlp_width=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        context=int(config["max_position_embeddings"]),
        rope_theta=float(rotary.get("rope_theta") or config.get("rope_theta") or 10000.0),
        norm_eps=float(config["rms_norm_eps"]),
    )
