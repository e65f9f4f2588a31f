"""Reading requests: whatever comes in, it is an `Ask` or a refusal that names a field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functions.serving import body, parse
from functions.serving.ask import Shape
from functions.serving.errors import RefusedError
from functions.serving.parse import HeaderFields
from functions.serving.schema import ChatRequest, CompletionRequest
from tests.fakes import user

NONE = HeaderFields()

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner))


def fields_of(schema: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from([*schema.model_fields, "unknown"]), values, max_size=4)


def refusal_of(read: Callable[[], object]) -> RefusedError | None:
    """What `read` refuses; any other error is a failure of the test."""
    try:
        read()
    except RefusedError as refusal:
        return refusal
    return None


@settings(max_examples=100, deadline=None)
@given(fields_of(ChatRequest), st.booleans())
def test_any_chat_is_read_or_refused_with_a_field(fields: dict[str, Any], sane: bool) -> None:
    request = {"messages": user("hi"), **fields} if sane else fields
    refusal = refusal_of(lambda: parse.chat(request, NONE))
    assert refusal is None or (refusal.status == 422 and refusal.param)


@settings(max_examples=60, deadline=None)
@given(fields_of(CompletionRequest))
def test_any_completion_is_read_or_refused_with_a_field(fields: dict[str, Any]) -> None:
    refusal = refusal_of(lambda: parse.completion({"prompt": "so", **fields}, NONE))
    assert refusal is None or (refusal.status == 422 and refusal.param)


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=200).map(lambda raw: raw.decode(errors="surrogateescape")) | st.text() | values.map(json.dumps)
)
def test_any_text_is_an_object_or_refused(text: str) -> None:
    refusal = refusal_of(lambda: body.parse_object(text))
    assert refusal is None or (refusal.status == 400 and refusal.param)


@pytest.mark.parametrize(
    ("header", "field", "seconds"), [("500", None, 0.5), (None, 300, 0.3), ("500", 300, 0.3), ("200", 300, 0.2)]
)
def test_the_smaller_deadline_holds(header: str | None, field: int | None, seconds: float) -> None:
    headers = HeaderFields.read({"X-Deadline-Ms": header} if header else {})
    ask = parse.chat({"messages": user("hi"), "deadline_ms": field}, headers)
    assert ask.deadline_s == pytest.approx(seconds)


def test_a_data_class_cannot_be_lifted_by_a_field() -> None:
    headers = HeaderFields.read({"X-Data-Class": "Local-Only"})
    assert parse.chat({"messages": user("hi"), "local_only": False}, headers).local_only


def test_defaults() -> None:
    ask = parse.chat({"messages": user("hi")}, NONE)
    assert (ask.shape, ask.model, ask.skill, ask.stream) == (Shape.CHAT, "auto", "chat", False)
    assert (ask.sampling.max_tokens, ask.sampling.temperature, ask.sampling.top_logprobs) == (256, 0.0, None)
    assert parse.plain(" hello \n", NONE, "home").skill == "home"
    assert parse.plain(" hello \n", NONE, "home").text == "hello"


def test_the_utterance_is_what_the_user_said_last() -> None:
    turns = [*user("first"), {"role": "assistant", "content": "yes"}, *user("last"), {"role": "system", "content": "x"}]
    assert parse.chat({"messages": turns}, NONE).text == "last"


def test_depth_is_counted_from_the_body() -> None:
    body.parse_object('{"a": ' + "[" * 15 + "]" * 15 + "}")
    with pytest.raises(RefusedError, match="deeper than 16"):
        body.parse_object('{"a": ' + "[" * 16 + "]" * 16 + "}")
