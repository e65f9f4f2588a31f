"""The cache of answers: one contract for both stores, what may be kept, and the service in front of the models."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from functions.dispatcher.app import create_app as create_dispatcher
from functions.dispatcher.cache import similarity
from functions.dispatcher.cache.answers import AnswerCache, CacheRules, Caller, Given
from functions.dispatcher.cache.config import CacheConfig
from functions.dispatcher.cache.memory import MemoryStore
from functions.dispatcher.cache.service import CachedService, add_conversation_routes, purge_regularly
from functions.dispatcher.cache.sqlite import SqliteStore
from functions.dispatcher.cache.store import AnswerStore, Bounds, Entry, Held
from functions.dispatcher.config import DispatcherConfig
from functions.serving.answering import add_routes
from functions.serving.ask import Ask, Clocked, Message, Sampling, Shape
from functions.serving.events import End, Event, Events, Piece, Report, Start, Usage
from functions.serving.replies import ModelEntry
from functions.serving.settings import Common, ConfigError
from functions.serving.web import Site, create_base
from models.runtime.tier import Tool, ToolUse
from tests.fakes import SECRET_WORD, FakeTier, card, dispatcher_app, read_sse, served, tier_app, user, wait_until

CHAT = "/v1/chat/completions"
MakeStore = Callable[[Bounds], AnswerStore]


@pytest.fixture(params=["memory", "sqlite"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    if request.param == "memory":
        yield MemoryStore
        return
    opened: list[SqliteStore] = []

    def make(bounds: Bounds) -> SqliteStore:
        opened.append(SqliteStore(tmp_path / f"answers-{len(opened)}.db", bounds))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def entry(tenant: str = "a", key: str = "k", **fields: Any) -> Entry:
    values = {
        "tenant": tenant,
        "key": key,
        "scope": "s",
        "conversation": "",
        "text": f"for {tenant}",
        "model": "edge",
        "model_version": "1",
        "frame": "",
        "made_s": 0.0,
        "expires_s": 100.0,
        "features": similarity.features(key),
        **fields,
    }
    return Entry(**values)


# The contract of a store.


def test_an_answer_comes_back_as_it_was_and_only_to_its_tenant(make_store: MakeStore) -> None:
    store = make_store(Bounds())
    kept = entry(conversation="c", frame='{"intent": "x"}', text="Schönen Tag")
    assert store.put(kept)
    assert store.get("a", "k", 50) == kept
    assert store.get("b", "k", 50) is None
    assert store.get("a", "other", 50) is None
    assert store.held() == Held(1, kept.size_bytes)


def test_a_newer_answer_takes_the_place_of_an_older(make_store: MakeStore) -> None:
    store = make_store(Bounds())
    store.put(entry(text="old", features={1: 1.0}))
    newer = entry(text="new", features={2: 1.0})
    store.put(newer)
    assert store.get("a", "k", 0) == newer
    assert store.held() == Held(1, newer.size_bytes)
    assert store.nearest("a", "s", {1: 1.0}, 0) is None


def test_the_nearest_is_found_within_tenant_and_scope(make_store: MakeStore) -> None:
    store = make_store(Bounds())
    for name, features in [("one", {1: 0.6, 2: 0.8}), ("two", {2: 1.0}), ("none", {})]:
        store.put(entry(key=name, features=features))
    store.put(entry(tenant="b", key="theirs", features={2: 1.0}))
    store.put(entry(key="elsewhere", scope="t", features={2: 1.0}))
    found = store.nearest("a", "s", {1: 1.0}, 0)
    assert found is not None
    assert (found[0].key, found[1]) == ("one", pytest.approx(0.6))
    best = store.nearest("a", "s", {2: 1.0}, 0)
    assert best is not None
    assert best[0].key == "two"
    assert store.nearest("a", "s", {3: 1.0}, 0) is None
    assert store.nearest("c", "s", {2: 1.0}, 0) is None


def test_what_has_expired_is_not_given_and_purging_deletes_it(make_store: MakeStore) -> None:
    store = make_store(Bounds())
    store.put(entry(key="soon", expires_s=10, features={1: 1.0}))
    store.put(entry(key="late", expires_s=20, features={1: 0.5}))
    assert store.get("a", "soon", 10) is None
    found = store.nearest("a", "s", {1: 1.0}, 10)
    assert found is not None
    assert found[0].key == "late"
    assert store.purge(10) == 1
    assert store.held().entries == 1
    assert store.purge(10) == 0


def test_a_conversation_is_forgotten_and_no_other(make_store: MakeStore) -> None:
    store = make_store(Bounds())
    for tenant in "ab":
        for number, conversation in enumerate(["c", "c", "d", ""]):
            store.put(entry(tenant, f"k{number}", conversation=conversation))
    assert store.forget("a", "c") == 2
    assert store.forget("a", "c") == 0
    assert store.forget("a", "") == 0
    assert [store.get("a", f"k{n}", 0) is not None for n in range(4)] == [False, False, True, True]
    assert store.held().entries == 6
    assert store.nearest("a", "s", similarity.features("k0"), 0) is None


def test_over_the_bound_the_longest_unused_of_the_largest_tenant_goes(make_store: MakeStore) -> None:
    store = make_store(Bounds(entries=4))
    store.put(entry("small", "k"))
    for number in range(3):
        store.put(entry("large", f"k{number}"))
    store.get("large", "k0", 0)
    for number in range(3, 6):
        store.put(entry("large", f"k{number}"))
    assert store.get("small", "k", 0) is not None
    assert [n for n in range(6) if store.get("large", f"k{n}", 0)] == [3, 4, 5]
    store.get("large", "k3", 0)
    store.put(entry("large", "k6"))
    assert [n for n in range(7) if store.get("large", f"k{n}", 0)] == [3, 5, 6]


def test_bytes_are_bounded_too_and_what_is_too_large_is_not_kept(make_store: MakeStore) -> None:
    size = entry(text="x" * 1000).size_bytes
    store = make_store(Bounds(bytes=2 * size + 10))
    assert not store.put(entry(text="x" * 5000))
    for number in range(5):
        assert store.put(entry(key=str(number), text="x" * 1000, features=entry().features))
    assert store.held().bytes <= 2 * size + 10
    assert store.held().entries == 2
    assert not make_store(Bounds(entries=0)).put(entry())


TENANTS, KEYS = st.sampled_from("abc"), st.sampled_from([f"k{n}" for n in range(6)])
FEATURES = st.dictionaries(st.integers(0, 4), st.sampled_from([0.5, 1.0]), max_size=3)


class BothStores(RuleBasedStateMachine):
    """Both stores do the same whatever is asked, show no tenant another's, and stay within bounds."""

    bounds = Bounds(entries=5, bytes=5000)

    def __init__(self) -> None:
        super().__init__()
        self.stores = [MemoryStore(self.bounds), self.sqlite()]
        self.now_s = 0.0

    def sqlite(self) -> SqliteStore:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        return SqliteStore(Path(self.folder.name) / "answers.db", self.bounds)

    def teardown(self) -> None:
        self.stores[1].close()  # type: ignore[attr-defined]
        self.folder.cleanup()

    def both(self, act: Callable[[AnswerStore], Any]) -> Any:
        one, other = (act(store) for store in self.stores)
        assert one == other
        return one

    @rule(
        tenant=TENANTS,
        key=KEYS,
        scope=st.sampled_from("st"),
        conversation=st.sampled_from(["", "c", "d"]),
        letters=st.integers(0, 3000),
        keep_s=st.integers(1, 20),
        features=FEATURES,
    )
    def put(self, tenant: str, key: str, letters: int, keep_s: int, **fields: Any) -> None:
        text = f"{tenant}:" + "x" * letters
        new = entry(tenant, key, text=text, made_s=self.now_s, expires_s=self.now_s + keep_s, **fields)
        self.both(lambda store: store.put(new))

    @rule(tenant=TENANTS, key=KEYS)
    def get(self, tenant: str, key: str) -> None:
        self.is_for(tenant, self.both(lambda store: store.get(tenant, key, self.now_s)))

    @rule(tenant=TENANTS, scope=st.sampled_from("st"), features=FEATURES)
    def nearest(self, tenant: str, scope: str, features: dict[int, float]) -> None:
        found = self.both(lambda store: store.nearest(tenant, scope, features, self.now_s))
        if found:
            self.is_for(tenant, found[0])
            assert found[0].scope == scope
            assert found[1] == pytest.approx(similarity.cosine(features, found[0].features))

    @rule(tenant=TENANTS, conversation=st.sampled_from(["c", "d"]))
    def forget(self, tenant: str, conversation: str) -> None:
        self.both(lambda store: store.forget(tenant, conversation))
        assert self.both(lambda store: store.forget(tenant, conversation)) == 0

    @rule(later_s=st.integers(1, 30))
    def wait(self, later_s: int) -> None:
        self.now_s += later_s

    @rule()
    def purge(self) -> None:
        self.both(lambda store: store.purge(self.now_s))

    @invariant()
    def within_bounds(self) -> None:
        held = self.both(lambda store: store.held())
        assert held.entries <= self.bounds.entries
        assert held.bytes <= self.bounds.bytes

    def is_for(self, tenant: str, found: Entry | None) -> None:
        if found is not None:
            assert found.tenant == tenant
            assert found.text.startswith(f"{tenant}:")
            assert found.expires_s > self.now_s


