"""One contract for every function that answers: bad input is refused in OpenAI's shape, naming the field.

Each case runs against device, edge, dispatcher and federation on real sockets, and after each the next request works.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.fakes import (
    FakeTier,
    card,
    dispatcher_app,
    federated,
    http_client,
    schema_format,
    served,
    tier_app,
    tool,
    user,
)

CHAT, TEXT, INVOKE = "/v1/chat/completions", "/v1/completions", "/"
OK = {"messages": user("hi"), "skill": "assistant"}
BODY_LIMIT = 1 << 20
LARGE = {"type": "object", "description": "x" * 40_000}
DEEP: dict[str, Any] = {"type": "object"}
for _ in range(16):
    DEEP = {"type": "object", "properties": {"deeper": DEEP}}


@pytest.fixture(scope="module")
def clients() -> Iterator[dict[str, httpx.Client]]:
    with ExitStack() as stack:
        urls = {name: stack.enter_context(served(tier_app(FakeTier(card(name))))) for name in ("device", "edge")}
        urls["dispatcher"] = stack.enter_context(served(dispatcher_app(urls["device"], urls["edge"])))
        federation = stack.enter_context(federated({"near": urls["device"]}))
        urls["federation"] = stack.enter_context(served(federation))
        yield {name: stack.enter_context(http_client(url)) for name, url in urls.items()}


@pytest.fixture(params=["device", "edge", "dispatcher", "federation"])
def client(request: pytest.FixtureRequest, clients: dict[str, httpx.Client]) -> httpx.Client:
    return clients[request.param]


def assert_refused(client: httpx.Client, reply: httpx.Response, status: int, param: str) -> None:
    """The reply is an error in OpenAI's shape, and the function still works."""
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["code"]
    assert client.post(CHAT, json=OK).status_code == 200


def chat_with(**fields: Any) -> dict[str, Any]:
    return {**OK, **fields}


