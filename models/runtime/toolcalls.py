"""How a call of a function is written in an answer, and how functions are shown to a model.

One format for all models, the one of the Hermes and Qwen families, since a grammar holds the answer to it:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

A chat template that speaks it is given the functions. For any other (SmolLM2's knows no functions at all) they are put
into the system message, calls made earlier become the assistant's text and what they returned a user's message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from models.runtime.tier import Tool

MARK = "<tool_call>"
OPENING = f'{MARK}\n{{"name": "'
BETWEEN = '", "arguments": '
CLOSING = "}\n</tool_call>"

_INSTRUCTION = """\
You can call functions. These are their names, what they do and JSON schemas of their arguments:
<tools>
{tools}
</tools>
To call a function, answer with its name and arguments like this and nothing else:
{example}"""


def is_spoken_by(template: str) -> bool:
    """Whether a chat template shows functions to the model and asks for calls in this format."""
    return "tools" in template and MARK in template


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Functions as chat templates expect them."""
    return [{"type": "function", "function": _function(tool)} for tool in tools]


def as_plain_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, str]]:
    """The conversation with nothing in it but roles and texts."""
    plain = list(_plain(messages))
    if not tools:
        return plain
    own = plain.pop(0)["content"] + "\n\n" if plain and plain[0]["role"] == "system" else ""
    return [{"role": "system", "content": own + _instruction(tools)}, *plain]


def _function(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)}


def _instruction(tools: Sequence[Tool]) -> str:
    lines = "\n".join(json.dumps(_function(tool), ensure_ascii=False) for tool in tools)
    return _INSTRUCTION.format(tools=lines, example=_written("FUNCTION", {"ARGUMENT": "VALUE"}))


def _plain(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Results of calls made together go into one message: many templates want user and assistant to alternate."""
    for role, group in groupby(messages, key=lambda message: message["role"]):
        if role == "tool":
            results = [f"<tool_response>\n{message['content']}\n</tool_response>" for message in group]
            yield {"role": "user", "content": "\n".join(results)}
        else:
            yield from ({"role": role, "content": _text(message)} for message in group)


def _text(message: Mapping[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    parts = [message["content"], *(_written(call["name"], call["arguments"]) for call in calls)]
    return "\n".join(part for part in parts if part)


def _written(name: str, arguments: Any) -> str:
    return OPENING + name + BETWEEN + json.dumps(arguments, ensure_ascii=False) + CLOSING
