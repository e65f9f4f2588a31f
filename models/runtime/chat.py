"""Render conversations by a model's own template, in a sandbox: a template is code that came with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import ArtifactError, PromptError


class ChatTemplate:
    """A compiled template; raises `ArtifactError` if it cannot be compiled."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ArtifactError(f"the model's chat template cannot be compiled: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt that asks for the next message; raises `PromptError` if the template refuses."""
        values = {"messages": [dict(m) for m in messages], "add_generation_prompt": True}
        try:
            return self._template.render(values)
        except Exception as error:  # a template is foreign code: it may divide by zero as well as refuse
            raise PromptError(f"the model's chat template refuses these messages: {error}", "messages") from error


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
