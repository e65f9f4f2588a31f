"""OpenAI's own client against the dispatcher: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack

import openai
import pytest
from openai import OpenAI

from tests.fakes import FakeTier, card, dispatcher_app, served, tier_app, user


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with ExitStack() as stack:
        device, edge = (stack.enter_context(served(tier_app(FakeTier(card(name))))) for name in ("device", "edge"))
        url = stack.enter_context(served(dispatcher_app(device, edge)))
        # Behind OpenFaaS a stream needs this header; the client itself sends application/json even when it streams.
        headers = {"Accept": "text/event-stream"}
        yield stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, default_headers=headers))


def test_a_chat(client: OpenAI) -> None:
    reply = client.chat.completions.create(model="auto", messages=user("hi"))  # type: ignore[arg-type]
    assert reply.choices[0].message.content == "all is well"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.model_extra
    assert reply.model_extra["edgecascade"]["source"] == "edge"


def test_a_conversation_can_send_back_what_it_got(client: OpenAI) -> None:
    turns: list[object] = list(user("hi"))
    first = client.chat.completions.create(model="auto", messages=turns)  # type: ignore[call-overload]
    turns += [first.choices[0].message, *user("go on")]
    assert client.chat.completions.create(model="auto", messages=turns).choices  # type: ignore[call-overload]


def test_a_skill_by_extra_body(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="auto",
        messages=user("hello"),  # type: ignore[arg-type]
        extra_body={"skill": "assistant", "deadline_ms": 5000},
    )
    assert json.loads(reply.choices[0].message.content or "") == {"intent": "greeting", "slots": {}}


@pytest.mark.parametrize("extra", [{}, {"skill": "home"}])
def test_a_stream(client: OpenAI, extra: dict[str, str]) -> None:
    stream = client.chat.completions.create(
        model="auto",
        messages=user("play some Björk"),  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "all is well" or json.loads(text)["intent"] == "play_music"
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == (4 if extra else 3)
    assert chunks[-1].model_extra
    assert chunks[-1].model_extra["edgecascade"]["route"] in {"chat", "device"}


def test_logprobs(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="edge",
        messages=user("hi"),  # type: ignore[arg-type]
        logprobs=True,
        top_logprobs=2,
    )
    assert reply.choices[0].logprobs
    content = reply.choices[0].logprobs.content
    assert content
    assert [token.token for token in content] == ["all", " is", " well"]
    assert len(content[0].top_logprobs) == 2


def test_text_completions(client: OpenAI) -> None:
    assert client.completions.create(model="auto", prompt="so").choices[0].text == "all is well"
    chunks = list(client.completions.create(model="auto", prompt="so", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "all is well"


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["auto", "device", "edge"]
    assert client.models.retrieve("edge").owned_by == "edgecascade"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"n": 2}, openai.UnprocessableEntityError, "n"),
        ({"max_tokens": 0}, openai.UnprocessableEntityError, "max_tokens"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"extra_body": {"skill": "astrology"}}, openai.UnprocessableEntityError, "skill"),
        ({"messages": user("word " * 600)}, openai.BadRequestError, "messages"),
    ],
)
def test_errors_name_the_field(
    client: OpenAI, stream: bool, fields: dict[str, object], error: type[openai.APIStatusError], param: str
) -> None:
    values = {"model": "auto", "messages": user("hi"), "stream": stream, **fields}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**values)  # type: ignore[call-overload]
    assert caught.value.param == param
    assert caught.value.code
