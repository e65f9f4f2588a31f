"""Render conversations by a model's own template, in a sandbox: a template is code that came with the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import ArtifactError, PromptError
from models.runtime import toolcalls
from models.runtime.tier import Tool


class ChatTemplate:
    """A compiled template; raises `ArtifactError` if it cannot be compiled."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json
        self._calls_functions = toolcalls.is_spoken_by(source)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ArtifactError(f"the model's chat template cannot be compiled: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] = ()) -> str:
        """Return the prompt that asks for the next message; raises `PromptError` if the template refuses.

        A template that knows no functions, or another way to call them, sees them as `toolcalls` puts them in words.
        """
        values: dict[str, Any] = {"add_generation_prompt": True}
        if self._calls_functions:
            values |= {"messages": [dict(m) for m in messages], "tools": toolcalls.described(tools) or None}
        else:
            values["messages"] = toolcalls.as_plain_messages(messages, tools)
        try:
            return self._template.render(values)
        except Exception as error:  # a template is foreign code: it may divide by zero as well as refuse
            raise PromptError(f"the model's chat template refuses these messages: {error}", "messages") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """As templates expect it; Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
