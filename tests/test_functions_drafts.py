"""A draft on its way: from the request to the tier, and what came of it back to the caller."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from functions.dispatcher.wire import read_reply, request_body
from functions.serving import parse
from functions.serving.ask import Ask
from functions.serving.events import Draft
from functions.serving.schema import MAX_DRAFT
from functions.serving.settings import ConfigError, TierConfig
from models.runtime.tier import TierStats
from tests.fakes import FakeTier, card, dispatcher_app, read_sse, served, tier_app, user

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
DRAFT = "all is lost"


@pytest.fixture
def edge() -> FakeTier:
    return FakeTier(card("edge"), counted=TierStats(draft_proposed_tokens=9, draft_accepted_tokens=7))


@pytest.fixture
def client(edge: FakeTier) -> FlaskClient:
    return tier_app(edge).test_client()


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"messages": user("how are you?"), **fields}


def asked(**fields: Any) -> Ask:
    return parse.chat(chat_body(**fields), parse.HeaderFields())


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body()), (TEXT, {"prompt": "how are you?"})])
def test_the_tier_gets_the_draft_and_says_what_came_of_it(
    client: FlaskClient, edge: FakeTier, path: str, body: dict[str, Any]
) -> None:
    reply = client.post(path, json={**body, "edgecascade_draft": DRAFT}).json
    assert reply["edgecascade"]["draft"] == {"proposed": 3, "accepted": 2, "ignored": False}
    assert edge.limits[-1].draft == DRAFT
    assert client.post(path, json=body).json["edgecascade"]["draft"] is None
    assert edge.limits[-1].draft == ""


def test_a_stream_says_so_too(client: FlaskClient) -> None:
    reply = client.post(CHAT, json=chat_body(stream=True, edgecascade_draft=DRAFT))
    events = [event for event in read_sse(iter(reply.text.splitlines())) if event != "[DONE]"]
    assert [e["edgecascade"]["draft"] for e in events if e.get("edgecascade")][-1]["accepted"] == 2


def test_a_skill_makes_nothing_of_a_draft_and_says_so(client: FlaskClient, edge: FakeTier) -> None:
    reply = client.post(CHAT, json=chat_body(skill="assistant", edgecascade_draft=DRAFT)).json
    assert reply["edgecascade"]["draft"] == {"proposed": 0, "accepted": 0, "ignored": True}
    assert edge.limits[-1].draft == ""


def test_drafts_are_counted(client: FlaskClient) -> None:
    metrics = client.get("/metrics").text
    found = {line.split("{")[0]: line.split()[-1] for line in metrics.splitlines() if "_draft_" in line}
    assert found["edgecascade_draft_proposed_tokens_total"] == "9.0"
    assert found["edgecascade_draft_accepted_tokens_total"] == "7.0"


def test_the_field_is_documented(client: FlaskClient) -> None:
    schemas = client.get("/openapi.json").json["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        assert "edgecascade_draft" in schemas[name]["properties"]
    assert set(schemas["Draft"]["properties"]) == {"proposed", "accepted", "ignored"}


def test_the_dispatcher_sends_a_draft_and_reads_the_report(client: FlaskClient) -> None:
    ask = asked()
    body = request_body(ask, "edge", stream=False, draft=DRAFT)
    reply = read_reply(ask, client.post(CHAT, json=body).json)
    assert reply.report.draft == Draft(proposed=3, accepted=2)
    assert "edgecascade_draft" not in request_body(ask, "edge", stream=False)


def test_a_tier_s_answer_goes_before_the_caller_s_draft_and_is_cut_to_length() -> None:
    ask = asked(edgecascade_draft="mine")
    assert request_body(ask, "edge", stream=False)["edgecascade_draft"] == "mine"
    assert request_body(ask, "edge", stream=False, draft="x" * 20_000)["edgecascade_draft"] == "x" * MAX_DRAFT


def test_a_caller_s_draft_reaches_the_edge_through_the_dispatcher(edge: FakeTier) -> None:
    with served(tier_app(FakeTier())) as device_url, served(tier_app(edge)) as edge_url:
        client = dispatcher_app(device_url, edge_url).test_client()
        reply = client.post(CHAT, json=chat_body(edgecascade_draft=DRAFT)).json
    assert edge.limits[-1].draft == DRAFT
    assert reply["edgecascade"]["draft"]["accepted"] == 2


def test_settings_of_reading_ahead() -> None:
    read = TierConfig.from_environment({"MODEL_PATH": "x", "LOOKUP_TOKENS": "4", "EXACT_DRAFTS": "1"}, "edge")
    assert (read.lookup_tokens, read.exact_drafts) == (4, True)
    default = TierConfig.from_environment({"MODEL_PATH": "x"}, "edge")
    assert (default.lookup_tokens, default.exact_drafts) == (0, False)
    for key, value in (("LOOKUP_TOKENS", "17"), ("EXACT_DRAFTS", "yes"), ("LOOKUP_TOKEN", "1")):
        with pytest.raises(ConfigError, match=key):
            TierConfig.from_environment({"MODEL_PATH": "x", key: value}, "edge")