TestBothStores = BothStores.TestCase
TestBothStores.settings = settings(max_examples=40, stateful_step_count=30)


# The file.


def test_a_file_outlives_its_process_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    with closing(SqliteStore(path, Bounds())) as store:
        store.put(entry())
        store.put(entry(key="newer"))
        store.get("a", "k", 0)
    with closing(SqliteStore(path, Bounds(entries=2))) as store:
        store.put(entry(key="newest"))
        assert store.get("a", "k", 0) == entry()
        assert store.get("a", "newer", 0) is None
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_deleted_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    with closing(SqliteStore(path, Bounds())) as store:
        store.put(entry(text=SECRET_WORD, conversation="c"))
        store.put(entry(key="stays"))
        assert SECRET_WORD.encode() in path.read_bytes()
        assert store.forget("a", "c") == 1
        files = [file.read_bytes() for file in tmp_path.iterdir()]
        assert not any(SECRET_WORD.encode() in content for content in files)


def test_a_damaged_file_is_begun_anew_and_a_foreign_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    with closing(SqliteStore(path, Bounds())) as store:
        store.put(entry())
    content = bytearray(path.read_bytes())
    content[200:4000] = b"\xff" * 3800
    path.write_bytes(content)
    with closing(SqliteStore(path, Bounds())) as store:
        assert store.held() == Held(0, 0)
    foreign = tmp_path / "theirs.db"
    with closing(sqlite3.connect(foreign)) as db:
        db.execute("CREATE TABLE theirs (x)")
    for other in (foreign, tmp_path):
        with pytest.raises(ConfigError, match=r"name another file|cannot be used as a cache"):
            SqliteStore(other, Bounds())
    with closing(sqlite3.connect(foreign)) as db:
        assert db.execute("SELECT COUNT(*) FROM theirs").fetchone() == (0,)


