"""The tier functions: what they say, how they load, when they stop."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from functions.serving.ask import Ask, Clocked, Shape
from functions.serving.events import End, Piece
from functions.serving.settings import TierConfig
from functions.serving.tier_answer import Answerer
from functions.serving.tier_app import create_tier_app
from models.errors import AbandonedError, ArtifactError
from models.runtime.confidence import Confidence
from models.runtime.tier import Chat, Completion, SkillQuery, TierStats
from tests.fakes import FakeTier, card, read_sse, tier_app, user, wait_until


@pytest.fixture
def edge() -> FakeTier:
    return FakeTier(card("edge"))


@pytest.fixture
def client(edge: FakeTier) -> FlaskClient:
    return tier_app(edge).test_client()


def chat(client: FlaskClient, text: str = "how are you?", **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": user(text), **fields})


def test_a_skill_is_answered_with_a_frame_and_its_confidence(client: FlaskClient) -> None:
    reply = chat(client, "play some Björk", skill="home")
    body = reply.json
    assert json.loads(body["choices"][0]["message"]["content"]) == {
        "intent": "play_music",
        "slots": {"artist": "Björk"},
    }
    said = body["edgecascade"]
    assert said["frame"] == {"intent": "play_music", "slots": {"artist": "Björk"}}
    assert said["confidence"] == pytest.approx(0.9926, abs=1e-4)
    assert said["threshold"] == 0.8
    assert (said["source"], said["route"], said["reason"], said["degraded"]) == ("edge", "edge", "requested", False)
    assert (said["model_version"], said["node_id"]) == ("edge-1", "node-7")
    assert said["network_bytes"] == {"sent": 0, "received": 0}
    assert reply.headers["X-Edgecascade-Source"] == "edge"
    assert float(reply.headers["X-Edgecascade-Confidence"]) == pytest.approx(0.9926, abs=1e-4)
    assert "prefill;dur=" in reply.headers["Server-Timing"]


def test_the_reply_has_openais_fields(client: FlaskClient) -> None:
    body = chat(client).json
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake-edge"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "all is well", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def test_energy_is_modelled_from_the_cards_watts(client: FlaskClient) -> None:
    said = chat(client).json["edgecascade"]
    busy_s = (said["timing_ms"]["prefill"] + said["timing_ms"]["decode"]) / 1e3
    assert said["joules"]["value"] == pytest.approx(2.0 * busy_s)
    assert (said["joules"]["kind"], said["joules"]["source"]) == ("modelled", "a test")


def test_the_cards_watts_are_among_the_models_facts(client: FlaskClient) -> None:
    facts = client.get("/v1/models").json["data"][0]["edgecascade"]
    assert (facts["watts"], facts["watts_source"]) == (2.0, "a test")


def test_energy_is_unknown_without_watts() -> None:
    client = tier_app(FakeTier(card("edge", watts=None))).test_client()
    assert chat(client).json["edgecascade"]["joules"] is None


def test_a_tier_without_calibration_says_so() -> None:
    client = tier_app(FakeTier(card("edge", calibration={}))).test_client()
    said = chat(client, "hi", skill="assistant").json["edgecascade"]
    assert (said["confidence"], said["threshold"]) == (None, 1.0)


def test_sampling_reaches_the_tier_for_text_but_not_for_frames(client: FlaskClient, edge: FakeTier) -> None:
    wishes = {"max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["\n"]}
    assert chat(client, **wishes).json["choices"][0]["finish_reason"] == "length"
    assert chat(client, "play some music", skill="home", **wishes).json["edgecascade"]["frame"]["slots"]
    text, frame = edge.limits
    assert (text.max_tokens, text.temperature, text.top_p, text.seed, text.stop) == (2, 0.5, 0.9, 7, ("\n",))
    assert (frame.max_tokens, frame.temperature, frame.stop) == (512, 0.0, ())


def test_prompts_are_read_as_the_route_means_them(client: FlaskClient, edge: FakeTier) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "so?"}]},
    ]
    client.post("/v1/chat/completions", json={"messages": messages})
    client.post("/v1/completions", json={"prompt": "once upon"})
    client.post("/", data="play music", content_type="text/plain")
    assert edge.prompts == [
        Chat(({"role": "system", "content": "be brief"}, {"role": "user", "content": "how so?"})),
        Completion("once upon"),
        SkillQuery("assistant", "play music"),
    ]


@pytest.mark.parametrize("model", ["auto", "edge", "fake-edge"])
def test_the_tier_answers_to_its_names(client: FlaskClient, model: str) -> None:
    assert chat(client, model=model).status_code == 200


def test_chat_logprobs(client: FlaskClient) -> None:
    found = chat(client, logprobs=True, top_logprobs=2).json["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in found] == ["all", " is", " well"]
    assert found[0]["bytes"] == list(b"all")
    assert [rival["token"] for rival in found[0]["top_logprobs"]] == ["rival0", "rival1"]


def test_text_completion_with_logprobs(client: FlaskClient) -> None:
    body = client.post("/v1/completions", json={"prompt": "so", "logprobs": 1}).json
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "all is well"
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 3, 6]
    assert body["choices"][0]["logprobs"]["top_logprobs"][0] == {"rival0": -2.0}


def test_a_stream_has_role_text_end_usage_and_done(client: FlaskClient) -> None:
    reply = chat(client, stream=True, stream_options={"include_usage": True})
    assert reply.mimetype == "text/event-stream"
    assert reply.headers["X-Edgecascade-Source"] == "edge"
    *chunks, last, done = read_sse(reply.text.splitlines())
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "all is well"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[-1]["edgecascade"]["source"] == last["edgecascade"]["source"] == "edge"
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_without_usage_does_not_mention_it(client: FlaskClient) -> None:
    *chunks, _done = read_sse(chat(client, stream=True).text.splitlines())
    assert all("usage" not in chunk for chunk in chunks)
    assert "edgecascade" in chunks[-1]


def test_a_streamed_frame_names_the_intent_first(client: FlaskClient) -> None:
    *chunks, _done = read_sse(chat(client, "play some Björk", skill="home", stream=True).text.splitlines())
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert deltas[1] == '{"intent": "play_music", "slots": {'
    assert json.loads("".join(deltas)) == chunks[-1]["edgecascade"]["frame"]


def test_a_streamed_text_completion(client: FlaskClient) -> None:
    reply = client.post("/v1/completions", json={"prompt": "so", "stream": True, "logprobs": 0})
    *chunks, _done = read_sse(reply.text.splitlines())
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "all is well"
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[1:-1]]
    assert offsets == [[0], [3], [6]]


def test_a_break_in_mid_stream_is_an_error_event(edge: FakeTier, client: FlaskClient) -> None:
    def break_at_two(index: int) -> None:
        if index == 2:
            raise RuntimeError("a secret detail")

    edge.before_token = break_at_two
    *chunks, last = read_sse(chat(client, stream=True).text.splitlines())
    assert chunks[-1]["choices"][0]["delta"]["content"] == " is"
    assert last == {
        "error": {"message": "the answer broke off", "type": "server_error", "param": None, "code": "broken_off"}
    }
    assert chat(client, max_tokens=1).status_code == 200


def test_an_unexpected_error_is_a_500_that_tells_nothing(edge: FakeTier, client: FlaskClient) -> None:
    def fail(_index: int) -> None:
        raise RuntimeError("a secret detail")

    edge.before_token = fail
    reply = chat(client)
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.json["error"]["type"] == "server_error"


def answer(tier: FakeTier, ask: Ask, expires: float) -> tuple[str, End]:
    """Let a tier answer on a clock that ticks once a token; gives the text and the end."""
    now = 0.0

    def tick(_index: int) -> None:
        nonlocal now
        now += 1

    tier.before_token = tick
    answerer = Answerer(tier, Confidence.from_manifest(tier.card.calibration), "node-7", clock=lambda: now)
    events = list(answerer.events(ask, Clocked(started=0, expires=expires)))
    end = events[-1]
    assert isinstance(end, End)
    return "".join(event.text for event in events if isinstance(event, Piece)), end


def test_the_deadline_ends_the_decode_with_what_there_is(edge: FakeTier) -> None:
    edge.endless = True
    text, end = answer(edge, Ask(Shape.COMPLETION, "edge", "chat", prompt="so"), expires=5)
    assert text == "all is well all is"
    assert (end.finish_reason, end.report.degraded, end.report.reason) == ("length", True, "deadline")
    assert end.report.timing_ms.decode == 4000
    assert edge.closed == 1


def test_a_frame_that_is_settled_is_not_cut_short(edge: FakeTier) -> None:
    """What takes no more time is given whole; where the tier itself was short of time, the reply says so."""
    said = edge._frame(SkillQuery("home", "play some Björk"))
    edge._frame = lambda _query: (replace(token, settled=True, hurried=True) for token in said)  # type: ignore[method-assign]
    text, end = answer(edge, Ask(Shape.COMPLETION, "edge", "home", prompt="play some Björk"), expires=2)
    assert json.loads(text) == {"intent": "play_music", "slots": {"artist": "Björk"}}
    assert (end.finish_reason, end.report.degraded, end.report.reason) == ("stop", True, "deadline")
    assert end.report.confidence is not None


def test_a_frame_cut_short_is_still_json(edge: FakeTier) -> None:
    text, end = answer(edge, Ask(Shape.COMPLETION, "edge", "home", prompt="play some Björk"), expires=2)
    assert json.loads(text) == end.report.frame == {"intent": "play_music", "slots": {}}
    assert (end.report.confidence, end.report.degraded) == (None, True)


def test_a_client_that_leaves_frees_the_tier(edge: FakeTier, client: FlaskClient) -> None:
    edge.endless = True
    reply = client.post(
        "/v1/chat/completions", json={"messages": user("hi"), "stream": True, "max_tokens": 500}, buffered=False
    )
    stream: Iterator[bytes] = reply.iter_encoded()
    next(stream)
    next(stream)
    reply.close()
    assert edge.closed == 1
    assert chat(client).status_code == 200


def test_a_tier_that_cannot_chat_says_so() -> None:
    client = tier_app(FakeTier(card("device"))).test_client()
    reply = chat(client)
    assert reply.status_code == 422
    assert reply.json["error"]["param"] == "skill"
    assert "'assistant' or 'home'" in reply.json["error"]["message"]


def test_max_tokens_above_the_context_is_refused_for_text_only(client: FlaskClient) -> None:
    assert chat(client, max_tokens=600).json["error"]["param"] == "max_tokens"
    assert chat(client, skill="assistant", max_tokens=600).status_code == 200


def test_a_prompt_that_is_too_long_has_openais_code_and_the_callers_field(client: FlaskClient) -> None:
    text = "word " * 600
    for path, body, field in (
        ("/v1/chat/completions", {"messages": user(text)}, "messages"),
        ("/v1/completions", {"prompt": text}, "prompt"),
        ("/", {"text": text}, "text"),
    ):
        reply = client.post(path, json=body)
        assert reply.status_code == 400
        assert (reply.json["error"]["code"], reply.json["error"]["param"]) == ("context_length_exceeded", field)


def test_models_lists_the_tier(client: FlaskClient) -> None:
    (entry,) = client.get("/v1/models").json["data"]
    assert (entry["id"], entry["object"]) == ("edge", "model")
    facts = entry["edgecascade"]
    assert facts["skills"] == ["assistant", "home", "chat"]
    assert facts["thresholds"] == {"assistant": 0.8, "home": 0.8}
    assert facts["model_version"] == "edge-1"
    assert client.get("/v1/models/edge").json == entry
    assert client.get("/v1/models/gpt-4").json["error"]["param"] == "model"


def loading_app(load: Any) -> FlaskClient:
    return create_tier_app(TierConfig("device", "nowhere"), load).test_client()


def test_until_it_is_loaded_the_tier_asks_to_come_back() -> None:
    may_load = threading.Event()

    def load(_config: TierConfig) -> FakeTier:
        may_load.wait(20)
        return FakeTier()

    client = loading_app(load)
    assert client.get("/healthz").status_code == 200
    ready = client.get("/_/ready")
    assert (ready.status_code, ready.json) == (503, {"ready": False, "reason": "loading"})
    reply = chat(client, skill="assistant")
    assert (reply.status_code, reply.json["error"]["code"]) == (503, "not_ready")
    assert int(reply.headers["Retry-After"]) >= 1
    assert client.get("/v1/models").status_code == 503
    may_load.set()
    wait_until(lambda: client.get("/_/ready").status_code == 200)
    assert chat(client, skill="assistant").status_code == 200


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ArtifactError("manifest.json is missing; build the tier"), "manifest.json is missing; build the tier"),
        (RuntimeError("password=hunter2"), "RuntimeError"),
    ],
)
def test_a_tier_that_cannot_be_loaded_says_why(error: Exception, reason: str) -> None:
    def load(_config: TierConfig) -> FakeTier:
        raise error

    client = loading_app(load)
    wait_until(lambda: "failed" in client.get("/_/ready").json["reason"])
    ready = client.get("/_/ready")
    assert ready.status_code == 503
    assert reason in ready.json["reason"]
    assert "hunter2" not in ready.text
    assert client.get("/healthz").status_code == 200


def test_a_malformed_calibration_stops_the_loading() -> None:
    broken = card("device", calibration={"assistant": {"final": {"in_scope": {"bias": 1}}}})
    client = loading_app(lambda _config: FakeTier(broken))
    wait_until(lambda: "failed" in client.get("/_/ready").json["reason"])
    assert client.get("/_/ready").status_code == 503


def test_what_the_engine_counts_is_exported() -> None:
    tier = FakeTier(card("edge", provider="OpenVINO"))
    client = tier_app(tier).test_client()
    tier.counted = TierStats(100, 64, 3, 2048, passes=10, pass_tokens=25, pass_s=0.5)
    samples = {s.name: s for f in text_string_to_metric_families(client.get("/metrics").text) for s in f.samples}
    wanted = {
        "prefix_asked_tokens_total": 100,
        "prefix_reused_tokens_total": 64,
        "prefix_evicted_blocks_total": 3,
        "prefix_held_bytes": 2048,
        "passes_total": 10,
        "pass_tokens_total": 25,
        "pass_seconds_total": 0.5,
        "execution_provider": 1,
    }
    assert {name: samples[f"edgecascade_{name}"].value for name in wanted} == wanted
    labels = samples["edgecascade_execution_provider"].labels
    site = {"node_id": "node-7", "shard_id": "whole", "model_version": "edge-1"}
    assert labels == {**site, "provider": "OpenVINO"}
    assert client.get("/v1/models/edge").json["edgecascade"]["execution_provider"] == "OpenVINO"


def test_the_deadline_and_the_socket_reach_the_engine(client: FlaskClient, edge: FakeTier) -> None:
    before = time.monotonic()
    client.post("/v1/chat/completions", json={"messages": user("hi")}, headers={"X-Deadline-Ms": "5000"})
    chat(client, "play some music", skill="home", deadline_ms=60_000)
    text, frame = edge.limits
    assert before + 5 <= text.deadline <= time.monotonic() + 5
    assert frame.deadline >= text.deadline + 40
    assert text.gone is not None
    assert not text.gone()


def test_an_answer_that_nobody_waits_for_is_counted_and_not_logged_as_a_failure() -> None:
    def left(_index: int) -> None:
        raise AbandonedError("nobody waits for this answer any more")

    client = tier_app(FakeTier(card("edge"), before_token=left)).test_client()
    assert chat(client).status_code == 499
    assert 'code="client_left"' in client.get("/metrics").text