def call(arguments: str) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def choice(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


BAD_FIELDS: list[tuple[str, dict[str, Any], int, str]] = [
    (CHAT, {}, 422, "messages"),
    (CHAT, chat_with(messages=[]), 422, "messages"),
    (CHAT, chat_with(messages="hi"), 422, "messages"),
    (CHAT, chat_with(messages=[1]), 422, "messages[0]"),
    (CHAT, chat_with(messages=[{"role": "user"}]), 422, "messages[0].content"),
    (CHAT, chat_with(messages=[{"content": "hi"}]), 422, "messages[0].role"),
    (CHAT, chat_with(messages=[{"role": "wizard", "content": "hi"}]), 422, "messages[0].role"),
    (CHAT, chat_with(messages=[{"role": "tool", "content": "hi"}]), 422, "messages[0].tool_call_id"),
    (CHAT, chat_with(messages=[*user("hi"), {"role": "tool", "content": "x", "tool_call_id": "c"}]), 422, "messages"),
    (CHAT, chat_with(messages=[{**user("hi")[0], "tool_call_id": "c"}]), 422, "messages[0].tool_call_id"),
    (CHAT, chat_with(messages=[{**user("hi")[0], "tool_calls": [call("{}")]}]), 422, "messages[0].tool_calls"),
    (CHAT, chat_with(messages=[{"role": "assistant", "content": None}]), 422, "messages[0].content"),
    (
        CHAT,
        chat_with(messages=[{"role": "assistant", "tool_calls": [call("[1")]}]),
        422,
        "messages[0].tool_calls[0].function.arguments",
    ),
    (CHAT, chat_with(messages=[{"role": "system", "content": "hi"}]), 422, "messages"),
    (CHAT, chat_with(messages=user("")), 422, "messages[0].content"),
    (CHAT, chat_with(messages=user(" \n")), 422, "messages[0].content"),
    (CHAT, chat_with(messages=[{"role": "user", "content": 5}]), 422, "messages[0].content"),
    (
        CHAT,
        chat_with(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        422,
        "messages[0].content[0].type",
    ),
    (CHAT, chat_with(messages=user("x" * 70_000)), 422, "messages[0].content"),
    (CHAT, chat_with(messages=user("word " * 600)), 400, "messages"),
    (CHAT, chat_with(messages=user("hi") * 300), 422, "messages"),
    (CHAT, chat_with(model="gpt-4"), 404, "model"),
    (CHAT, chat_with(model=7), 422, "model"),
    (CHAT, chat_with(model=""), 422, "model"),
    (CHAT, chat_with(skill="astrology"), 422, "skill"),
    (CHAT, chat_with(skill=["home"]), 422, "skill"),
    (CHAT, chat_with(max_tokens=0), 422, "max_tokens"),
    (CHAT, chat_with(max_tokens=-1), 422, "max_tokens"),
    (CHAT, chat_with(max_tokens=10**9), 422, "max_tokens"),
    (CHAT, chat_with(max_tokens=10**40), 422, "max_tokens"),
    (CHAT, chat_with(max_tokens="12"), 422, "max_tokens"),
    (CHAT, chat_with(max_tokens=True), 422, "max_tokens"),
    (CHAT, chat_with(max_completion_tokens=0), 422, "max_completion_tokens"),
    (CHAT, chat_with(temperature=-0.1), 422, "temperature"),
    (CHAT, chat_with(temperature=2.5), 422, "temperature"),
    (CHAT, chat_with(temperature="hot"), 422, "temperature"),
    (CHAT, chat_with(top_p=0), 422, "top_p"),
    (CHAT, chat_with(top_p=1.1), 422, "top_p"),
    (CHAT, chat_with(seed=1.5), 422, "seed"),
    (CHAT, chat_with(seed=2**70), 422, "seed"),
    (CHAT, chat_with(stop=""), 422, "stop"),
    (CHAT, chat_with(stop=["a"] * 5), 422, "stop"),
    (CHAT, chat_with(stop=[1]), 422, "stop[0]"),
    (CHAT, chat_with(n=2), 422, "n"),
    (CHAT, chat_with(n=0), 422, "n"),
    (CHAT, chat_with(n="1"), 422, "n"),
    (CHAT, chat_with(stream="yes"), 422, "stream"),
    (CHAT, chat_with(stream_options={"include_usage": True}), 422, "stream_options"),
    (CHAT, chat_with(stream=True, stream_options={"include_usage": 1}), 422, "stream_options.include_usage"),
    (CHAT, chat_with(stream=True, max_tokens=0), 422, "max_tokens"),
    (CHAT, chat_with(stream=True, skill="astrology"), 422, "skill"),
    (CHAT, chat_with(logprobs=3), 422, "logprobs"),
    (CHAT, chat_with(top_logprobs=3), 422, "top_logprobs"),
    (CHAT, chat_with(logprobs=True, top_logprobs=21), 422, "top_logprobs"),
    (CHAT, chat_with(tools=[{"type": "function"}]), 422, "tools[0].function"),
    (CHAT, chat_with(tools=[{**tool("f"), "type": "custom"}]), 422, "tools[0].type"),
    (CHAT, chat_with(tools=[tool("two words")]), 422, "tools[0].function.name"),
    (CHAT, chat_with(tools=[tool("f"), tool("f")]), 422, "tools"),
    (CHAT, chat_with(tools=[tool(f"f{n}") for n in range(65)]), 422, "tools"),
    (CHAT, chat_with(tools=[tool("f", parameters={"type": "array"})]), 422, "tools[0].function.parameters"),
    (CHAT, chat_with(tools=[tool("f", parameters=LARGE)]), 422, "tools[0].function.parameters"),
    (
        CHAT,
        chat_with(tools=[tool(f"f{n}", parameters={**LARGE, "description": "x" * 30_000}) for n in range(3)]),
        422,
        "tools",
    ),
    (CHAT, chat_with(tool_choice="required"), 422, "tool_choice"),
    (CHAT, chat_with(skill="chat", tools=[tool("f")], tool_choice=choice("g")), 422, "tool_choice"),
    (CHAT, chat_with(tools=[tool("f")], tool_choice=choice("f")), 422, "tool_choice"),
    (CHAT, chat_with(response_format={"type": "xml"}), 422, "response_format"),
    (CHAT, chat_with(response_format={"type": "json_schema"}), 422, "response_format.json_schema"),
    (CHAT, chat_with(response_format=schema_format({"type": "object"})), 422, "response_format"),
    (CHAT, chat_with(skill="chat", response_format=schema_format([])), 422, "response_format.json_schema.schema"),
    (CHAT, chat_with(skill="chat", response_format=schema_format(LARGE)), 422, "response_format.json_schema.schema"),
    (CHAT, chat_with(skill="chat", response_format=schema_format(DEEP)), 422, "response_format.json_schema.schema"),
    (CHAT, chat_with(frequency_penalty=0.5), 422, "frequency_penalty"),
    (CHAT, chat_with(presence_penalty=-1), 422, "presence_penalty"),
    (CHAT, chat_with(logit_bias={"5": 100}), 422, "logit_bias"),
    (CHAT, chat_with(modalities=["audio"]), 422, "modalities"),
    (CHAT, chat_with(store=True), 422, "store"),
    (CHAT, chat_with(top_k=5), 422, "top_k"),
    (CHAT, chat_with(deadline_ms=0), 422, "deadline_ms"),
    (CHAT, chat_with(deadline_ms="soon"), 422, "deadline_ms"),
    (CHAT, chat_with(out_of_scope="maybe"), 422, "out_of_scope"),
    (CHAT, chat_with(local_only="yes"), 422, "local_only"),
    (CHAT, chat_with(confidence_threshold=1.5), 422, "confidence_threshold"),
    (CHAT, chat_with(edgecascade_draft=""), 422, "edgecascade_draft"),
    (CHAT, chat_with(edgecascade_draft=["a"]), 422, "edgecascade_draft"),
    (CHAT, chat_with(edgecascade_draft="x" * 16_385), 422, "edgecascade_draft"),
    (TEXT, {}, 422, "prompt"),
    (TEXT, {"prompt": ""}, 422, "prompt"),
    (TEXT, {"prompt": [1, 2, 3]}, 422, "prompt"),
    (TEXT, {"prompt": ["a", "b"]}, 422, "prompt"),
    (TEXT, {"prompt": {}}, 422, "prompt"),
    (TEXT, {"prompt": "a", "best_of": 3}, 422, "best_of"),
    (TEXT, {"prompt": "a", "echo": True}, 422, "echo"),
    (TEXT, {"prompt": "a", "suffix": "z"}, 422, "suffix"),
    (TEXT, {"prompt": "a", "logprobs": 6}, 422, "logprobs"),
    (TEXT, {"prompt": "a", "logprobs": True}, 422, "logprobs"),
    (TEXT, {"prompt": "a", "messages": []}, 422, "messages"),
    (TEXT, {"prompt": "word " * 600, "skill": "assistant"}, 400, "prompt"),
    (INVOKE, {}, 422, "text"),
    (INVOKE, {"text": ""}, 422, "text"),
    (INVOKE, {"text": "a", "prompt": "b"}, 422, "text"),
    (INVOKE, {"text": 5}, 422, "text"),
    (INVOKE, {"text": "a", "stream": True}, 422, "stream"),
    (INVOKE, {"text": "a", "edgecascade_draft": "b"}, 422, "edgecascade_draft"),
    (INVOKE, {"prompt": "word " * 600}, 400, "text"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD_FIELDS)
def test_a_bad_field_is_named(client: httpx.Client, path: str, body: dict[str, Any], status: int, param: str) -> None:
    assert_refused(client, client.post(path, json=body), status, param)


BAD_BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "body"),
    (b"not json", 400, "body"),
    (b'{"messages": ', 400, "body"),
    (b"[]", 400, "body"),
    (b'"hi"', 400, "body"),
    (b"null", 400, "body"),
    (b'{"messages": "\xff\xfe"}', 400, "body"),
    (b'{"temperature": NaN}', 400, "body"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, "body"),
    (b"[" * 200_000, 400, "body"),
    (b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400, "body"),
    (b'{"messages": ' + b"[" * 30 + b"]" * 30 + b"}", 400, "messages"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages"),
    (b'{"\\ud800": 1}', 400, "body"),
    (b"\x00", 400, "body"),
    (b'{"messages": "' + b"x" * (BODY_LIMIT + 1) + b'"}', 413, "body"),
    (b'{"messages": "' + b"x" * 10_000_000 + b'"}', 413, "body"),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD_BODIES, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_bad_body_is_refused(client: httpx.Client, body: bytes, status: int, param: str, chunked: bool) -> None:
    pieces = (body[start : start + 65_536] for start in range(0, len(body), 65_536))
    reply = client.post(CHAT, content=pieces if chunked else body, headers={"Content-Type": "application/json"})
    assert_refused(client, reply, status, param)


@pytest.mark.parametrize(
    ("method", "path", "status", "param"),
    [
        ("GET", CHAT, 405, "method"),
        ("PUT", CHAT, 405, "method"),
        ("DELETE", "/healthz", 405, "method"),
        ("GET", INVOKE, 405, "method"),
        ("POST", "/metrics", 405, "method"),
        ("BREW", CHAT, 405, "method"),
        ("GET", "/v2/chat", 404, "path"),
        ("POST", "/v1/embeddings", 404, "path"),
        ("GET", "/v1/models/gpt-4", 404, "model"),
        ("GET", "/../../etc/passwd", 404, "path"),
    ],
)
def test_an_unknown_route_or_method(client: httpx.Client, method: str, path: str, status: int, param: str) -> None:
    reply = client.request(method, path)
    assert_refused(client, reply, status, param)
    assert status != 405 or reply.headers["Allow"]


def test_head_on_a_post_route_has_no_body(client: httpx.Client) -> None:
    reply = client.head(CHAT)
    assert (reply.status_code, reply.content) == (405, b"")


@pytest.mark.parametrize(
    ("name", "value"),
    [("X-Deadline-Ms", "soon"), ("X-Deadline-Ms", "-5"), ("X-Deadline-Ms", "nan"), ("X-Data-Class", "top-secret")],
)
def test_a_bad_header_is_named(client: httpx.Client, name: str, value: str) -> None:
    assert_refused(client, client.post(CHAT, json=OK, headers={name: value}), 422, name)


@pytest.mark.parametrize(("content_type", "body"), [("text/plain", b""), ("text/plain", b" \n"), ("", b"")])
def test_an_empty_text(client: httpx.Client, content_type: str, body: bytes) -> None:
    reply = client.post(INVOKE, content=body, headers={"Content-Type": content_type} if content_type else {})
    assert_refused(client, reply, 422, "text")


def test_an_overlong_text(client: httpx.Client) -> None:
    assert_refused(client, client.post(INVOKE, content=b"x" * 70_000), 422, "text")


def test_text_that_is_not_utf8(client: httpx.Client) -> None:
    assert_refused(client, client.post(INVOKE, content=b"caf\xe9"), 400, "body")


HARMLESS: list[dict[str, Any]] = [
    {"n": 1},
    {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "store": False},
    {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"response_format": {"type": "json_object"}},
    {"tools": [tool("f")], "tool_choice": "auto", "parallel_tool_calls": False},
    {"messages": [*user("hi"), {"role": "assistant", "content": None, "refusal": "no"}, *user("so")]},
    {
        "messages": [
            *user("hi"),
            {"role": "assistant", "content": None, "tool_calls": [call("{}")]},
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
        ]
    },
    {"edgecascade_draft": None},
    {"edgecascade_draft": "x" * 16_384},
    {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y"},
    {"max_completion_tokens": 5, "temperature": 1, "top_p": 1, "seed": 3, "stop": None, "reasoning_effort": None},
    {
        "messages": [
            *user("hi"),
            {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None},
            *user("so"),
        ]
    },
]


@pytest.mark.parametrize("fields", HARMLESS)
def test_what_clients_commonly_send_is_taken(client: httpx.Client, fields: dict[str, Any]) -> None:
    assert client.post(CHAT, json=chat_with(**fields)).status_code == 200


def test_chunked_bodies_are_read(client: httpx.Client) -> None:
    body = json.dumps(chat_with(messages=user("hällo " * 50))).encode()
    pieces = (body[start : start + 7] for start in range(0, len(body), 7))
    assert client.post(CHAT, content=pieces).status_code == 200


def test_invoke_gives_text_for_text(client: httpx.Client) -> None:
    reply = client.post(INVOKE, content=b"hello there\n", headers={"Content-Type": "text/plain"})
    assert reply.headers["Content-Type"].startswith("text/plain")
    assert reply.text == '{"intent": "greeting", "slots": {}}\n'
    assert reply.headers["X-Edgecascade-Confidence"]


@pytest.mark.parametrize("body", [{"text": "hello"}, {"prompt": "hello"}])
def test_invoke_gives_json_for_json(client: httpx.Client, body: dict[str, str]) -> None:
    reply = client.post(INVOKE, json=body).json()
    assert reply["frame"] == json.loads(reply["answer"]) == {"intent": "greeting", "slots": {}}
    assert reply["edgecascade"]["route"]


def test_invoke_gives_json_for_text_if_asked(client: httpx.Client) -> None:
    reply = client.post(INVOKE, content=b"hello", headers={"Accept": "application/json"})
    assert reply.json()["frame"]["intent"] == "greeting"


def test_invoke_reads_what_curl_sends_by_default(client: httpx.Client) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post(INVOKE, content=b'{"text": "hello"}', headers=form).text.startswith('{"intent"')
    assert client.post(INVOKE, content=b"hello", headers=form).text.startswith('{"intent"')


def test_the_openapi_document_covers_every_route(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    federations = {"/v1/state/events", "/v1/conversations/{conversation}", "/v1/deferred", "/v1/deferred/{id}"}
    assert set(document["paths"]) - (federations if "federation" in document["info"]["title"] else set()) == {
        *(CHAT, TEXT, INVOKE, "/v1/models", "/v1/models/{name}"),
        *("/healthz", "/_/ready", "/metrics", "/openapi.json"),
    }
    known = document["components"]["schemas"]
    assert "max_completion_tokens" in known["ChatRequest"]["properties"]
    refs = json.dumps(document).split('"$ref": "#/components/schemas/')[1:]
    assert {ref.split('"')[0] for ref in refs} <= set(known)


def test_metrics_carry_their_site_and_the_bucket_of_the_target(client: httpx.Client) -> None:
    client.post(CHAT, json=OK)
    lines = client.get("/metrics").text.splitlines()
    series = [line for line in lines if not line.startswith("#")]
    assert all('node_id="' in line and 'shard_id="whole"' in line and 'model_version="' in line for line in series)
    assert all(line.startswith("edgecascade_") for line in series)
    for name in ("request", "queue", "network", "prefill", "decode", "time_to_first_token"):
        assert any(line.startswith(f"edgecascade_{name}_seconds_bucket") and 'le="0.08"' in line for line in series)
    routes = ("device", "edge", "federation")
    answered = [line for line in series if line.startswith("edgecascade_requests_total")]
    assert any(f'route="{route}"' in line for line in answered for route in routes)


def test_the_probes(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/_/ready").json() == {"ready": True, "reason": ""}