def test_a_file_that_fails_costs_no_answer_but_a_deletion_says_so(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "answers.db", Bounds())
    client = client_of(Echo(), store)
    assert source(post(client, "hi")) == "edge"
    store.close()
    assert source(post(client, "hi")) == "edge"
    failed = client.delete("/v1/conversations/c", headers={"X-Tenant": "anna"})
    assert (failed.status_code, failed.json["error"]["code"]) == (500, "not_deleted")


# Likeness.


@given(st.text(max_size=200))
def test_features_have_length_one_and_are_like_themselves(text: str) -> None:
    found = similarity.features(text)
    assert similarity.cosine(found, found) == pytest.approx(1.0 if found else 0.0)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Where are the toilets?", "where is the toilet please", True),
        ("Is there free wifi?", "do you have free wifi", True),
        ("Where is the pharmacy?", "Where is the supermarket?", False),
        ("Where is the cinema?", "how much is a cinema ticket", False),
        ("", "where", False),
    ],
)
def test_what_is_alike(one: str, other: str, alike: bool) -> None:
    likeness = similarity.cosine(similarity.features(one), similarity.features(other))
    assert (likeness >= similarity.ABOVE) == alike


def test_numbers_and_denials_must_agree() -> None:
    assert similarity.must_agree("gate 12 and B4") == ("12", "b4")
    assert similarity.must_agree("I don't like it") == similarity.must_agree("never") == ("not",)
    assert similarity.must_agree("where is gate") == ()


