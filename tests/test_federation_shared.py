"""The shared log over HTTP, between nodes, with the servers it leans on alive and dead."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from functions.federation.announce import MqttAnnouncer
from functions.federation.state.log import Bounds
from functions.serving.settings import ConfigError
from tests.fakes import SECRET_WORD, federated, free_port, wait_until
from tests.servers import Broker, RedisServer

EVENTS = "/v1/state/events"
NODES = {"near": "http://127.0.0.1:1"}


@pytest.fixture
def client() -> Iterator[FlaskClient]:
    with federated(NODES, bounds=Bounds(max_events=50)) as app:
        yield app.test_client()


def event(name: str, conversation: str = "tour", **fields: Any) -> dict[str, Any]:
    return {"id": name, "conversation": conversation, "kind": "fact", "body": {"door": "open"}, **fields}


def read(client: FlaskClient, after: int = 0, **query: Any) -> dict[str, Any]:
    reply = client.get(EVENTS, query_string={"after": after, **query})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json
    return found


def ids(page: dict[str, Any]) -> list[str]:
    return [one["id"] for one in page["events"]]


def test_append_and_read_on(client: FlaskClient) -> None:
    first = client.post(EVENTS, json=event("a")).json
    assert (first["sequence"], first["new"], first["node"], first["body"]) == (1, True, "site-2", {"door": "open"})
    assert client.post(EVENTS, json=event("a")).json == {**first, "new": False}
    client.post(EVENTS, json=event("b", "other", kind="turn", body={"role": "user", "content": "hi"}))
    page = read(client)
    assert page == {"events": page["events"], "upto": 2, "trimmed": 0}
    assert ids(page) == ["a", "b"]
    assert ids(read(client, 1)) == ["b"]
    assert ids(read(client, conversation="tour")) == ["a"]
    assert read(client, limit=1)["upto"] == 1


def test_a_reader_waits_for_what_comes(client: FlaskClient) -> None:
    pages: queue.Queue[dict[str, Any]] = queue.Queue()
    other = client.application.test_client()
    reader = threading.Thread(target=lambda: pages.put(read(other, wait_ms=25_000, conversation="mine")), daemon=True)
    reader.start()
    client.post(EVENTS, json=event("a", "yours"))
    client.post(EVENTS, json=event("b", "mine"))
    assert ids(pages.get(timeout=30)) == ["b"]
    reader.join()
    assert read(client, 2, wait_ms=1) == {"events": [], "upto": 2, "trimmed": 0}


def test_a_late_reader_is_told_what_it_missed(client: FlaskClient) -> None:
    for number in range(53):
        client.post(EVENTS, json=event(f"e{number}"))
    page = read(client)
    assert (page["trimmed"], len(page["events"]), page["upto"]) == (3, 50, 53)


def test_deleting_a_conversation(client: FlaskClient) -> None:
    client.post(EVENTS, json=event("a", "mine"))
    client.post(EVENTS, json=event("b", "yours"))
    gone = client.delete("/v1/conversations/mine")
    assert gone.json == {"conversation": "mine", "events": 1, "deferred": 0}
    assert [(one["kind"], one["conversation"]) for one in read(client)["events"]] == [
        ("fact", "yours"),
        ("deleted", "mine"),
    ]
    again = client.post(EVENTS, json=event("a", "mine"))
    assert (again.status_code, again.json["error"]["code"]) == (410, "conversation_deleted")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 422, "id"),
        (event("a b"), 422, "id"),
        (event("deleted:tour"), 422, "id"),
        (event(""), 422, "id"),
        (event("x" * 129), 422, "id"),
        (event("a", "../etc"), 422, "conversation"),
        (event("a", kind="deleted"), 422, "kind"),
        (event("a", body="x" * 17_000), 422, "body"),
        (event("a", node="node-9"), 422, "node"),
        ({**event("a"), "body": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}, 400, "body"),
    ],
)
def test_a_bad_event_is_refused_by_field(client: FlaskClient, body: dict[str, Any], status: int, param: str) -> None:
    reply = client.post(EVENTS, json=body)
    assert (reply.status_code, reply.json["error"]["param"]) == (status, param)
    assert read(client)["events"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"after": "-1"}, "after"),
        ({"after": "nan"}, "after"),
        ({"after": "1e3"}, "after"),
        ({"limit": "0"}, "limit"),
        ({"limit": "501"}, "limit"),
        ({"wait_ms": "25001"}, "wait_ms"),
        ({"wait_ms": "٣"}, "wait_ms"),
    ],
)
def test_a_bad_query_is_refused_by_name(client: FlaskClient, query: dict[str, str], param: str) -> None:
    reply = client.get(EVENTS, query_string=query)
    assert (reply.status_code, reply.json["error"]["param"]) == (422, param)


def test_the_id_of_another_event_is_refused(client: FlaskClient) -> None:
    client.post(EVENTS, json=event("a"))
    reply = client.post(EVENTS, json=event("a", body={"door": "shut"}))
    assert (reply.status_code, reply.json["error"]["param"]) == (409, "id")


def test_local_only_is_not_shared(client: FlaskClient) -> None:
    for method in ("post", "get"):
        reply = getattr(client, method)(EVENTS, json=event("a"), headers={"X-Data-Class": "local-only"})
        assert (reply.status_code, reply.json["error"]["code"]) == (403, "local_only")
    assert read(client)["events"] == []


def test_what_is_shared_survives_a_restart(tmp_path: Path) -> None:
    for number in range(2):
        with federated(NODES, state_path=tmp_path) as app:
            app.test_client().post(EVENTS, json=event(f"e{number}"))
            assert len(read(app.test_client())["events"]) == number + 1


def test_a_bad_place_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="FEDERATION_STATE_PATH"), federated(NODES, state_path=tmp_path / "file"):
        pass


@contextmanager
def two_nodes(server: RedisServer, **settings: Any) -> Iterator[tuple[FlaskClient, FlaskClient]]:
    """Two federations that share one Redis."""
    with (
        federated(NODES, redis_url=server.url, common={"node_id": "one"}, **settings) as one,
        federated(NODES, redis_url=server.url, common={"node_id": "two"}, **settings) as two,
    ):
        yield one.test_client(), two.test_client()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


def test_two_nodes_share_one_order_and_a_deletion_reaches_both(redis_server: RedisServer) -> None:
    edge = f"http://127.0.0.1:{free_port()}"
    with two_nodes(redis_server, edge_url=edge) as (one, two):
        for number in range(10):
            (one, two)[number % 2].post(EVENTS, json=event(f"e{number}", "tour" if number < 9 else "mine"))
        assert read(one) == read(two)
        assert [page["node"] for page in read(one)["events"]] == ["one", "two"] * 5
        kept = {"id": "q", "conversation": "mine", "request": {"messages": [{"role": "user", "content": "hi"}]}}
        assert two.post("/v1/deferred", json=kept).status_code == 202
        assert one.delete("/v1/conversations/mine").json["events"] == 1
        wait_until(lambda: two.get("/v1/deferred/q").status_code == 404)
        assert two.post("/v1/deferred", json=kept).status_code == 410


def test_a_dead_redis_is_a_clear_503_and_what_it_acknowledged_is_there_when_it_is_back(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with two_nodes(redis_server) as (one, two):
        taken = [one.post(EVENTS, json=event(f"e{number}")).json for number in range(20)]
        redis_server.kill()
        calls = [
            one.post(EVENTS, json=event("e20", body=SECRET_WORD)),
            one.get(EVENTS),
            one.get(EVENTS, query_string={"after": 20, "wait_ms": 2000}),
            one.delete("/v1/conversations/tour"),
        ]
        for reply in calls:
            assert (reply.status_code, reply.json["error"]["code"]) == (503, "store_unavailable")
            assert reply.headers["Retry-After"]
        redis_server.start()
        assert [one["sequence"] for one in read(two)["events"]] == [one["sequence"] for one in taken]
        assert two.post(EVENTS, json=event("e20")).json["sequence"] == 21
    assert SECRET_WORD not in caplog.text


class Listener:
    """Hears a broker's announcements."""

    def __init__(self, broker: Broker) -> None:
        from paho.mqtt import client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        self.heard: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        ready = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.on_connect = lambda client, *_rest: client.subscribe("edgecascade/#", qos=1)
        self._client.on_subscribe = lambda *_rest: ready.set()
        self._client.on_message = lambda _c, _d, message: self.heard.put((message.topic, json.loads(message.payload)))
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        assert ready.wait(30)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    server = Broker(tmp_path)
    server.start()
    yield server
    server.kill()


