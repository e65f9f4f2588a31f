"""The federation between real loopback functions with fake tiers in them, and nodes that misbehave."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient

from functions.federation.app import PARTS
from functions.federation.federate import Federation
from functions.federation.loop import Loop
from functions.federation.nodes import NodeFailedError, NodeReply, read_reply
from functions.serving.ask import Ask, Clocked, Message, Shape
from functions.serving.errors import ClientLeftError
from functions.serving.events import NetworkBytes
from functions.serving.replies import ModelFacts
from models.skills import Skill, SkillSet
from tests.fakes import SECRET_WORD, FakeTier, card, federated, free_port, read_sse, served, tier_app, user, wait_until

CHAT = "/v1/chat/completions"
LIES = SkillSet((Skill("assistant", ("weather",)), Skill("home", ("stop", "play_music"), {"play_music": ("artist",)})))


def liar() -> FakeTier:
    return FakeTier(card("device", skills=LIES))


@contextmanager
def voting(*tiers: FakeTier | str, **changes: Any) -> Iterator[FlaskClient]:
    """A federation of tiers; a text is the address of a node that is no tier of ours."""
    with ExitStack() as stack:
        urls = [t if isinstance(t, str) else stack.enter_context(served(tier_app(t))) for t in tiers]
        nodes = {f"node-{number}": url for number, url in enumerate(urls)}
        yield stack.enter_context(federated(nodes, **changes)).test_client()


@contextmanager
def silent_node() -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """A node that takes a request and never answers; tells that it was asked, and that the caller hung up."""
    asked, left, ended = threading.Event(), threading.Event(), threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(30)
                if connection.recv(65_536):
                    asked.set()
                    with suppress(ConnectionError):
                        while connection.recv(65_536):
                            pass
                    left.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked, left
        ended.set()
        thread.join()


def odd_node(reply: Callable[[], Response]) -> Flask:
    """A node that says what it is told to."""
    app = Flask("odd")
    app.post(CHAT)(reply)
    return app


def ask(client: FlaskClient, text: str = "hello", **fields: Any) -> Any:
    return client.post(CHAT, json={"messages": user(text), "skill": "assistant", **fields})


def said(client: FlaskClient, text: str = "hello", **fields: Any) -> dict[str, Any]:
    reply = ask(client, text, **fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json["edgecascade"]
    return found


def series(client: FlaskClient, name: str) -> dict[str, float]:
    """The values of a metric by its labels, the site's left out."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name + "{")]
    site = 'model_version="none",node_id="site-2",shard_id="whole"'
    pairs = [line.removeprefix(name + "{").rsplit(" ", 1) for line in lines]
    labels = [",".join(sorted(part for part in head.rstrip("}").split(",") if part not in site)) for head, _ in pairs]
    return {label.replace('"', ""): float(value) for label, (_, value) in zip(labels, pairs, strict=True)}


def test_nodes_that_agree_answer_as_one() -> None:
    with voting(FakeTier(), FakeTier(), FakeTier()) as client:
        reply = ask(client)
        report = reply.json["edgecascade"]
    assert (report["source"], report["route"], report["degraded"]) == ("federation", "federation", False)
    assert report["reason"] in {"decided", "all_voted"}
    assert report["frame"] == {"intent": "greeting", "slots": {}}
    assert json.loads(reply.json["choices"][0]["message"]["content"]) == report["frame"]
    assert report["confidence"] == pytest.approx(1 / (1 + math.exp(-4.9)), abs=1e-3)
    assert (report["node_id"], report["model_version"]) == ("site-2", "device-1")
    assert report["network_bytes"]["sent"] > 200
    assert report["network_bytes"]["received"] > 500
    assert report["joules"]["value"] >= 0
    assert report["timing_ms"]["total"] >= report["timing_ms"]["network"] > 0
    assert reply.headers["X-Edgecascade-Votes"] in {"2/3", "3/3"}


def test_one_liar_is_outvoted_and_loses_its_weight() -> None:
    with voting(FakeTier(), liar(), FakeTier(), FakeTier()) as client:
        for _ in range(20):
            assert said(client)["frame"]["intent"] == "greeting"
        trusted = series(client, "edgecascade_vote_reliability")
        votes = series(client, "edgecascade_votes_total")
    assert trusted["peer=node-1"] < min(trusted["peer=node-0"], trusted["peer=node-2"], trusted["peer=node-3"])
    assert sum(votes.values()) == 80


def test_slots_are_voted_one_by_one() -> None:
    with voting(FakeTier(), FakeTier(), liar()) as client:
        report = said(client, "play abba", skill="home")
    assert report["frame"] == {"intent": "play_music", "slots": {"artist": "abba"}}