# What is kept, and for whom.

ANNA, BOB = Caller.of("anna", "key"), Caller.of("bob", "key")


def ask(text: str, **fields: Any) -> Ask:
    return Ask(
        **{"shape": Shape.CHAT, "model": "auto", "skill": "chat", "messages": (Message("user", text),), **fields}
    )


def cache_of(store: AnswerStore | None = None, clock: Callable[[], float] = lambda: 0.0, **rules: Any) -> AnswerCache:
    return AnswerCache(store or MemoryStore(Bounds()), CacheRules(**{"alike_above": similarity.ABOVE, **rules}), clock)


def test_the_tenant_is_both_the_key_and_what_the_header_says() -> None:
    tenants = {Caller.of(name, key).tenant for name in ("", "anna", "bob") for key in ("", "key", "other")}
    assert len(tenants) == 9
    assert "" in tenants
    assert not any("key" in tenant or "anna" in tenant for tenant in tenants)


def test_an_exact_and_a_like_question_are_answered_and_no_other_tenants() -> None:
    cache = cache_of()
    said = Given("Beside the lifts.", "edge", "1")
    assert cache.keep(ANNA, ask("Where are the toilets?"), said)
    exact, alike = (cache.look_up(ANNA, ask(text)) for text in ("Where are the toilets?", "where is the toilet please"))
    assert exact is not None
    assert alike is not None
    assert (exact.kind, exact.given, alike.kind, alike.given) == ("exact", said, "alike", said)
    assert similarity.ABOVE <= alike.likeness < 1
    assert cache.look_up(ANNA, ask("Where are the lifts?")) is None
    for other in (BOB, Caller.of("anna", "other key"), Caller("")):
        assert cache.look_up(other, ask("Where are the toilets?")) is None


def test_without_a_threshold_only_the_exact_request_is_answered() -> None:
    cache = cache_of(alike_above=None)
    cache.keep(ANNA, ask("Where are the toilets?"), Given("x", "edge"))
    assert cache.look_up(ANNA, ask("Where are the toilets?")) is not None
    assert cache.look_up(ANNA, ask("where are the toilets")) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "edge"},
        {"skill": "banking"},
        {"messages": (Message("system", "be rude"), Message("user", "Which lifts go to floor 4?"))},
        {"messages": (Message("user", "Which lifts go to floor 5?"),)},
        {"messages": (Message("user", "Which lifts do not go to floor 4?"),)},
        {"messages": tuple(Message(role, "Which lifts go to floor 4?") for role in ("user", "assistant", "user"))},
        {"sampling": Sampling(max_tokens=3)},
        {"shape": Shape.COMPLETION, "prompt": "Which lifts go to floor 4?", "messages": ()},
    ],
)
def test_whatever_else_an_answer_depends_on_must_be_the_same(changed: dict[str, Any]) -> None:
    cache, asked = cache_of(alike_above=0.3), ask("Which lifts go to floor 4?")
    cache.keep(ANNA, asked, Given("x", "edge"))
    assert cache.look_up(ANNA, asked) is not None
    assert cache.look_up(ANNA, replace(asked, **changed)) is None


