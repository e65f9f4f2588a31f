"""Store and forward: what is kept, for how long, and that each question is answered visibly once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient

from functions.federation.deferred.edge import EdgeReply, NotNowError
from functions.federation.deferred.forward import Forwarder
from functions.federation.deferred.store import ANSWERED, EXPIRED, PENDING, REFUSED, DeferredStore, Question, Record
from functions.federation.errors import ConflictError, FullError
from models.runtime.tier import SkillQuery
from tests.fakes import SECRET_WORD, FakeTier, card, federated, free_port, served, tier_app, user, wait_until

DEFERRED = "/v1/deferred"


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Iterator[Callable[[], DeferredStore]]:
    """Opens the same file again and again, as restarts would."""
    stores: list[DeferredStore] = []

    def open_store() -> DeferredStore:
        stores.append(DeferredStore(tmp_path / "deferred.sqlite", 3, 60.0, clock))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def question(name: str, conversation: str = "tour", request: str = '{"messages": []}') -> Question:
    return Question(name, conversation, request, str(hash(request)))


def status_of(store: DeferredStore, name: str) -> str:
    record = store.get(name)
    return record.status if record else "unknown"


def test_questions_are_kept_in_order_through_a_restart(opened: Callable[[], DeferredStore]) -> None:
    store = opened()
    for name in ("one", "two"):
        store.add(question(name))
    store.close()
    again = opened()
    oldest = again.next()
    assert oldest is not None
    assert oldest == Record(question("one"), PENDING, "", Clock.now)
    assert again.finish(oldest.question, ANSWERED, "{}")
    following = again.next()
    assert following is not None
    assert following.question.id == "two"


def test_the_same_question_again_changes_nothing_and_another_is_refused(opened: Callable[[], DeferredStore]) -> None:
    store = opened()
    first = store.add(question("one"))
    assert store.add(question("one")) == first
    with pytest.raises(ConflictError):
        store.add(question("one", request="{}"))
    with pytest.raises(ConflictError):
        store.add(question("one", conversation="other"))
    assert store.counts()[PENDING] == 1


def test_a_final_record_stays_as_it_is_and_forgets_what_was_asked(opened: Callable[[], DeferredStore]) -> None:
    store = opened()
    asked = store.add(question("one")).question
    assert store.finish(asked, ANSWERED, '{"a": 1}')
    assert not store.finish(asked, ANSWERED, '{"a": 2}')
    assert not store.finish(asked, REFUSED, "{}")
    record = store.get("one")
    assert record is not None
    assert (record.status, record.answer, record.question.request) == (ANSWERED, '{"a": 1}', "")
    assert store.add(question("one")) == record, "asked once more, it is the same answer"


def test_it_is_bounded(opened: Callable[[], DeferredStore]) -> None:
    store = opened()
    for name in "abc":
        store.add(question(name))
    with pytest.raises(FullError):
        store.add(question("d"))
    assert store.add(question("a")).status == PENDING


def test_what_waits_too_long_expires_and_is_then_forgotten(opened: Callable[[], DeferredStore], clock: Clock) -> None:
    store = opened()
    asked = store.add(question("one")).question
    clock.now += 61
    assert status_of(store, "one") == EXPIRED
    assert store.next() is None
    assert not store.finish(asked, ANSWERED, "{}"), "too late"
    clock.now += 61
    assert status_of(store, "one") == "unknown"


def test_an_answer_is_kept_for_the_retention(opened: Callable[[], DeferredStore], clock: Clock) -> None:
    store = opened()
    store.finish(store.add(question("one")).question, ANSWERED, "{}")
    clock.now += 59
    assert status_of(store, "one") == ANSWERED
    clock.now += 2
    assert status_of(store, "one") == "unknown"


def test_a_deleted_conversation_is_gone_whatever_its_state(opened: Callable[[], DeferredStore], tmp_path: Path) -> None:
    store = opened()
    asked = store.add(question("one", "mine", SECRET_WORD)).question
    store.add(question("two", "yours"))
    assert store.delete("mine") == 1
    assert not store.finish(asked, ANSWERED, "{}"), "it was on its way to the edge"
    assert (status_of(store, "one"), status_of(store, "two")) == ("unknown", PENDING)
    assert not any(SECRET_WORD.encode() in path.read_bytes() for path in tmp_path.iterdir())


@dataclass
class FakeEdge:
    """Answers as it is told; raises what is an exception."""

    replies: list[EdgeReply | Exception] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def ask(self, request: str) -> EdgeReply:
        self.asked.append(request)
        reply = self.replies.pop(0) if self.replies else EdgeReply('{"n": 1}')
        if isinstance(reply, Exception):
            raise reply
        return reply


def test_each_is_forwarded_until_the_edge_has_spoken(opened: Callable[[], DeferredStore]) -> None:
    store, told = opened(), list[Record]()
    store.add(question("one"))
    store.add(question("two"))
    edge = FakeEdge([NotNowError(), EdgeReply('{"n": 7}'), EdgeReply('{"error": {}}', refused=True)])
    forwarder = Forwarder(store, edge, told.append)
    assert [forwarder.forward_one() for _ in range(4)] == [False, True, True, None]
    assert [(record.question.id, record.status, record.answer) for record in told] == [
        ("one", ANSWERED, '{"n": 7}'),
        ("two", REFUSED, '{"error": {}}'),
    ]
    assert forwarder.outcomes == {"not_now": 1, ANSWERED: 1, REFUSED: 1}


def test_an_answer_that_was_lost_in_a_crash_is_asked_for_again_and_seen_once(
    opened: Callable[[], DeferredStore],
) -> None:
    """The edge answered, and the process died before the answer was written down."""
    store, told = opened(), list[Record]()
    store.add(question("one"))
    record = store.next()
    assert record is not None
    FakeEdge().ask(record.question.request)
    store.close()
    again = opened()
    assert Forwarder(again, FakeEdge(), told.append).forward_one()
    assert not again.finish(record.question, ANSWERED, '{"late": true}'), "the first life's answer comes too late"
    assert len(told) == 1


def test_the_forwarder_works_by_itself(opened: Callable[[], DeferredStore]) -> None:
    store, done = opened(), threading.Event()
    forwarder = Forwarder(store, FakeEdge([NotNowError()] * 3), lambda _record: done.set(), first_s=0.001)
    forwarder.start()
    store.add(question("one"))
    forwarder.wake()
    assert done.wait(30)
    forwarder.stop()


def edge_that(replies: Callable[[], Response]) -> Flask:
    app = Flask("edge")
    app.post("/v1/chat/completions")(replies)
    return app


def leave(client: FlaskClient, name: str, text: str = "hello", **fields: Any) -> Any:
    request = {"messages": user(text), "skill": "assistant", **fields.pop("request", {})}
    return client.post(DEFERRED, json={"id": name, "request": request, **fields})


def seen(client: FlaskClient, name: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"{DEFERRED}/{name}").json
    return found


def forwards(client: FlaskClient) -> list[str]:
    """The lines that count what came of asking the edge."""
    lines = client.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("edgecascade_forwards_total")]


@pytest.fixture
def device() -> Iterator[str]:
    with served(tier_app(FakeTier())) as url:
        yield url


def test_a_question_waits_for_the_edge_through_a_restart_and_is_answered_once(device: str, tmp_path: Path) -> None:
    edge, port = FakeTier(card("edge")), free_port()
    settings: dict[str, Any] = {"edge_url": f"http://127.0.0.1:{port}", "state_path": tmp_path}
    with federated({"near": device}, **settings) as app:
        client = app.test_client()
        reply = leave(client, "q1", request={"deadline_ms": 50, "model": "device", "stream": False})
        assert (reply.status_code, reply.json["status"], reply.json["answer"]) == (202, "pending", None)
        wait_until(lambda: 'outcome="not_now"' in client.get("/metrics").text)
        assert seen(client, "q1")["status"] == "pending"
    with served(tier_app(edge), port), federated({"near": device}, **settings) as app:
        client = app.test_client()
        wait_until(lambda: seen(client, "q1")["status"] == "answered")
        first = seen(client, "q1")
        assert first["answer"]["edgecascade"]["source"] == "edge"
        assert json.loads(first["answer"]["choices"][0]["message"]["content"])["intent"] == "greeting"
        assert leave(client, "q1", request={"deadline_ms": 50}).json == first == seen(client, "q1")
    assert edge.prompts == [SkillQuery("assistant", "hello")]


def test_local_only_is_never_kept(device: str, tmp_path: Path) -> None:
    with federated({"near": device}, edge_url=f"http://127.0.0.1:{free_port()}", state_path=tmp_path) as app:
        client = app.test_client()
        marked = leave(client, "q1", SECRET_WORD, request={"local_only": True})
        body = {"id": "q2", "request": {"messages": user(SECRET_WORD)}}
        by_header = client.post(DEFERRED, json=body, headers={"X-Data-Class": "local-only"})
        for reply in (marked, by_header):
            assert (reply.status_code, reply.json["error"]["code"]) == (403, "local_only")
        assert client.get(f"{DEFERRED}/q1").status_code == 404
    assert not any(SECRET_WORD.encode() in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"id": "no spaces"}, 422, "id"),
        ({"id": 7}, 422, "id"),
        ({"conversation": ""}, 422, "conversation"),
        ({"request": {"messages": []}}, 422, "request.messages"),
        ({"request": {"top_k": 3, "messages": user("hi")}}, 422, "request.top_k"),
        ({"request": "hi"}, 422, "request"),
        ({"more": 1}, 422, "more"),
    ],
)
def test_a_bad_field_is_named(device: str, fields: dict[str, Any], status: int, param: str) -> None:
    with federated({"near": device}, edge_url=f"http://127.0.0.1:{free_port()}") as app:
        reply = app.test_client().post(DEFERRED, json={"id": "q", "request": {"messages": user("hi")}, **fields})
    assert (reply.status_code, reply.json["error"]["param"]) == (status, param), reply.json


def test_conflicts_bounds_and_a_federation_without_an_edge(device: str) -> None:
    with federated({"near": device}, edge_url=f"http://127.0.0.1:{free_port()}", deferred_limit=1) as app:
        client = app.test_client()
        assert leave(client, "q1").status_code == 202
        assert leave(client, "q1", "something else").status_code == 409
        full = leave(client, "q2")
        assert (full.status_code, full.json["error"]["code"]) == (429, "store_full")
        assert full.headers["Retry-After"]
    with federated({"near": device}) as app:
        assert leave(app.test_client(), "q1").json["error"]["code"] == "no_edge"


@pytest.mark.parametrize(
    ("status", "body", "becomes"),
    [
        (200, {"choices": [{}], "edgecascade": {"degraded": False}}, "answered"),
        (422, {"error": {"message": "no such skill", "param": "skill"}}, "refused"),
        (200, {"choices": [{}], "edgecascade": {"degraded": True}}, "pending"),
        (200, {"choices": []}, "pending"),
        (200, [], "pending"),
        (404, {"detail": "no such function"}, "pending"),
        (429, {"error": {"message": "full"}}, "pending"),
        (503, {"error": {"message": "loading"}}, "pending"),
        (500, {"error": {"message": "broken"}}, "pending"),
    ],
)
def test_only_the_edges_last_word_ends_the_wait(device: str, status: int, body: Any, becomes: str) -> None:
    edge = edge_that(lambda: Response(json.dumps(body), status=status, mimetype="application/json"))
    with served(edge) as url, federated({"near": device}, edge_url=url) as app:
        client = app.test_client()
        leave(client, "q1")
        outcome = f'outcome="{"not_now" if becomes == "pending" else becomes}"'
        wait_until(lambda: any(outcome in line for line in forwards(client)))
        assert seen(client, "q1")["status"] == becomes


def test_a_gateway_that_lost_the_edge_does_not_speak_for_it(device: str) -> None:
    headers = {"X-OpenFaaS-Internal": "gateway"}
    lost = edge_that(lambda: Response('{"error": {"message": "no such function"}}', 404, headers))
    with served(lost) as url, federated({"near": device}, edge_url=url) as app:
        client = app.test_client()
        leave(client, "q1")
        wait_until(lambda: any('outcome="not_now"' in line for line in forwards(client)))
        assert seen(client, "q1")["status"] == "pending"


def test_deleting_a_conversation_forgets_its_questions_for_good(device: str) -> None:
    with ExitStack() as stack:
        app = stack.enter_context(federated({"near": device}, edge_url=f"http://127.0.0.1:{free_port()}"))
        client = app.test_client()
        leave(client, "q1", conversation="mine")
        leave(client, "q2", conversation="yours")
        gone = client.delete("/v1/conversations/mine")
        assert gone.json == {"conversation": "mine", "events": 0, "deferred": 1}
        assert client.get(f"{DEFERRED}/q1").status_code == 404
        assert seen(client, "q2")["status"] == "pending"
        assert leave(client, "q1", conversation="mine").status_code == 410