def test_it_is_decided_without_a_node_that_says_nothing_and_that_node_is_let_go() -> None:
    with silent_node() as (url, asked, left), voting(FakeTier(), url, FakeTier()) as client:
        reply = ask(client)
        report = reply.json["edgecascade"]
        assert (report["reason"], report["degraded"]) == ("decided", False)
        assert reply.headers["X-Edgecascade-Votes"] == "2/3"
        assert left.wait(30) or not asked.is_set(), "its connection was closed"
        assert series(client, "edgecascade_votes_total")["outcome=cut_short,peer=node-1"] == 1


def test_at_the_deadline_the_best_so_far_is_returned_and_flagged() -> None:
    with silent_node() as (url, _, left), voting(FakeTier(), url, liar()) as client:
        report = said(client, deadline_ms=400)
        assert (report["reason"], report["degraded"]) == ("deadline", True)
        assert report["frame"]["intent"] in {"greeting", "weather"}
        assert left.wait(30)
        assert series(client, "edgecascade_votes_total")["outcome=late,peer=node-1"] == 1
        assert series(client, "edgecascade_vote_reliability")["peer=node-1"] < 0.7


def test_below_the_quorum_the_answer_says_so() -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with voting(FakeTier(), dead, dead) as client:
        report = said(client)
    assert (report["reason"], report["degraded"]) == ("no_quorum", True)
    assert report["frame"]["intent"] == "greeting"


def test_a_quorum_of_one_takes_what_it_gets() -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with voting(FakeTier(), dead, quorum=1) as client:
        assert said(client)["degraded"] is False


def test_nobody_there() -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with voting(dead, dead) as client:
        reply = ask(client)
        models = client.get("/v1/models").json["data"]
    assert (reply.status_code, reply.json["error"]["code"]) == (503, "no_votes")
    assert reply.headers["Retry-After"]
    assert [entry["edgecascade"]["available"] for entry in models] == [False, False]


def test_what_every_node_refuses_is_refused() -> None:
    with voting(FakeTier(), FakeTier()) as client:
        reply = ask(client, skill="astrology")
    assert (reply.status_code, reply.json["error"]["param"]) == (422, "skill")


def test_a_full_node_is_none_that_lies() -> None:
    full = odd_node(lambda: Response('{"error": {"message": "full"}}', status=429))
    with served(full) as url, voting(FakeTier(), FakeTier(), url, quorum=3) as client:
        assert said(client)["reason"] == "no_quorum"
        assert series(client, "edgecascade_votes_total")["outcome=busy,peer=node-2"] == 1


def test_a_gateway_that_lost_its_function_speaks_for_no_node() -> None:
    lost = odd_node(
        lambda: Response('{"error": {"message": "no such function"}}', 404, {"X-OpenFaaS-Internal": "gateway"})
    )
    with served(lost) as url, voting(url, url) as client:
        assert ask(client).json["error"]["code"] == "no_votes"


GOOD = {
    "model": "m",
    "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
    "usage": {},
    "edgecascade": {"source": "device", "route": "device", "reason": "first", "frame": {"intent": "a", "slots": {}}},
}


def with_report(**fields: Any) -> str:
    return json.dumps({**GOOD, "edgecascade": {**GOOD["edgecascade"], **fields}})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("garbage", "malformed"),
        ("null", "malformed"),
        ("[]", "malformed"),
        ("{}", "malformed"),
        ('{"choices": []}', "malformed"),
        (with_report(confidence=math.nan), "malformed"),
        (with_report(confidence=7), "malformed"),
        (with_report(confidence="sure"), "malformed"),
        (with_report(frame={"intent": 3}), "malformed"),
        (with_report(frame={"intent": "a", "slots": [1]}), "malformed"),
        (with_report(degraded=True), "degraded"),
        ('{"x": "' + "y" * (5 << 20) + '"}', "malformed"),
    ],
)
def test_what_is_no_vote_is_not_counted(body: str, outcome: str) -> None:
    with served(odd_node(lambda: Response(body))) as url, voting(FakeTier(), FakeTier(), url, quorum=3) as client:
        report = said(client)
        assert (report["reason"], report["frame"]["intent"]) == ("no_quorum", "greeting")
        assert series(client, "edgecascade_votes_total")[f"outcome={outcome},peer=node-2"] == 1
        assert series(client, "edgecascade_vote_reliability")["peer=node-2"] < 0.8