def test_frames_are_given_again_for_the_same_words_only() -> None:
    cache, asked = cache_of(alike_above=0.3), ask("play some jazz", skill="home")
    given_ = Given('{"intent": "play"}', "device", "1", {"intent": "play", "slots": {"what": "jazz"}})
    cache.keep(ANNA, asked, given_)
    hit = cache.look_up(ANNA, asked)
    assert hit is not None
    assert hit.given == given_
    assert cache.look_up(ANNA, ask("please play some jazz", skill="home")) is None


@pytest.mark.parametrize(
    ("caller", "changed"),
    [
        (ANNA, {"local_only": True}),
        (ANNA, {"sampling": Sampling(temperature=0.7)}),
        (ANNA, {"sampling": Sampling(top_logprobs=1)}),
        (ANNA, {"tools": ToolUse((Tool("pay"),))}),
        (Caller(""), {}),
    ],
)
def test_what_may_not_be_kept_is_not(caller: Caller, changed: dict[str, Any]) -> None:
    store = MemoryStore(Bounds())
    cache = cache_of(store)
    assert not cache.keep(caller, ask("hi", **changed), Given("x", "edge"))
    assert store.held() == Held(0, 0)
    cache.keep(ANNA, ask("hi"), Given("x", "edge"))
    assert cache.look_up(caller, ask("hi", **changed)) is None


def test_no_question_is_kept_only_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    with closing(SqliteStore(path, Bounds())) as store:
        assert cache_of(store).keep(ANNA, ask(f"is {SECRET_WORD} open"), Given("yes", "edge"))
        assert SECRET_WORD.encode() not in path.read_bytes()
        assert b"anna" not in path.read_bytes()


def test_answers_are_kept_for_so_long_and_no_longer() -> None:
    now, store = [0.0], MemoryStore(Bounds())
    cache = cache_of(store, lambda: now[0], retention_s=60)
    cache.keep(ANNA, ask("hi"), Given("x", "edge"))
    now[0] = 59.0
    assert cache.look_up(ANNA, ask("hi")) is not None
    now[0] = 60.0
    assert cache.look_up(ANNA, ask("hi")) is None
    assert (cache.purge(), store.held().entries) == (1, 0)


def test_purging_goes_on_while_nobody_asks() -> None:
    store = MemoryStore(Bounds())
    store.put(entry(expires_s=0))
    stop = purge_regularly(AnswerCache(store), every_s=0.001)
    wait_until(lambda: store.held().entries == 0)
    stop()
    assert store.held().entries == 0


def test_an_answer_on_its_way_while_its_conversation_is_deleted_is_not_kept() -> None:
    now = [1.0]
    cache, anna = cache_of(clock=lambda: now[0]), replace(ANNA, conversation="c")
    asked_s = cache.now()
    now[0] = 2.0
    assert cache.forget(anna) == 0
    now[0] = 3.0
    assert not cache.keep(anna, ask("hi"), Given("x", "edge"), asked_s)
    assert cache.keep(anna, ask("hi"), Given("x", "edge"))
    assert cache.forget(ANNA) == 0
    assert cache.forget(anna) == 1


@pytest.mark.parametrize(
    "bad", [{"retention_s": 0}, {"retention_s": float("nan")}, {"alike_above": 0}, {"alike_above": 2}]
)
def test_rules_that_mean_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CacheRules(**bad)


# In front of a service.


@dataclass
class Echo:
    """A service that repeats the question, and counts."""

    report: Report = field(default_factory=lambda: Report(source="edge", route="chat", reason="chat"))
    finish_reason: str = "stop"
    pieces: tuple[Piece, ...] | None = None
    asked: list[str] = field(default_factory=list)

    def check(self, ask: Ask) -> None:
        pass

    def models(self) -> list[ModelEntry]:
        return []

    def events(self, ask: Ask, clocked: Clocked) -> Events:
        self.asked.append(ask.text)
        return self._events(ask)

    def _events(self, ask: Ask) -> Iterator[Event]:
        yield Start("edge", self.report)
        yield from self.pieces or (Piece("you said "), Piece(ask.text))
        yield End(self.finish_reason, Usage(), self.report)


