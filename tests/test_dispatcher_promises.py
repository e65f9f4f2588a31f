"""The dispatcher's promises, over real sockets: in time, with what there is, within the battery, and private."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from functions.dispatcher.call import TierFailedError
from functions.dispatcher.exchange import Traffic
from functions.dispatcher.policy_file import PolicySource
from functions.dispatcher.power import PowerConfig
from functions.dispatcher.tier_client import Target, TierClient
from functions.serving.ask import Ask, Message, Shape
from tests.fakes import (
    CALIBRATION,
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
from tests.raw_peer import Peer, listening, silent

CHAT = "/v1/chat/completions"


def resetting(connection: socket.socket, peer: Peer) -> None:
    peer.read(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def garbage(connection: socket.socket, peer: Peer) -> None:
    peer.read(connection)
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n\xff\x00{{"\xfe<')


def nonsense(connection: socket.socket, peer: Peer) -> None:
    peer.read(connection)
    connection.sendall(b"\x00\x01\x02 not http at all\r\n\r\n")


def failing(connection: socket.socket, peer: Peer) -> None:
    while peer.read(connection):
        connection.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")


def full(connection: socket.socket, peer: Peer) -> None:
    while peer.read(connection):
        connection.sendall(b"HTTP/1.1 429 Busy\r\nContent-Length: 0\r\n\r\n")


def trickling(connection: socket.socket, peer: Peer) -> None:
    """A byte now and then: no single read takes long."""
    peer.read(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not peer.stopping.wait(0.02):
        connection.sendall(b"x")


FAULTS = [silent, resetting, garbage, nonsense, failing, full, trickling]


@pytest.fixture
def start() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def policy(**keys: Any) -> PolicySource:
    return PolicySource(overrides=tuple((key.replace("__", "."), value) for key, value in keys.items()))


def slow(seconds: float) -> Callable[[int], None]:
    return lambda _index: time.sleep(seconds)


def ask(client: FlaskClient, text: str = "hello", headers: dict[str, str] | None = None, **fields: Any) -> Any:
    reply = client.post(CHAT, json={"messages": user(text), "skill": "assistant", **fields}, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json["edgecascade"]


def outcome(said: dict[str, Any]) -> tuple[str, str, str, bool]:
    return said["source"], said["route"], said["reason"], said["degraded"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_an_edge_at_fault_costs_the_edge_alone(start: ExitStack, fault: Any) -> None:
    device_url = start.enter_context(served(tier_app(FakeTier(card("device")))))
    edge_url, _ = start.enter_context(listening(fault))
    client = dispatcher_app(device_url, edge_url).test_client()
    for _ in range(6):
        said = ask(client, "maybe hello", {"X-Deadline-Ms": "300"})
        assert (said["source"], said["route"], said["degraded"]) == ("device", "fallback", True)
        assert said["reason"] in {"deadline", "edge_unavailable", "edge_error", "edge_busy"}
        assert said["frame"] == {"intent": "greeting", "slots": {}}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_device_at_fault_leaves_an_answer_in_time(start: ExitStack, fault: Any) -> None:
    """Where it says that it cannot, the edge answers at once; where it says nothing, before time runs out."""
    device_url, _ = start.enter_context(listening(fault))
    edge_url = start.enter_context(served(tier_app(FakeTier(card("edge")))))
    client = dispatcher_app(device_url, edge_url).test_client()
    for _ in range(6):
        said = ask(client, "hello", {"X-Deadline-Ms": "300"})
        assert (said["source"], said["degraded"]) == ("edge", False)


def test_a_device_that_stops_in_the_middle_of_a_run_is_overtaken_then_left_alone(start: ExitStack) -> None:
    """Once its usual time is known nobody waits for the deadline any more."""
    stopped, device = threading.Event(), FakeTier(card("device"))
    device.before_token = lambda _index: wait_until(lambda: not stopped.is_set())
    device_url = start.enter_context(served(tier_app(device, max_inflight=64)))
    edge_url = start.enter_context(served(tier_app(FakeTier(card("edge")))))
    alone = policy(edge__early=False, edge__hedge=0)
    client = dispatcher_app(device_url, edge_url, policy=alone).test_client()
    for _ in range(20):
        assert ask(client)["source"] == "device"
        ask(client, "maybe")
    stopped.set()
    said = [ask(client, headers={"X-Deadline-Ms": "3000"}) for _ in range(12)]
    stopped.clear()
    assert {s["source"] for s in said} == {"edge"}
    assert not any(s["degraded"] for s in said)
    assert said[-1]["reason"] == "device_unavailable"
    assert {s["reason"] for s in said} >= {"device_timeout", "device_unavailable"}


def test_both_are_asked_at_once_where_one_after_the_other_is_too_late(start: ExitStack) -> None:
    device, edge = FakeTier(card("device")), FakeTier(card("edge"))
    device.before_token = edge.before_token = slow(0.06)
    device_url, edge_url = (start.enter_context(served(tier_app(tier))) for tier in (device, edge))
    client = dispatcher_app(device_url, edge_url).test_client()
    for _ in range(8):  # their times become known
        assert outcome(ask(client, "maybe")) == ("edge", "escalated", "low_confidence", False)
    said = [outcome(ask(client, "maybe", {"X-Deadline-Ms": "115"})) for _ in range(5)]
    assert {route for _, route, _, _ in said} & {"edge", "escalated"}, said


def test_the_loser_is_cut_off(start: ExitStack) -> None:
    """The device is confident while the edge still works: the edge's connection is closed at once."""
    device = FakeTier(card("device"))
    device.before_token = slow(0.03)
    body = {"messages": user("maybe"), "skill": "assistant"}
    said = tier_app(FakeTier(card("edge"))).test_client().post(CHAT, json=body).data
    hangs = threading.Event()

    def serve(connection: socket.socket, peer: Peer) -> None:
        while peer.read(connection):
            if not hangs.is_set():
                time.sleep(0.06)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))

    edge_url, edge = start.enter_context(listening(serve))
    device_url = start.enter_context(served(tier_app(device)))
    client = dispatcher_app(device_url, edge_url).test_client()
    for _ in range(8):
        assert ask(client, "maybe")["source"] == "edge"
    hangs.set()
    received = edge.received
    assert outcome(ask(client, "hello", {"X-Deadline-Ms": "85"})) == ("device", "device", "confident", False)
    assert edge.received > received, "both were asked"
    wait_until(lambda: edge.closed == edge.connections)