def test_a_frame_of_another_shape_is_one_more_opinion() -> None:
    odd = with_report(frame={"intent": "greeting", "slots": {"who": ["me", {"and": "you"}]}}, confidence=1.0)
    text = with_report(frame=None, confidence=1.0)
    with (
        served(odd_node(lambda: Response(odd))) as one,
        served(odd_node(lambda: Response(text))) as two,
        voting(FakeTier(), one, two, FakeTier(), quorum=4) as client,
    ):
        report = said(client)
    assert report["frame"] == {"intent": "greeting", "slots": {}}
    assert report["reason"] == "all_voted"


def test_local_only_is_refused_and_no_byte_leaves() -> None:
    with silent_node() as (url, asked, _), voting(url) as client:
        for local in (
            {"json": {"messages": user("hi"), "local_only": True}},
            {"headers": {"X-Data-Class": "local-only"}},
        ):
            reply = client.post(CHAT, **{"json": {"messages": user("hi")}, **local})
            assert (reply.status_code, reply.json["error"]["code"]) == (403, "local_only")
        reply = client.post("/", data=b"hi", headers={"X-Data-Class": "local-only"})
        assert reply.status_code == 403
        assert not asked.is_set()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"skill": "chat", "response_format": {"type": "json_object"}}, "response_format"),
        ({"skill": "chat", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_what_has_no_vote_is_refused(fields: dict[str, Any], param: str) -> None:
    with voting(FakeTier()) as client:
        reply = ask(client, **fields)
    assert (reply.status_code, reply.json["error"]["param"]) == (422, param)


def test_chats_vote_to_the_letter() -> None:
    tiers = [FakeTier(card("edge"), says=text) for text in ("all is well", "all is lost", "all is well")]
    with voting(*tiers) as client:
        reply = ask(client, skill="chat")
        text = client.post("/v1/completions", json={"prompt": "how is it?"}).json["choices"][0]["text"]
    assert reply.json["choices"][0]["message"]["content"] == "all is well" == text
    assert reply.json["edgecascade"]["confidence"] is None


def test_it_streams_in_one_piece() -> None:
    with voting(FakeTier(), FakeTier()) as client:
        events = read_sse(iter(ask(client, stream=True).text.splitlines()))
    assert events[-1] == "[DONE]"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]).startswith('{"intent"')
    assert events[-2]["edgecascade"]["source"] == "federation"


def test_it_lists_what_its_nodes_can() -> None:
    with voting(FakeTier(card("edge")), FakeTier()) as client:
        data = client.get("/v1/models").json["data"]
    assert [entry["id"] for entry in data] == ["auto", "federation"]
    assert data[1]["edgecascade"]["skills"] == ["assistant", "home", "chat"]
    assert data[1]["edgecascade"]["model_version"] == "edge-1,device-1"


def test_nothing_said_is_logged_or_measured(caplog: pytest.LogCaptureFixture) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with served(odd_node(lambda: Response("garbage"))) as url, voting(FakeTier(), dead, url) as client:
        said(client, SECRET_WORD)
        assert SECRET_WORD not in client.get("/metrics").text
    assert SECRET_WORD not in caplog.text


@dataclass
class Sleeper:
    """A node that never answers, and notes that it was cancelled."""

    name: str = "sleeper"
    asked: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    async def ask(self, ask: Ask, remaining_s: float) -> NodeReply:
        self.asked.set()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise NodeFailedError("awake")

    async def describe(self) -> ModelFacts | None:
        return None


async def nothing() -> None:
    """Nothing to close."""


def test_when_the_caller_leaves_the_nodes_are_let_go() -> None:
    loop, node = Loop(), Sleeper()
    loop.start()
    federation = Federation((node,), 1, "here", loop)
    now = time.monotonic()
    question = Ask(Shape.CHAT, "auto", "assistant", (Message("user", "hi"),))
    with pytest.raises(ClientLeftError):
        federation.events(question, Clocked(now, now + 600, gone=node.asked.is_set))
    assert node.cancelled.wait(30)
    loop.stop(nothing)


def test_the_end_of_the_function_ends_what_runs() -> None:
    with voting(FakeTier()) as client:
        assert said(client)
        parts = client.application.extensions[PARTS]
    wait_until(lambda: "federation" not in {t.name for t in threading.enumerate() if t is parts.loop._thread})


def test_a_reply_is_read_as_a_vote() -> None:
    question = Ask(Shape.CHAT, "auto", "assistant", (Message("user", "hi"),))
    reply = read_reply("n", question, GOOD, NetworkBytes())
    assert (reply.ballot.node, reply.ballot.confidence, reply.text) == ("n", None, "x")