def client_of(echo: Echo, store: AnswerStore | None = None) -> FlaskClient:
    cache = AnswerCache(store or MemoryStore(Bounds()), CacheRules(alike_above=similarity.ABOVE))
    site = Site.create("dispatcher", Common(node_id="n"))
    app: Flask = create_base(site, site.drain)
    add_routes(app, site, CachedService(echo, cache, "n"))
    add_conversation_routes(app, [cache])
    return app.test_client()


def post(client: FlaskClient, text: str, tenant: str = "anna", stream: bool = False, **headers: str) -> Any:
    named = {"X-Tenant": tenant, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return client.post(CHAT, json={"messages": user(text), "stream": stream}, headers=named)


def source(reply: Any) -> str:
    found: str = reply.json["edgecascade"]["source"]
    return found


def test_the_second_time_no_model_is_asked() -> None:
    echo = Echo()
    client = client_of(echo)
    first, second = post(client, "Is there free wifi?"), post(client, "do you have free wifi")
    assert [source(reply) for reply in (first, second)] == ["edge", "cache"]
    assert second.json["choices"] == first.json["choices"]
    assert second.json["edgecascade"]["reason"] == "alike"
    assert echo.asked == ["Is there free wifi?"]


def test_streams_are_kept_and_given_again() -> None:
    client = client_of(Echo())
    texts = []
    for _ in range(2):
        *chunks, done = read_sse(post(client, "hi there", stream=True).text.splitlines())
        assert done == "[DONE]"
        texts.append("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks))
        last = chunks[-1]["edgecascade"]["source"]
    assert texts == ["you said hi there"] * 2
    assert last == "cache"


def test_a_stream_that_is_left_is_not_kept() -> None:
    echo = Echo()
    client = client_of(echo)
    reply = client.post(CHAT, json={"messages": user("hi"), "stream": True}, headers={"X-Tenant": "a"}, buffered=False)
    next(reply.iter_encoded())
    reply.close()
    assert source(post(client, "hi", tenant="a")) == "edge"


@pytest.mark.parametrize("headers", [{"tenant": "bob"}, {"Authorization": "Bearer x"}, {"tenant": ""}])
def test_another_tenant_asks_the_model(headers: dict[str, str]) -> None:
    client = client_of(Echo())
    post(client, "hi")
    assert source(post(client, "hi")) == "cache"
    assert source(post(client, "hi", **headers)) == "edge"


@pytest.mark.parametrize(
    "echo",
    [
        Echo(report=Report(source="edge", route="chat", reason="edge_error", degraded=True)),
        Echo(report=Report(source="canned", route="fallback", reason="x")),
        Echo(finish_reason="length"),
        Echo(pieces=(Piece("no", refuses=True),)),
    ],
)
def test_what_is_no_whole_answer_of_a_model_is_not_kept(echo: Echo) -> None:
    store = MemoryStore(Bounds())
    client = client_of(echo, store)
    post(client, "hi")
    assert store.held().entries == 0


def test_local_only_is_neither_kept_nor_answered_from_the_cache() -> None:
    store = MemoryStore(Bounds())
    client = client_of(Echo(), store)
    post(client, "hi", X_Data_Class="local-only")
    assert store.held().entries == 0
    post(client, "hi")
    assert source(post(client, "hi", X_Data_Class="local-only")) == "edge"


def test_a_call_deletes_a_conversation_of_the_callers_alone() -> None:
    client = client_of(Echo())
    for tenant in ("anna", "bob"):
        for text, conversation in [("one", "c-1"), ("two", "c-1"), ("three", "c-2")]:
            post(client, text, tenant=tenant, X_Conversation_Id=conversation)
    reply = client.delete("/v1/conversations/c-1", headers={"X-Tenant": "anna"})
    assert (reply.status_code, reply.json) == (200, {"id": "c-1", "object": "conversation.deleted", "deleted": 2})
    assert [source(post(client, text)) for text in ("one", "two", "three")] == ["edge", "edge", "cache"]
    assert source(post(client, "one", tenant="bob")) == "cache"
    again = client.delete("/v1/conversations/c-1", headers={"X-Tenant": "bob"})
    assert again.json["deleted"] == 2


def test_a_conversation_without_a_tenant_or_a_proper_name_is_refused() -> None:
    client = client_of(Echo())
    nobody = client.delete("/v1/conversations/c-1")
    assert (nobody.status_code, nobody.json["error"]["code"]) == (401, "no_tenant")
    bad = client.delete("/v1/conversations/a%20b", headers={"X-Tenant": "anna"})
    assert (bad.status_code, bad.json["error"]["param"]) == (422, "conversation")
    post_bad = post(client, "hi", X_Conversation_Id="a b")
    assert (post_bad.status_code, post_bad.json["error"]["param"]) == (422, "X-Conversation-Id")


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["", "x"]), st.sampled_from(["hi", "hi you", "where is it"])),
        max_size=12,
    )
)
@settings(max_examples=30)
def test_no_tenant_ever_sees_anothers_answer(requests: list[tuple[str, str, str]]) -> None:
    cache = cache_of(alike_above=0.1)
    for tenant, key, text in requests:
        caller, asked = Caller.of(tenant, key), ask(text)
        hit = cache.look_up(caller, asked)
        if hit is not None:
            assert hit.given.text == f"for {tenant} with {key}"
        cache.keep(caller, asked, Given(f"for {tenant} with {key}", "edge"))