def test_a_broken_connection_is_tried_again_within_the_budget(start: ExitStack) -> None:
    device_url = start.enter_context(served(tier_app(FakeTier(card("device")))))
    edge_url, peer = start.enter_context(listening(resetting))
    client = dispatcher_app(device_url, edge_url, policy=policy(retry_budget=0.1)).test_client()
    for _ in range(60):
        assert ask(client, "maybe hello")["reason"] == "edge_unavailable"
    assert peer.connections <= 1.1 * 60 + 3


def test_deadlines_by_class(start: ExitStack) -> None:
    device_url, _ = start.enter_context(listening(silent))
    source = policy(deadline_ms={"voice": 80.0})
    client = dispatcher_app(device_url, f"http://127.0.0.1:{free_port()}", policy=source).test_client()
    assert outcome(ask(client, headers={"X-Deadline-Class": "voice"})) == ("canned", "fallback", "deadline", True)
    reply = client.post(CHAT, json={"messages": user("hi")}, headers={"X-Deadline-Class": "opera"})
    assert (reply.status_code, reply.json["error"]["param"]) == (422, "X-Deadline-Class")


@pytest.mark.parametrize("level", ["nan", "-1", "100.1", "inf", "full", "1e9"])
def test_a_bad_battery_level_is_refused_by_name(level: str) -> None:
    client = dispatcher_app("http://127.0.0.1:1", "http://127.0.0.1:2").test_client()
    reply = client.post(CHAT, json={"messages": user("hi")}, headers={"X-Battery-Level": level})
    assert (reply.status_code, reply.json["error"]["param"]) == (422, "X-Battery-Level")


@pytest.mark.parametrize(("level", "asked"), [("0.02", False), ("3", False), ("0.5", True), ("60", True), ("1", True)])
def test_with_a_critical_battery_no_model_is_asked(start: ExitStack, level: str, asked: bool) -> None:
    device, edge = FakeTier(card("device")), FakeTier(card("edge"))
    device_url, edge_url = (start.enter_context(served(tier_app(tier))) for tier in (device, edge))
    client = dispatcher_app(device_url, edge_url).test_client()
    for fields in ({}, {"skill": "chat"}, {"model": "edge"}):
        said = ask(client, "maybe hello", {"X-Battery-Level": level}, **fields)
        assert asked or outcome(said) == ("canned", "fallback", "battery", True)
    assert bool(device.prompts or edge.prompts) is asked


def test_with_a_low_battery_answers_are_shorter(start: ExitStack) -> None:
    edge = FakeTier(card("edge"), endless=True)
    device_url, edge_url = (start.enter_context(served(tier_app(t))) for t in (FakeTier(card("device")), edge))
    client = dispatcher_app(device_url, edge_url, policy=policy(save__max_tokens=5)).test_client()
    for level, most in (("0.15", 5), ("0.9", 9)):
        ask(client, skill="chat", max_tokens=9, headers={"X-Battery-Level": level})
        assert edge.limits[-1].max_tokens == most


