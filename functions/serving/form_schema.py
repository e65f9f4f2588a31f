"""The part of the request schema that says what form an answer must have: `response_format`, `tools`, `tool_choice`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from functions.serving.strict import Strict, Text
from models.runtime.tier import JsonForm, Tool, ToolUse

MAX_SCHEMA_BYTES = 32_768
MAX_SCHEMA_DEPTH = 32
MAX_TOOLS = 64
MAX_TOOLS_BYTES = 65_536
"""Of all functions' schemas together."""

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Schema = dict[str, Any]


def _bounded(schema: Schema) -> Schema:
    """Refuse a schema that is too large to be compiled; what it says is seen to by the tier."""
    size = len(json.dumps(schema, ensure_ascii=False).encode())
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"the schema has {size} bytes; send at most {MAX_SCHEMA_BYTES}")
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise ValueError(f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")
    return schema


def _depth(schema: Schema) -> int:
    """Levels of objects and lists."""
    depth, level = 0, list[Any]([schema])
    while level:
        depth += 1
        parts = [part for node in level for part in (node.values() if isinstance(node, dict) else node)]
        level = [part for part in parts if isinstance(part, dict | list)]
    return depth


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]

    @property
    def form(self) -> JsonForm | None:
        """What the tier is told."""
        return None


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]

    @property
    def form(self) -> JsonForm | None:
        """What the tier is told."""
        return JsonForm()


class JsonSchema(Strict):
    """A schema; `name` and `description` change nothing in the answer."""

    name: Name
    description: Text | None = None
    # `schema` is taken: pydantic's models have a method of that name.
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _is_bounded(cls, value: Schema) -> Schema:
        return _bounded(value)


class JsonSchemaFormat(Strict):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    @property
    def form(self) -> JsonForm | None:
        """What the tier is told."""
        return JsonForm(json.dumps(self.json_schema.schema_), strict=bool(self.json_schema.strict))


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class FunctionDefinition(Strict):
    """A function; without `parameters` it takes none."""

    name: Name
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _describes_an_object(cls, value: Schema | None) -> Schema | None:
        if value is not None and value.get("type") != "object":
            raise ValueError('arguments are an object: the schema must have "type": "object"')
        return None if value is None else _bounded(value)

    @property
    def tool(self) -> Tool:
        """What the tier is told."""
        parameters = Tool.parameters if self.parameters is None else json.dumps(self.parameters)
        return Tool(self.name, parameters, self.description or "", strict=bool(self.strict))


class ToolDefinition(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    """A function by name."""

    name: Name


class NamedChoice(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


def tool_use(tools: list[ToolDefinition], choice: ToolChoice | None, *, parallel: bool) -> ToolUse | None:
    """What the tier is told; None where nothing can be called."""
    if not tools or choice == "none":
        return None
    known = tuple(tool.function.tool for tool in tools)
    if isinstance(choice, NamedChoice):
        return ToolUse(known, only=choice.function.name, parallel=parallel)
    return ToolUse(known, required=choice == "required", parallel=parallel)


class CalledFunction(Strict):
    """What was called; `arguments` is a JSON object, as text."""

    name: Name
    arguments: Text

    @field_validator("arguments")
    @classmethod
    def _are_an_object(cls, value: str) -> str:
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError("arguments must be the text of a JSON object")  # noqa: TRY004  # pydantic reads it
        return value


class ToolCall(Strict):
    """A call that the assistant made earlier; streamed ones bring an `index`."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