# In the dispatcher.


def test_the_dispatcher_keeps_answers_where_its_settings_say_so(tmp_path: Path) -> None:
    values = {"DEVICE_URL": "http://d", "EDGE_URL": "http://e", "CACHE_ENTRIES": "10", "CACHE_ALIKE_ABOVE": "0.9"}
    config = DispatcherConfig.from_environment({**values, "CACHE_PATH": str(tmp_path / "answers.db")})
    edge = FakeTier(card("edge"))
    with served(tier_app(FakeTier(card("device")))) as device_url, served(tier_app(edge)) as edge_url:
        app = create_dispatcher(replace(config, device_url=device_url, edge_url=edge_url))
        client = app.test_client()
        assert [source(post(client, "how are you?")) for _ in range(2)] == ["edge", "cache"]
        assert source(post(client, "how are you?", X_Conversation_Id="c")) == "cache"
        assert source(post(client, "who are you?", X_Conversation_Id="c")) == "edge"
        headers = {"X-Tenant": "anna"}
        assert client.delete("/v1/conversations/c", headers=headers).json["deleted"] == 1
        assert source(post(client, "who are you?")) == "edge"
        assert len(edge.prompts) == 3
    plain = dispatcher_app("http://127.0.0.1:1", "http://127.0.0.1:2").test_client()
    assert plain.delete("/v1/conversations/c", headers=headers).status_code == 404


@pytest.mark.parametrize(
    ("key", "value"),
    [("CACHE_ENTRIES", "-1"), ("CACHE_RETENTION_S", "nan"), ("CACHE_ALIKE_ABOVE", "2"), ("CACHE_X", "1")],
)
def test_bad_settings_are_named(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        DispatcherConfig.from_environment({"DEVICE_URL": "http://d", "EDGE_URL": "http://e", key: value})


def test_a_file_that_cannot_be_a_cache_stops_the_start(tmp_path: Path) -> None:
    config = CacheConfig(entries=1, path=tmp_path / "missing" / "answers.db")
    with pytest.raises(ConfigError, match="cannot be used as a cache"):
        config.open()