@pytest.mark.parametrize("stream", [False, True])
def test_a_running_answer_ends_when_the_battery_turns_critical(start: ExitStack, tmp_path: Path, stream: bool) -> None:
    level = tmp_path / "level"
    level.write_text("0.9")
    edge = FakeTier(card("edge"), endless=True)
    second = threading.Event()

    def before_token(index: int) -> None:
        if index == 2:
            second.set()
        time.sleep(0.01)

    edge.before_token = before_token
    device_url, edge_url = (start.enter_context(served(tier_app(t))) for t in (FakeTier(card("device")), edge))
    power = PowerConfig(sources=("file",), interval_s=0.05, file=level)
    client = dispatcher_app(device_url, edge_url, power=power).test_client()
    threading.Thread(target=lambda: second.wait(10) and level.write_text("0.01"), daemon=True).start()
    reply = client.post(CHAT, json={"messages": user("hi"), "stream": stream, "max_tokens": 100})
    said = read_sse(reply.text.splitlines())[-2]["edgecascade"] if stream else reply.json["edgecascade"]
    assert (said["reason"], said["degraded"]) == ("battery", True)
    assert said["source"] == ("edge" if stream else "canned")
    wait_until(lambda: edge.closed == 1)


@pytest.mark.parametrize("fault", [None, *FAULTS], ids=lambda fault: getattr(fault, "__name__", "down"))
@pytest.mark.parametrize("by", ["header", "field", "policy"])
def test_local_only_sends_not_one_byte_to_the_edge(start: ExitStack, fault: Any, by: str) -> None:
    """Whatever the device does, and whatever is asked for."""
    device_url = f"http://127.0.0.1:{free_port()}"
    if fault is not None:
        device_url, _ = start.enter_context(listening(fault))
    edge_url, edge = start.enter_context(listening(silent))
    skills = ["assistant", "home", "chat"] if by == "policy" else []
    source = policy(local_only_skills=skills, edge__hedge=1.0)
    client = dispatcher_app(device_url, edge_url, policy=source).test_client()
    headers = {"X-Data-Class": "local-only"} if by == "header" else {}
    marked = {"local_only": True} if by == "field" else {}
    for fields in (
        {"skill": "assistant"},
        {"skill": "home", "out_of_scope": "chat"},
        {"skill": "assistant", "model": "edge"},
        {"skill": "chat"},
        {"skill": "chat", "model": "edge", "stream": True},
        {"skill": "assistant", "confidence_threshold": 1.0},
    ):
        body = {"messages": user("nonsense maybe"), **marked, **fields}
        assert client.post(CHAT, json=body, headers={"X-Deadline-Ms": "60", **headers}).status_code == 200
    assert (edge.received, edge.connections) == (0, 0)


def test_local_only_sends_no_probe_either(start: ExitStack) -> None:
    """The edge is left alone after failures; whoever may ask it would have it probed."""
    device_url = start.enter_context(served(tier_app(FakeTier(card("device")))))
    edge_url, edge = start.enter_context(listening(resetting))
    client = dispatcher_app(device_url, edge_url, policy=policy(local_only_skills=["home"])).test_client()
    for _ in range(6):
        ask(client, "maybe hello")
    wait_until(lambda: ask(client, "maybe hello")["reason"] == "edge_unavailable")
    time.sleep(0.6)  # a probe is due
    received, connections = edge.received, edge.connections
    ask(client, "maybe hello", {"X-Data-Class": "local-only"})
    ask(client, "maybe hello", skill="home")
    time.sleep(0.05)
    assert (edge.received, edge.connections) == (received, connections)


def test_local_only_sends_nothing_while_the_device_is_slow_and_hedging_is_free(start: ExitStack) -> None:
    device = FakeTier(card("device"))
    device_url = start.enter_context(served(tier_app(device)))
    edge_url, edge = start.enter_context(listening(silent))
    client = dispatcher_app(device_url, edge_url, policy=policy(edge__hedge=1.0)).test_client()
    for _ in range(20):
        ask(client, "hello maybe", {"X-Data-Class": "local-only"})
    device.before_token = slow(0.08)
    for _ in range(3):
        said = ask(client, "hello maybe", {"X-Data-Class": "local-only", "X-Deadline-Ms": "120"})
        assert said["network_bytes"] == {"sent": 0, "received": 0}
    assert (edge.received, edge.connections) == (0, 0)


FORECAST = {**CALIBRATION["home"], "forecast": CALIBRATION["home"]["final"]}