def test_news_is_announced_without_its_content(broker: Broker) -> None:
    listener = Listener(broker)
    with federated(NODES, mqtt_url=broker.url) as app:
        client = app.test_client()
        client.post(EVENTS, json=event("a", body=SECRET_WORD))
        client.post(EVENTS, json=event("a", body=SECRET_WORD))  # once more: no news
        client.delete("/v1/conversations/tour")
        heard = [listener.heard.get(timeout=30) for _ in range(2)]
        wait_until(lambda: 'outcome="delivered"' in client.get("/metrics").text)
    listener.close()
    topic = "edgecascade/site-2/state"
    assert heard == [
        (topic, {"sequence": 1, "conversation": "tour", "kind": "fact"}),
        (topic, {"sequence": 2, "conversation": "tour", "kind": "deleted"}),
    ]
    assert listener.heard.empty()


def test_without_its_broker_everything_is_taken_and_announced_later(broker: Broker) -> None:
    broker.kill()
    with federated(NODES, mqtt_url=broker.url) as app:
        client = app.test_client()
        for number in range(3):
            assert client.post(EVENTS, json=event(f"e{number}")).status_code == 200
        assert len(read(client)["events"]) == 3
        assert 'edgecascade_announcements_total{model_version="none",node_id="site-2",outcome="queued"' in (
            client.get("/metrics").text
        )
        broker.start()
        listener = Listener(broker)
        last = {"sequence": 3, "conversation": "tour", "kind": "fact"}
        wait_until(lambda: listener.heard.get(timeout=60)[1] == last, timeout_s=60)
        listener.close()


def test_an_announcer_without_a_broker_ends_at_once() -> None:
    announcer = MqttAnnouncer(f"mqtt://127.0.0.1:{free_port()}", "edgecascade/x")
    announcer.tell("state", {"sequence": 1})
    assert announcer.outcomes["queued"] == 1
    announcer.close()


def test_the_answer_to_a_deferred_question_is_announced(broker: Broker) -> None:
    from tests.fakes import FakeTier, card, served, tier_app

    listener = Listener(broker)
    with served(tier_app(FakeTier(card("edge")))) as edge, federated(NODES, mqtt_url=broker.url, edge_url=edge) as app:
        question = {"messages": [{"role": "user", "content": "hi"}], "skill": "assistant"}
        app.test_client().post("/v1/deferred", json={"id": "q", "request": question})
        assert listener.heard.get(timeout=30) == (
            "edgecascade/site-2/deferred",
            {"id": "q", "status": "answered"},
        )
    listener.close()
