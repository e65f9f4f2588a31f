"""Functions in prompts, and calls found in answers as they come."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from functions.serving.calls import CallReader
from functions.serving.events import CallDelta, Piece
from models.runtime.chat import ChatTemplate
from models.runtime.tier import Tool
from models.runtime.toolcalls import BETWEEN, CLOSING, OPENING, is_spoken_by

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
SPEAKS = """
{%- if tools %}TOOLS{% for tool in tools %} {{ tool | tojson }}{% endfor %}
{% endif %}
{%- for m in messages %}[{{ m.role }}] {{ m.content }}
{%- for call in m.tool_calls or [] -%}
<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor %}
{% endfor %}"""
TOOL = Tool("get_weather", '{"type": "object", "properties": {"city": {"type": "string"}}}', "The weather in a <city>")
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Paris and Rome?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}},
            {"id": "2", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zoë"}}},
        ],
    },
    {"role": "tool", "content": "21", "tool_call_id": "1"},
    {"role": "tool", "content": "25", "tool_call_id": "2"},
]


def test_a_template_that_knows_no_functions_sees_them_in_words() -> None:
    assert not is_spoken_by(PLAIN)
    prompt = ChatTemplate(PLAIN).render(TALK, [TOOL])
    assert prompt.startswith("[system] Be brief.\n\nYou can call functions.")
    assert '<tools>\n{"name": "get_weather", "description": "The weather in a <city>", "parameters"' in prompt
    assert "[assistant] " + written("get_weather", '{"city": "Paris"}') in prompt
    assert '{"city": "Zoë"}' in prompt
    assert prompt.endswith("[user] <tool_response>\n21\n</tool_response>\n<tool_response>\n25\n</tool_response>\n")


def test_a_system_message_is_made_where_there_is_none() -> None:
    prompt = ChatTemplate(PLAIN).render(TALK[1:2], [TOOL])
    assert prompt.startswith("[system] You can call functions.")
    assert ChatTemplate(PLAIN).render(TALK[1:2]) == "[user] Weather in Paris and Rome?\n"


def test_results_are_shown_where_nothing_can_be_called_any_more() -> None:
    prompt = ChatTemplate(PLAIN).render(TALK)
    assert "You can call" not in prompt
    assert "<tool_response>" in prompt


def test_a_template_that_speaks_the_format_is_given_the_functions() -> None:
    prompt = ChatTemplate(SPEAKS).render(TALK, [TOOL])
    assert prompt.startswith('TOOLS {"type": "function", "function": {"name": "get_weather"')
    assert "a <city>" in prompt, "no escapes for HTML"
    assert '<tool_call>get_weather {"city": "Zoë"}' in prompt
    assert "[tool] 21" in prompt
    assert "TOOLS" not in ChatTemplate(SPEAKS).render(TALK)


def written(name: str, arguments: str) -> str:
    return OPENING + name + BETWEEN + arguments + CLOSING


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]], CallReader, list[CallDelta]]:
    """What is said, the calls put together, the reader and the deltas."""
    reader = CallReader()
    found = [reader.push(Piece(piece)) for piece in pieces]
    deltas = [delta for piece in found for delta in piece.calls]
    names = {delta.index: delta.name for delta in deltas if delta.name}
    arguments = {i: "".join(d.arguments for d in deltas if d.index == i) for i in names}
    text = "".join(piece.text for piece in found) + reader.flush()
    return text, [(names[i], arguments[i]) for i in sorted(names)], reader, deltas


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    edges = sorted(draw(st.lists(st.integers(0, len(text)), max_size=30)))
    return [text[a:b] for a, b in zip([0, *edges], [*edges, len(text)], strict=True)]


names = st.text("abcXYZ019_-", min_size=1, max_size=10)
arguments = st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.dictionaries(st.text(max_size=3), st.none()))
tricky = st.lists(st.sampled_from(["<", "tool_call>", "<tool_call>\n{", "}\n", "x", "</tool_call>", '"name": "']))


@given(st.data(), tricky, st.lists(st.tuples(names, arguments), max_size=3))
def test_calls_are_found_however_the_text_is_cut(
    data: st.DataObject, said: list[str], calls: list[tuple[str, dict[str, Any]]]
) -> None:
    text = "".join(said)
    assume((text + OPENING).index(OPENING) == len(text))
    made = [(name, json.dumps(values, ensure_ascii=False)) for name, values in calls]
    whole = text + "\n".join(written(*call) for call in made)
    found, found_calls, reader, deltas = read(data.draw(cut(whole)))
    assert (found, found_calls) == (text, made)
    assert reader.only_whole_calls == bool(made)
    assert len({delta.id for delta in deltas if delta.id}) == len(made)
    assert all(bool(delta.id) == bool(delta.name) for delta in deltas)


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (OPENING[:5], OPENING[:5], []),
        (OPENING + "get_w", "", []),
        (OPENING + "f" + BETWEEN + '{"a": {"b', "", [("f", '{"a": {"b')]),
        (OPENING + "f" + BETWEEN + "{}", "", [("f", "{")]),
    ],
)
def test_an_answer_that_is_cut_short_gives_what_is_certain(text: str, said: str, calls: list[tuple[str, str]]) -> None:
    found, found_calls, reader, _deltas = read(list(text))
    assert (found, found_calls, reader.only_whole_calls) == (said, calls, False)
