"""`response_format` and `tools` from OpenAI's own client down to a real, tiny, random model behind the dispatcher."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openai import OpenAI
from pydantic import BaseModel, Field

from functions.dispatcher import wire
from functions.serving import parse
from functions.serving.parse import HeaderFields
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.runtime.local import LocalTier
from models.runtime.tier import JsonForm, ToolUse
from tests.fakes import (
    FakeTier,
    card,
    dispatcher_app,
    free_port,
    http_client,
    read_sse,
    schema_format,
    served,
    tier_app,
    tool,
    user,
)
from tests.tiny_models import SHAPE, quiet, write_gguf

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [tool("get_weather", description="The weather", parameters=WEATHER, strict=True), tool("get_time")]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("edge")
    shape = replace(SHAPE, context=2048)  # its tokens are single letters, and functions take many of them
    build(GgufSource(write_gguf(folder / "tiny.gguf", shape=shape)), folder / "edge", "fp32", None, quiet)
    with ExitStack() as stack:
        tiers = {"edge": LocalTier.open(folder / "edge", "edge", threads=1, spin=False), "device": FakeTier()}
        urls = {name: stack.enter_context(served(tier_app(tier))) for name, tier in tiers.items()}  # type: ignore[arg-type]
        yield stack.enter_context(served(dispatcher_app(urls["device"], urls["edge"])))


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    headers = {"Accept": "text/event-stream"}
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, default_headers=headers) as found:
        yield found


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "auto", "messages": user("hi"), "max_tokens": 900, **fields})


class Person(BaseModel):
    name: str = Field(max_length=8)
    mood: Literal["good", "bad"]
    friends: list[Person] = Field(max_length=0)


def test_an_answer_is_parsed_by_the_client(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="auto",
        messages=user("hi"),  # type: ignore[arg-type]
        response_format=Person,
        max_tokens=900,
    )
    person = reply.choices[0].message.parsed
    assert person
    assert person.mood in {"good", "bad"}
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_streamed_answer_is_of_the_schema(client: OpenAI, temperature: float) -> None:
    chunks = list(ask(client, response_format=schema_format(WEATHER), stream=True, temperature=temperature, seed=3))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    Draft202012Validator(WEATHER).validate(json.loads(text))
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_json_object_is_an_object_as_far_as_it_goes(client: OpenAI) -> None:
    reply = ask(client, response_format={"type": "json_object"}, max_tokens=20)
    assert reply.choices[0].message.content.startswith("{")
    assert reply.choices[0].finish_reason in {"stop", "length"}


def test_max_tokens_cuts_an_answer(client: OpenAI) -> None:
    reply = ask(client, response_format=schema_format(WEATHER), max_tokens=9)
    assert reply.choices[0].message.content == '{"city": '[: len(reply.choices[0].message.content)]
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 9)


def test_logprobs_of_a_held_answer(client: OpenAI) -> None:
    reply = ask(client, response_format=schema_format({"enum": ["yes", "no"]}), logprobs=True, top_logprobs=2)
    content = reply.choices[0].logprobs.content
    assert "".join(token.token for token in content) == reply.choices[0].message.content
    assert content[0].logprob == 0.0


@pytest.mark.parametrize(("choice", "names"), [("required", {"get_weather", "get_time"}), (NAMED, {"get_weather"})])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_made(client: OpenAI, choice: Any, names: set[str], stream: bool) -> None:
    reply = ask(client, tools=TOOLS, tool_choice=choice, stream=stream, parallel_tool_calls=False)
    if stream:
        chunks = list(reply)
        deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert [delta.index for delta in deltas] == [0] * len(deltas)
        assert [bool(delta.id) for delta in deltas] == [True] + [False] * (len(deltas) - 1)
        name, arguments = deltas[0].function.name, "".join(delta.function.arguments for delta in deltas)
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        message, finish = reply.choices[0].message, reply.choices[0].finish_reason
        (call,) = message.tool_calls
        name, arguments, content = call.function.name, call.function.arguments, message.content
        assert call.id
        assert call.type == "function"
    assert name in names
    assert not content
    assert finish == "tool_calls"
    schema = WEATHER if name == "get_weather" else {"type": "object", "maxProperties": 0}
    Draft202012Validator(schema).validate(json.loads(arguments))


def test_a_conversation_goes_on_after_a_call(client: OpenAI) -> None:
    turns: list[Any] = list(user("hi"))
    message = ask(client, tools=TOOLS, tool_choice=NAMED).choices[0].message
    turns += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21"}]
    reply = ask(client, messages=turns, tools=TOOLS, max_tokens=5)
    assert reply.choices[0].message.content is not None
    assert reply.usage.prompt_tokens > ask(client, tools=TOOLS, max_tokens=5).usage.prompt_tokens + 60


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_text_is_an_answer_where_nothing_must_be_called(client: OpenAI, choice: str) -> None:
    reply = ask(client, tools=TOOLS, tool_choice=choice, max_tokens=12)
    message, finish = reply.choices[0].message, reply.choices[0].finish_reason
    assert (message.tool_calls is None) or choice == "auto"
    assert finish in {"stop", "length", "tool_calls"}


def test_without_a_choice_to_make_functions_cost_no_prompt(client: OpenAI) -> None:
    plain, none = (ask(client, max_tokens=1, **fields) for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}))
    assert plain.usage.prompt_tokens == none.usage.prompt_tokens


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": schema_format({"type": "wizard"})}, "response_format.json_schema.schema"),
    ({"response_format": schema_format({"not": {}}, strict=True)}, "response_format.json_schema.schema"),
    ({"tools": [*TOOLS, tool("f", parameters={"type": "object", "$ref": "x"})]}, "tools[2].function.parameters"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_kept_to_is_named(
    client: OpenAI, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(client, stream=stream, **fields)
    assert caught.value.param == param


def test_a_tier_that_does_not_chat_is_given_no_form(client: OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(client, model="device", response_format={"type": "json_object"})
    assert caught.value.param == "skill"


@pytest.mark.parametrize("stream", [False, True])
def test_a_canned_message_is_a_refusal_where_json_was_asked_for(stream: bool) -> None:
    app = dispatcher_app(*(f"http://127.0.0.1:{free_port()}" for _ in range(2)))
    body = {"messages": user("hi"), "stream": stream, "response_format": {"type": "json_object"}}
    reply = app.test_client().post("/v1/chat/completions", json=body)
    assert reply.headers["X-Edgecascade-Source"] == "canned"
    if stream:
        chunks = [chunk for chunk in read_sse(reply.text.splitlines()) if chunk != "[DONE]"]
        assert "".join(c["choices"][0]["delta"].get("refusal", "") for c in chunks if c["choices"])
        assert not "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    else:
        message = reply.json["choices"][0]["message"]
        assert message["content"] is None
        assert message["refusal"]


def test_the_form_reaches_the_tier() -> None:
    edge = FakeTier(card("edge"))
    client = tier_app(edge).test_client()
    fields = {"response_format": schema_format(WEATHER, strict=True), "tools": TOOLS, "tool_choice": "required"}
    client.post("/v1/chat/completions", json={"messages": user("hi"), **fields})
    (limits,), (prompt,) = edge.limits, edge.prompts
    assert limits.json == JsonForm(json.dumps(WEATHER), strict=True)
    assert isinstance(limits.tools, ToolUse)
    assert limits.tools.required
    assert [(t.name, t.strict) for t in limits.tools.tools] == [("get_weather", True), ("get_time", False)]
    assert prompt.tools == limits.tools.tools  # type: ignore[union-attr]


CALLS = [{"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"a": 1}'}}]
TURNS = [
    *user("hi"),
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "noon", "tool_call_id": "c1"},
]
formats = st.sampled_from([None, {"type": "json_object"}, schema_format(WEATHER), schema_format({}, strict=True)])
choices = st.sampled_from([None, "none", "auto", "required", NAMED])


@settings(max_examples=40, deadline=None)
@given(formats, st.sampled_from([None, TOOLS]), choices, st.sampled_from([None, True, False]), st.booleans())
def test_what_the_dispatcher_sends_on_is_read_as_it_was(
    wanted: Any, tools: Any, choice: Any, parallel: Any, with_calls: bool
) -> None:
    body = {
        "messages": TURNS if with_calls else user("hi"),
        "response_format": wanted,
        "tools": tools,
        "tool_choice": choice if tools else None,
        "parallel_tool_calls": parallel,
    }
    first = parse.chat(body, HeaderFields())
    again = parse.chat(wire.request_body(first, "auto", stream=False), HeaderFields())
    assert again == first


PAGE = (Path(__file__).parents[1] / "docs" / "forms.md").read_text("utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=["json", "calls"])
def test_the_page_s_code_runs_as_printed(url: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8080", url), space)  # noqa: S102
    space["client"].close()
    assert capsys.readouterr().out


def test_the_page_s_curl_line_is_answered(url: str) -> None:
    (line,) = re.findall(r"^curl .*$", PAGE, re.MULTILINE)
    _, address, option, body = shlex.split(line)
    assert option == "-d"
    with http_client(url) as client:
        form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl sends
        reply = client.post(address.removeprefix("http://127.0.0.1:8080"), content=body.encode(), headers=form)
    person = json.loads(reply.json()["choices"][0]["message"]["content"])
    assert set(person) == {"name", "age"}