@pytest.mark.parametrize(("text", "edge_asked"), [("hello maybe jazz", True), ("hello some jazz", False)])
def test_a_poor_forecast_starts_the_edge_while_the_device_decodes(
    start: ExitStack, text: str, edge_asked: bool
) -> None:
    """The device ends only once the edge was asked, or, where its forecast is good, at its usual pace."""
    device, edge = FakeTier(card("device", calibration={"home": FORECAST})), FakeTier(card("edge"))
    device_url, edge_url = (start.enter_context(served(tier_app(t))) for t in (device, edge))
    client = dispatcher_app(device_url, edge_url, policy=policy(edge__hedge=0.0)).test_client()
    device.before_token = edge.before_token = slow(0.05)  # four tokens each
    for _ in range(8):
        ask(client, "hello maybe jazz", skill="home")
    edge.prompts.clear()
    # One after the other takes 400 ms: no reason to ask both from the start, but to look at the forecast.
    said = ask(client, text, {"X-Deadline-Ms": "600"}, skill="home")
    assert bool(edge.prompts) is edge_asked
    assert said["reason"] in ({"low_confidence", "faster"} if edge_asked else {"confident"})
    assert not said["degraded"]


def streamed(client: FlaskClient, text: str, **fields: Any) -> list[Any]:
    reply = client.post(CHAT, json={"messages": user(text), "skill": "home", "stream": True, **fields})
    *chunks, done = read_sse(reply.text.splitlines())
    assert done == "[DONE]"
    return chunks


def content(chunks: list[Any]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize(
    ("mode", "text", "source", "switches"),
    [
        ("hold", "hello maybe", "edge", 0),
        ("hold", "hello jazz", "device", 0),
        ("event", "hello maybe", "edge", 1),
        ("event", "hello jazz", "device", 0),
    ],
)
def test_nothing_that_was_streamed_is_contradicted(
    start: ExitStack, mode: str, text: str, source: str, switches: int
) -> None:
    tiers = FakeTier(card("device")), FakeTier(card("edge"))
    device_url, edge_url = (start.enter_context(served(tier_app(tier))) for tier in tiers)
    client = dispatcher_app(device_url, edge_url, policy=policy(stream__on_escalation=mode)).test_client()
    chunks = streamed(client, text)
    switched = [n for n, chunk in enumerate(chunks) if (chunk.get("edgecascade") or {}).get("replaces")]
    assert len(switched) == switches
    if switches:
        assert chunks[switched[0]]["edgecascade"]["replaces"] == "device"
        assert content(chunks[: switched[0]]), "the device's pieces came before"
        chunks = chunks[switched[0] + 1 :]
    assert json.loads(content(chunks)) == chunks[-1]["edgecascade"]["frame"]
    assert chunks[-1]["edgecascade"]["source"] == source
    assert chunks[-1]["edgecascade"]["route"] == ("device" if source == "device" else "escalated")


def test_the_devices_pieces_are_shown_as_they_come(start: ExitStack) -> None:
    """The device gives its last token only after the client has the first piece."""
    seen, device = threading.Event(), FakeTier(card("device"))
    device.before_token = lambda index: None if index == 0 else wait_until(seen.is_set)
    device_url = start.enter_context(served(tier_app(device)))
    source = policy(stream__on_escalation="event")
    client = dispatcher_app(device_url, f"http://127.0.0.1:{free_port()}", policy=source).test_client()
    reply = client.post(CHAT, json={"messages": user("a b"), "skill": "home", "stream": True}, buffered=False)
    pieces = reply.iter_encoded()
    next(pieces)
    assert b"intent" in next(pieces)
    seen.set()
    assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_a_question_for_which_no_time_is_left_fails_in_time_and_leaves_no_connection(start: ExitStack) -> None:
    url, peer = start.enter_context(listening(silent))
    client = TierClient(Target("device", url, 5.0))
    ask = Ask(Shape.CHAT, "device", "assistant", messages=(Message("user", "hello"),))
    with pytest.raises(TierFailedError) as failure:
        client.ask(ask, -0.01, Traffic())
    assert failure.value.reason == "deadline"
    assert peer.connections == 0


def test_above_the_latency_ceiling_canned_messages_answer_but_for_probes(start: ExitStack) -> None:
    device, edge = FakeTier(card("device")), FakeTier(card("edge"))
    device.before_token = slow(0.05)
    urls = (start.enter_context(served(tier_app(tier))) for tier in (device, edge))
    client = dispatcher_app(*urls, policy=policy(latency__canned_above_ms=20)).test_client()
    first = [outcome(ask(client)) for _ in range(5)]
    assert {source for source, *_ in first} == {"device"}
    after = [outcome(ask(client)) for _ in range(4)]
    assert after == [("canned", "fallback", "latency", True)] * 4
