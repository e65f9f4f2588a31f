"""One contract for the shared log, whoever keeps it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from functions.federation.errors import ConflictError, DeletedError, StoreError
from functions.federation.state.log import DELETED, Bounds, Event, StateLog
from functions.federation.state.sqlite import SqliteLog
from tests.fakes import wait_until
from tests.servers import RedisServer

Make = Callable[..., StateLog]


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "redis"])
def make(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Make]:
    """Opens logs over one and the same store, as the nodes of a federation or a restart would."""
    opened: list[StateLog] = []
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url

    def open_log(**bounds: float) -> StateLog:
        limits = Bounds(**{"max_events": 1000, "retention_s": 3600.0, **bounds})  # type: ignore[arg-type]
        if request.param == "sqlite":
            opened.append(SqliteLog(tmp_path / "state.sqlite", limits, clock))
        else:
            from functions.federation.state.redis import RedisLog

            opened.append(RedisLog(url, limits, prefix=str(tmp_path), clock=clock))
        return opened[-1]

    yield open_log
    for log in opened:
        log.close()


def event(number: int, conversation: str = "tour", body: str = '"seen"') -> Event:
    return Event(f"e{number}", conversation, "fact", "node-1", body)


def ids(log: StateLog, after: int = 0, **options: object) -> list[str]:
    return [entry.event.id for entry in log.read(after, 100, **options).entries]  # type: ignore[arg-type]


def test_events_are_read_in_the_order_they_were_taken(make: Make, clock: Clock) -> None:
    log = make()
    entries = [log.append(event(n, body=f'{{"ü": {n}}}'))[0] for n in range(5)]
    page = log.read(0, 100)
    assert list(page.entries) == entries
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5]
    assert {entry.at for entry in entries} == {clock.now}
    assert (page.upto, page.trimmed) == (5, 0)
    assert ids(log, 3) == ["e3", "e4"]
    assert ids(log, 99) == []


def test_a_second_sending_changes_nothing_and_another_event_under_the_id_is_refused(make: Make) -> None:
    log = make()
    first, new = log.append(event(1))
    again, known = log.append(event(1))
    assert (again, new, known) == (first, True, False)
    assert log.append(replace(event(1), node="node-2")) == (first, False), "another node took the second sending"
    with pytest.raises(ConflictError):
        log.append(event(1, body='"other"'))
    assert ids(log) == ["e1"]


def test_pages(make: Make) -> None:
    log = make()
    for number in range(7):
        log.append(event(number, conversation="even" if number % 2 == 0 else "odd"))
    read, after = [], 0
    while (page := log.read(after, 2, "odd")).entries:
        read += [entry.event.id for entry in page.entries]
        after = page.upto
    assert read == ["e1", "e3", "e5"]
    assert after == 7, "it need not look at the rest again"
    assert log.read(99, 2).upto == 99


def test_all_writers_and_readers_see_one_order(make: Make) -> None:
    """Two nodes, eight threads, and every event sent twice."""
    logs = [make(), make()]

    def write(number: int) -> int:
        return logs[number % 2].append(event(number % 40))[0].sequence

    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(write, range(80)))
    assert given[:40] == given[40:]
    assert sorted(given[:40]) == list(range(1, 41))
    assert ids(logs[0]) == ids(logs[1]) == [f"e{given.index(sequence)}" for sequence in range(1, 41)]


def test_what_was_acknowledged_is_there_after_a_restart_and_numbers_go_on(make: Make) -> None:
    log = make()
    log.append(event(1))
    log.delete("tour")
    log.close()
    again = make()
    assert [entry.event.kind for entry in again.read(0, 10).entries] == [DELETED]
    assert again.append(event(2, "next"))[0].sequence == 3


def test_too_many_events_push_the_oldest_out_and_a_late_reader_is_told(make: Make) -> None:
    log = make(max_events=3)
    for number in range(5):
        log.append(event(number))
    page = log.read(0, 100)
    assert [entry.event.id for entry in page.entries] == ["e2", "e3", "e4"]
    assert page.trimmed == 2
    log.append(event(0))  # its id is forgotten with it
    assert ids(log) == ["e3", "e4", "e0"]


def test_events_age_out_even_if_nobody_writes(make: Make, clock: Clock) -> None:
    log = make(retention_s=60.0)
    log.append(event(1))
    clock.now += 59
    log.append(event(2))
    assert ids(log) == ["e1", "e2"]
    clock.now += 2
    assert ids(log) == ["e2"]
    assert log.read(0, 1).trimmed == 1
    clock.now += 3600
    assert ids(log) == []


def test_a_deleted_conversation_is_gone_and_stays_closed_and_every_reader_learns_it(make: Make) -> None:
    log, other = make(), make()
    for number in range(4):
        log.append(event(number, conversation="mine" if number % 2 else "yours"))
    assert other.delete("mine") == 2
    page = log.read(0, 100)
    assert [(entry.sequence, entry.event.kind) for entry in page.entries] == [(1, "fact"), (3, "fact"), (5, DELETED)]
    assert page.entries[-1].event.conversation == "mine"
    for late in (event(1, "mine"), event(9, "mine")):
        with pytest.raises(DeletedError):
            log.append(late)
    assert (log.is_deleted("mine"), log.is_deleted("yours")) == (True, False)
    assert log.delete("mine") == 0
    assert log.delete("never-seen") == 0
    assert [entry.event.kind for entry in log.read(4, 100).entries] == [DELETED, DELETED]


def test_a_deletion_is_forgotten_when_all_else_of_its_time_is(make: Make, clock: Clock) -> None:
    log = make(retention_s=60.0)
    log.delete("mine")
    clock.now += 61
    assert not log.is_deleted("mine")
    assert log.append(event(1, "mine"))[1]


def test_a_reader_that_waits_is_woken(make: Make) -> None:
    log = make()
    log.append(event(1))
    log.wait(0, 60.0)  # there is something already
    woken = threading.Event()

    def wait() -> None:
        log.wait(1, 60.0)
        woken.set()

    threading.Thread(target=wait, daemon=True).start()
    log.append(event(2))
    assert woken.wait(30.0)


def test_a_reader_that_waits_in_vain_comes_back(make: Make) -> None:
    log = make()
    log.wait(0, 0.01)
    assert ids(log) == []


def test_deleted_text_is_not_left_in_the_file(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "state.sqlite", Bounds())
    log.append(event(1, "mine", '"xyzzy-canary"'))
    log.append(event(2, "yours"))
    assert any(b"xyzzy-canary" in path.read_bytes() for path in tmp_path.iterdir())
    log.delete("mine")
    assert not any(b"xyzzy-canary" in path.read_bytes() for path in tmp_path.iterdir())
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.sqlite")} == {0o600}
    log.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file"):
        SqliteLog(tmp_path / "file" / "state.sqlite", Bounds())


def test_a_killed_redis_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    from functions.federation.state.redis import RedisLog

    log = RedisLog(server.url, Bounds())
    try:
        acknowledged = [log.append(event(number))[0] for number in range(50)]
        server.kill()
        for call in (lambda: log.append(event(50)), lambda: log.read(0, 1), lambda: log.delete("tour")):
            with pytest.raises(StoreError, match="Redis failed"):
                call()
        with pytest.raises(StoreError):
            log.wait(50, 5.0)
        server.start()
        assert list(log.read(0, 100).entries) == acknowledged
        again, new = log.append(replace(event(50)))
        assert (again.sequence, new) == (51, True)
    finally:
        log.close()
        server.kill()


def test_deleted_text_leaves_the_servers_file_too(tmp_path: Path) -> None:
    from functions.federation.state.redis import RedisLog

    def written() -> bool:
        return any(b"xyzzy-canary" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    server = RedisServer(tmp_path)
    server.start()
    log = RedisLog(server.url, Bounds())
    try:
        log.append(event(1, "mine", '"xyzzy-canary"'))
        assert written()
        log.delete("mine")
        wait_until(lambda: not written())
    finally:
        log.close()
        server.kill()


def test_the_address_of_a_dead_redis_is_not_told() -> None:
    from functions.federation.state.redis import RedisLog

    log = RedisLog("redis://:hunter2@127.0.0.1:1", Bounds())
    with pytest.raises(StoreError) as error:
        log.read(0, 1)
    assert "hunter2" not in str(error.value)
    assert "127.0.0.1" not in str(error.value)
    log.close()
