"""What `build` needs of a model, whatever file it lies in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.artifact.shape import LlamaShape
from models.errors import SourceError
from models.skills import SkillSet

Floats = NDArray[np.float32]


class TensorSource(Protocol):
    """A Llama-family model: numbers, tokenizer and weights by GGUF's names, rotary halves split as on the Hub."""

    @property
    def shape(self) -> LlamaShape:
        """The model's numbers."""

    @property
    def model_id(self) -> str:
        """A short name for the manifest."""

    @property
    def chat_template(self) -> str:
        """The Jinja template of chats, '' if the model does not chat."""

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end an answer."""

    @property
    def has_lm_head(self) -> bool:
        """Whether the model predicts tokens of its vocabulary."""

    def digest(self) -> str:
        """SHA-256 that changes whenever the model does, in hex."""

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    def has(self, name: str) -> bool:
        """Whether the tensor is there."""

    def tensor(self, name: str) -> Floats:
        """A tensor in fp32; raises `SourceError` if it is absent or misshapen."""


def with_special_tokens(template: str, tokens: Mapping[str, str]) -> str:
    """Return the chat template with the special tokens it speaks of, such as `bos_token`, set at its beginning."""
    used = {name: text for name, text in tokens.items() if name in template}
    return "".join(f"{{% set {name} = {json.dumps(text)} %}}" for name, text in used.items()) + template


@runtime_checkable
class GridSource(Protocol):
    """A source whose matrices lie on a quantisation grid that can be kept."""

    def quantisation(self, name: str) -> str:
        """The block format, such as 'Q4_1'."""

    def blocks(self, name: str) -> NDArray[np.uint8]:
        """Raw blocks (rows, bytes), rows in the file's order."""

    def row_order(self, name: str) -> NDArray[np.int64] | None:
        """The order that brings the rows into `tensor`'s, or None."""


@dataclass(frozen=True)
class SkillHead:
    """What makes a decoder answer skills.

    `labels` (n_rows, C) is the label head, `inputs` (n_inputs, C) embeds the skill tokens, `exit_norms` (n_exits, C)
    weighs the norm before each early exit; `exits` are the numbers of layers passed at each.
    """

    skills: SkillSet
    labels: Floats
    inputs: Floats
    exits: tuple[int, ...] = ()
    exit_norms: Floats | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    energy: Mapping[str, Any] = field(default_factory=dict)

    def check(self, width: int) -> None:
        """Raise `SourceError` if the arrays do not fit the skills, the exits or the model's width."""
        norms = np.zeros((0, width)) if self.exit_norms is None else self.exit_norms
        wanted = {
            "labels": (self.skills.n_rows, width),
            "inputs": (self.skills.n_inputs, width),
            "exit_norms": (len(self.exits), width),
        }
        for (name, dims), found in zip(wanted.items(), (self.labels, self.inputs, norms), strict=True):
            if found.shape != dims:
                raise SourceError(f"'{name}' has the shape {found.shape}; skills, exits and width ask for {dims}")


@runtime_checkable
class SkilledSource(Protocol):
    """A source that brings its own label head."""

    def skill_head(self) -> SkillHead | None:
        """The label head, or None."""
