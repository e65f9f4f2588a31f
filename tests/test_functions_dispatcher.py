"""The dispatcher between two real loopback functions with fake tiers in them."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from functions.dispatcher.breaker import Breaker
from functions.dispatcher.call import Happening, TierFailedError, poll
from functions.dispatcher.exchange import Traffic
from functions.dispatcher.health import Health
from functions.dispatcher.tier_client import Target, TierClient
from functions.serving.ask import Ask, Message, Shape
from functions.serving.errors import RefusedError
from models.runtime.tier import Chat, SkillQuery
from tests.fakes import (
    SECRET_WORD,
    FakeTier,
    card,
    dispatcher_app,
    free_port,
    read_sse,
    served,
    tier_app,
    user,
    wait_until,
)
from tests.raw_peer import Peer, listening, replying, silent

CHAT = "/v1/chat/completions"


@dataclass
class Bundle:
    """A running bundle; `client` talks to the dispatcher."""

    device: FakeTier
    edge: FakeTier
    client: FlaskClient
    stop_edge: Callable[[], None]
    start_edge: Callable[[], None]

    def chat(self, text: str, **fields: Any) -> Any:
        return self.client.post(CHAT, json={"messages": user(text), **fields})

    def said(self, text: str, **fields: Any) -> dict[str, Any]:
        reply = self.chat(text, **fields)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json["edgecascade"]
        return found


@pytest.fixture
def bundle() -> Iterator[Bundle]:
    device, edge = FakeTier(card("device")), FakeTier(card("edge"))
    port = free_port()
    edge_app = tier_app(edge)
    with ExitStack() as rest, ExitStack() as edges:
        device_url = rest.enter_context(served(tier_app(device)))
        edges.enter_context(served(edge_app, port))
        app = dispatcher_app(device_url, f"http://127.0.0.1:{port}")
        yield Bundle(
            device, edge, app.test_client(), edges.close, lambda: edges.enter_context(served(edge_app, port)) and None
        )


@pytest.fixture
def without_edge() -> Iterator[FlaskClient]:
    with served(tier_app(FakeTier(card("device")))) as device_url:
        yield dispatcher_app(device_url, f"http://127.0.0.1:{free_port()}").test_client()


def outcome(said: dict[str, Any]) -> tuple[str, str, str, bool]:
    return said["source"], said["route"], said["reason"], said["degraded"]


def test_a_confident_device_answers_alone(bundle: Bundle) -> None:
    said = bundle.said("hello", skill="assistant")
    assert outcome(said) == ("device", "device", "confident", False)
    assert said["network_bytes"] == {"sent": 0, "received": 0}
    assert said["threshold"] == 0.8
    assert said["frame"] == {"intent": "greeting", "slots": {}}
    assert bundle.edge.prompts == []


def test_an_unsure_device_is_overruled_by_the_edge(bundle: Bundle) -> None:
    reply = bundle.chat("maybe hello", skill="assistant")
    said = reply.json["edgecascade"]
    assert outcome(said) == ("edge", "escalated", "low_confidence", False)
    assert bundle.edge.prompts == [SkillQuery("assistant", "maybe hello")]
    assert said["network_bytes"]["sent"] > 200
    assert said["network_bytes"]["received"] > 500
    assert said["model_version"] == "edge-1"
    assert said["timing_ms"]["total"] >= said["timing_ms"]["network"] > 0
    assert reply.headers["X-Edgecascade-Route"] == "escalated"


def test_joules_are_those_of_both_tiers(bundle: Bundle) -> None:
    said = bundle.said("maybe hello", skill="assistant")
    busy_s = (said["timing_ms"]["prefill"] + said["timing_ms"]["decode"]) / 1e3
    assert said["joules"]["value"] == pytest.approx(2.0 * busy_s)


@pytest.mark.parametrize(("threshold", "source"), [(0.001, "device"), (0.5, "edge")])
def test_a_request_may_bring_its_own_threshold(bundle: Bundle, threshold: float, source: str) -> None:
    said = bundle.said("maybe hello", skill="assistant", confidence_threshold=threshold)
    assert (said["source"], said["threshold"]) == (source, threshold)


@pytest.mark.parametrize("model", ["device", "edge"])
def test_a_named_tier_is_asked(bundle: Bundle, model: str) -> None:
    assert outcome(bundle.said("maybe hello", skill="assistant", model=model)) == (model, model, "requested", False)


def test_chat_goes_to_the_edge(bundle: Bundle) -> None:
    reply = bundle.chat("how are you?", max_tokens=2)
    assert outcome(reply.json["edgecascade"]) == ("edge", "chat", "chat", False)
    assert reply.json["choices"][0]["message"]["content"] == "all is"
    assert reply.json["usage"]["completion_tokens"] == 2
    assert bundle.device.prompts == []


def test_out_of_scope_becomes_a_chat_if_the_request_allows(bundle: Bundle) -> None:
    assert bundle.said("nonsense", skill="assistant")["frame"]["intent"] == "out_of_scope"
    said = bundle.said("nonsense", skill="assistant", out_of_scope="chat")
    assert outcome(said) == ("edge", "chat", "out_of_scope", False)
    assert said["frame"] is None
    assert bundle.edge.prompts == [Chat(({"role": "user", "content": "nonsense"},))]


def test_local_only_never_reaches_the_edge(bundle: Bundle) -> None:
    unsure = bundle.said("maybe hello", skill="assistant", local_only=True)
    assert outcome(unsure) == ("device", "device", "local_only", False)
    chat = bundle.client.post(CHAT, json={"messages": user("hi")}, headers={"X-Data-Class": "local-only"})
    assert outcome(chat.json["edgecascade"]) == ("canned", "fallback", "local_only", True)
    assert bundle.said("nonsense", skill="home", local_only=True, out_of_scope="chat")["source"] == "device"
    assert bundle.edge.prompts == []


def test_without_edge_an_unsure_answer_is_flagged(without_edge: FlaskClient) -> None:
    reply = without_edge.post(CHAT, json={"messages": user("maybe hello"), "skill": "assistant"})
    assert outcome(reply.json["edgecascade"]) == ("device", "fallback", "edge_unavailable", True)
    assert reply.json["edgecascade"]["frame"]["intent"] == "greeting"


@pytest.mark.parametrize("stream", [False, True])
def test_without_edge_a_chat_gets_a_canned_message(without_edge: FlaskClient, stream: bool) -> None:
    reply = without_edge.post(CHAT, json={"messages": user("hi"), "stream": stream})
    assert reply.status_code == 200
    assert reply.headers["X-Edgecascade-Degraded"] == "true"
    body = read_sse(reply.text.splitlines())[-2] if stream else reply.json
    assert outcome(body["edgecascade"]) == ("canned", "fallback", "edge_unavailable", True)
    assert "can't answer" in reply.text


def test_with_nothing_behind_it_the_dispatcher_still_answers() -> None:
    client = dispatcher_app(*(f"http://127.0.0.1:{free_port()}" for _ in range(2))).test_client()
    said = client.post("/", json={"text": "hello"}).json
    assert outcome(said["edgecascade"]) == ("canned", "fallback", "device_unavailable", True)
    assert client.get("/_/ready").status_code == 200
    entries = client.get("/v1/models").json["data"]
    assert [(e["id"], e["edgecascade"]["available"]) for e in entries] == [
        ("auto", True),
        ("device", False),
        ("edge", False),
    ]


def test_models_lists_auto_and_both_tiers(bundle: Bundle) -> None:
    entries = {entry["id"]: entry["edgecascade"] for entry in bundle.client.get("/v1/models").json["data"]}
    assert list(entries) == ["auto", "device", "edge"]
    assert entries["auto"]["skills"] == ["assistant", "home", "chat"]
    assert entries["device"]["thresholds"] == {"assistant": 0.8, "home": 0.8}
    assert entries["edge"]["model_version"] == "edge-1"


def test_a_chat_streams_through_token_by_token(bundle: Bundle) -> None:
    """The edge gives its last token only after the client has the first."""
    seen = threading.Event()
    bundle.edge.before_token = lambda index: None if index == 0 else wait_until(seen.is_set)
    reply = bundle.client.post(
        CHAT,
        json={"messages": user("hi"), "stream": True, "stream_options": {"include_usage": True}},
        buffered=False,
    )
    stream = reply.iter_encoded()
    next(stream)
    assert b'"all"' in next(stream)
    seen.set()
    rest = read_sse(line for piece in stream for line in piece.decode().splitlines())
    assert rest[-1] == "[DONE]"
    assert outcome(rest[-2]["edgecascade"]) == ("edge", "chat", "chat", False)
    assert rest[-2]["usage"]["completion_tokens"] == 3
    assert rest[-2]["edgecascade"]["network_bytes"]["received"] > 500
    assert rest[-2]["edgecascade"]["timing_ms"]["first_token"] > 0


@pytest.mark.parametrize(("text", "route"), [("hello", "device"), ("maybe hello", "escalated")])
def test_a_frame_streams_too(bundle: Bundle, text: str, route: str) -> None:
    *chunks, done = read_sse(bundle.chat(text, skill="assistant", stream=True).text.splitlines())
    assert done == "[DONE]"
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert json.loads(content) == chunks[-1]["edgecascade"]["frame"]
    assert chunks[-1]["edgecascade"]["route"] == route


def test_logprobs_pass_through(bundle: Bundle) -> None:
    chat = bundle.chat("hi", logprobs=True, top_logprobs=1).json["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in chat] == ["all", " is", " well"]
    reply = bundle.client.post("/v1/completions", json={"prompt": "so", "logprobs": 1})
    assert reply.json["choices"][0]["logprobs"]["text_offset"] == [0, 3, 6]
    assert reply.json["choices"][0]["text"] == "all is well"


def test_a_stream_whose_edge_breaks_ends_flagged(bundle: Bundle) -> None:
    def break_at_two(index: int) -> None:
        if index == 2:
            raise RuntimeError(SECRET_WORD)

    bundle.edge.before_token = break_at_two
    reply = bundle.chat("hi", stream=True)
    *chunks, done = read_sse(reply.text.splitlines())
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "all is"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert outcome(chunks[-1]["edgecascade"]) == ("edge", "chat", "edge_error", True)


def test_a_client_that_leaves_frees_the_edge(bundle: Bundle) -> None:
    bundle.edge.endless = True
    reply = bundle.client.post(CHAT, json={"messages": user("hi"), "stream": True, "max_tokens": 500}, buffered=False)
    stream = reply.iter_encoded()
    next(stream)
    next(stream)
    reply.close()
    wait_until(lambda: bundle.edge.closed == 1)
    assert bundle.edge.closed == 1


def test_a_refusal_of_a_tier_is_passed_on_in_the_callers_words(bundle: Bundle) -> None:
    reply = bundle.client.post("/", json={"text": "word " * 600})
    assert (reply.status_code, reply.json["error"]["param"]) == (400, "text")
    assert reply.json["error"]["code"] == "context_length_exceeded"
    assert bundle.chat("hi", model="device").json["error"]["param"] == "skill"


def test_killing_the_edge_in_the_middle_of_a_run_loses_no_answer(bundle: Bundle) -> None:
    """Two hundred requests, half of which need the edge; it dies after fifty and comes back after a hundred."""
    replies = []
    for number in range(200):
        if number == 50:
            bundle.stop_edge()
        if number == 100:
            bundle.start_edge()
            wait_until(lambda: not bundle.said("maybe", skill="assistant")["degraded"])
        replies.append(bundle.said("maybe hello" if number % 2 else "hello", skill="assistant"))
    assert [r["degraded"] for r in replies[:50]] == [False] * 50
    assert [r["degraded"] for r in replies[50:100]] == [False, True] * 25
    assert {r["reason"] for r in replies[50:100]} == {"confident", "edge_unavailable"}
    assert [r["degraded"] for r in replies[100:]] == [False] * 100


def test_the_cascade_counts_what_it_did(bundle: Bundle) -> None:
    for text in ("hello", "hello", "maybe hello"):
        bundle.said(text, skill="assistant")
    text = bundle.client.get("/metrics").text
    site = 'node_id="site-1"'
    assert f'edgecascade_requests_total{{model_version="device-1",{site},reason="confident",route="device"' in text
    assert 'edgecascade_escalations_total{model_version="edge-1"' in text
    assert 'edgecascade_network_seconds_bucket{le="0.08"' in text


# One tier at a time, played by raw bytes.


@pytest.fixture
def plays() -> Iterator[Callable[..., tuple[str, Peer]]]:
    with ExitStack() as stack:
        yield lambda part: stack.enter_context(listening(part))


ASK = Ask(Shape.CHAT, "auto", "assistant", (Message("user", "hi"),))


def edge_at(url: str, breaker: Breaker | None = None, timeout_s: float = 5) -> TierClient:
    return TierClient(Target("edge", f"{url}/function/edge", timeout_s), breaker)


def answer(client: TierClient, remaining_s: float = 1.0, traffic: Traffic | None = None) -> Happening:
    """What comes of one question; raises what went wrong."""
    call = client.ask(ASK, remaining_s, traffic or Traffic())
    ends = time.monotonic() + 10
    while not (told := list(call.news())):
        assert time.monotonic() < ends
        poll([call], ends, time.monotonic())
    if isinstance(told[-1], Exception):
        raise told[-1]
    return told[-1]


def failure_of(client: TierClient, remaining_s: float = 1.0, traffic: Traffic | None = None) -> TierFailedError:
    with pytest.raises(TierFailedError) as failure:
        answer(client, remaining_s, traffic)
    return failure.value


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (replying(500, b'{"error": {"message": "x"}}'), "edge_error"),
        (replying(503, b"no endpoints"), "edge_unavailable"),
        (replying(503, b'{"error": {"message": "x", "code": "not_ready"}}'), "edge_unavailable"),
        (replying(503, b'{"error": {"message": "x", "code": "deadline"}}'), "deadline"),
        (replying(502), "edge_unavailable"),
        (replying(404, b"404 page not found"), "edge_unavailable"),
        (replying(429, b'{"error": {"message": "x"}}'), "edge_busy"),
        (replying(200, b"<html>"), "edge_error"),
        (replying(200, b"[]"), "edge_error"),
        (replying(200, b'{"choices": []}'), "edge_error"),
        (replying(302, b"", "Location: http://elsewhere/"), "edge_error"),
    ],
)
def test_failures_have_a_reason(plays: Any, part: Any, reason: str) -> None:
    url, _ = plays(part)
    failure = failure_of(edge_at(url))
    assert (failure.reason, failure.retriable) == (reason, False)


def closing(connection: socket.socket, peer: Peer) -> None:
    peer.read(connection)


def half(connection: socket.socket, peer: Peer) -> None:
    peer.read(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


@pytest.mark.parametrize("part", [closing, half])
def test_a_broken_connection_may_be_tried_again(plays: Any, part: Any) -> None:
    url, _ = plays(part)
    failure = failure_of(edge_at(url))
    assert (failure.reason, failure.retriable) == ("edge_unavailable", True)


@pytest.mark.parametrize(
    ("remaining_s", "timeout_s", "reason"),
    [(0.05, 5, "deadline"), (1, 0.05, "edge_timeout"), (0, 5, "deadline"), (-1, 5, "deadline")],
)
def test_a_silent_tier_is_waited_for_as_long_as_it_may_take(
    plays: Any, remaining_s: float, timeout_s: float, reason: str
) -> None:
    url, _ = plays(silent)
    assert failure_of(edge_at(url, timeout_s=timeout_s), remaining_s).reason == reason


def test_nobody_there_is_a_tier_that_is_unavailable() -> None:
    for url in (f"http://127.0.0.1:{free_port()}", "http://no-such-host.invalid"):
        client = edge_at(url)
        failure = failure_of(client)
        assert (failure.reason, failure.retriable) == ("edge_unavailable", False)
        assert client.breaker.is_open


def test_a_refusal_keeps_status_and_field(plays: Any) -> None:
    error = {"message": "too long", "type": "x", "param": "messages", "code": "context_length_exceeded"}
    url, _ = plays(replying(400, json.dumps({"error": error}).encode()))
    with pytest.raises(RefusedError) as refusal:
        answer(edge_at(url))
    assert (refusal.value.status, refusal.value.param) == (400, "messages")


def test_the_tier_gets_less_time_than_is_left_and_our_limit_holds(plays: Any) -> None:
    url, peer = plays(replying(503))
    for remaining_s in (0.2, 60.0):
        failure_of(edge_at(url), remaining_s)
    granted = [re.search(rb"(?i)x-deadline-ms: ([\d.]+)", request) for request in peer.requests]
    short, capped = (float(found[1]) for found in granted if found)
    assert short == pytest.approx(190)
    assert capped == pytest.approx(4950)
    assert peer.paths == ["/function/edge" + CHAT] * 2


def health() -> Health:
    return Health("edge", 5.0, Breaker(lambda: True), clock=lambda: 0.0)


def test_a_tier_is_granted_what_its_way_back_leaves_of_the_time() -> None:
    known = health()
    assert known.granted_s(0.1) == pytest.approx(0.095), "as long as nothing is known"
    for took_s in (0.03, 0.05):
        for _ in range(5):
            known.answered("assistant", took_s, took_s - 0.012)
    assert known.granted_s(0.1) == pytest.approx(0.088)
    assert known.granted_s(0.02) == pytest.approx(0.01), "never less than half"


def test_a_tier_that_does_not_say_what_it_needed_tells_nothing_of_its_way_back() -> None:
    unknown = health()
    for worked_s in (0.0, -1.0, 9.0):
        for _ in range(9):
            unknown.answered("assistant", 0.05, worked_s)
    assert unknown.granted_s(0.1) == pytest.approx(0.095)


def test_connections_are_kept_and_one_that_was_closed_is_not_used_again(plays: Any) -> None:
    url, peer = plays(replying(500))
    client = edge_at(url)
    for _ in range(2):
        failure_of(client)
    assert peer.connections == 1

    def once(connection: socket.socket, peer: Peer) -> None:
        peer.read(connection)
        connection.sendall(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n")

    url, peer = plays(once)
    client = edge_at(url)
    for number in range(2):
        assert failure_of(client).reason == "edge_error"
        wait_until(lambda number=number: peer.closed == number + 1)
    assert peer.connections == 2


def test_a_refused_connection_opens_the_breaker_and_only_a_probe_closes_it(plays: Any) -> None:
    now, port = 0.0, free_port()
    url = f"http://127.0.0.1:{port}"
    breaker = Breaker(edge_at(url).probe, interval_s=1, clock=lambda: now, start=lambda work: work())
    client = edge_at(url, breaker)
    assert client.is_up()
    assert failure_of(client).reason == "edge_unavailable"
    assert [client.is_up() for _ in range(3)] == [False] * 3
    now = 1.0
    assert [client.is_up() for _ in range(3)] == [False] * 3, "the probe found nobody"
    with listening(replying(200, b"{}"), port) as (_, peer):
        assert [client.is_up() for _ in range(3)] == [False] * 3, "and is not sent again at once"
        now = 2.0
        assert [client.is_up(), client.is_up()] == [False, True]
        assert peer.paths == ["/function/edge/_/ready"]


def test_bytes_are_counted_with_headers(plays: Any) -> None:
    url, peer = plays(replying(503, b"x" * 1000))
    traffic = Traffic()
    failure_of(edge_at(url), traffic=traffic)
    assert traffic.sent == len(peer.requests[0])
    assert traffic.received == len("HTTP/1.1 503 X\r\nContent-Length: 1000\r\n\r\n") + 1000
    assert traffic.seconds > 0


def test_prompts_answers_and_keys_stay_out_of_logs_metrics_and_errors(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    """A canary goes through every route, answered and refused; it turns up in answers and error-free places only."""
    caplog.set_level("DEBUG", logger="functions")
    bundle.edge.says = f"{SECRET_WORD} {SECRET_WORD}"

    def fail(_index: int) -> None:
        raise RuntimeError(SECRET_WORD)

    errors = []
    for text in (SECRET_WORD, f"maybe {SECRET_WORD}", f"{SECRET_WORD} " * 600):
        for fields in ({"skill": "home"}, {}, {"skill": "home", "n": 2}, {"skill": SECRET_WORD}, {"temperature": text}):
            reply = bundle.chat(text, **fields)
            if reply.status_code != 200:
                errors.append(reply.text)
    errors.append(bundle.client.post(CHAT, data=f'{{"messages": "{SECRET_WORD}').text)
    bundle.edge.before_token = bundle.device.before_token = fail
    bundle.chat(f"maybe {SECRET_WORD}", skill="home")
    bundle.chat(SECRET_WORD)
    assert errors
    assert "RuntimeError" in caplog.text
    for place in (caplog.text, bundle.client.get("/metrics").text, *errors):
        assert SECRET_WORD not in place


def test_fields_of_a_flask_app_are_reachable_for_its_server() -> None:
    app: Flask = dispatcher_app("http://127.0.0.1:1", "http://127.0.0.1:2")
    drain = app.extensions["edgecascade"].drain
    client = app.test_client()
    assert client.get("/_/ready").status_code == 200
    drain.start()
    ready = client.get("/_/ready")
    assert (ready.status_code, ready.json) == (503, {"ready": False, "reason": "stopping"})
    assert client.get("/healthz").status_code == 200
