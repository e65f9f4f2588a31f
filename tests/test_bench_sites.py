"""Two sites whose link is cut, and functions replaced under load, as processes with fake tiers; what is summed up."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench import rolling, sites
from bench.chaos import Shot
from bench.client import Reply
from bench.steady import Timed, between, steadily
from deploy.local.balance import Balance
from deploy.local.gateway import Config, create_app
from tests.fake_bundle import QUERIES, start_site, start_whole
from tests.fakes import free_port, served

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


def reply(source: str = "device", *, degraded: bool = False, reason: str = "confident") -> Reply:
    known = {"text": "", "frame": {}, "route": source, "confidence": 0.9, "threshold": 0.8, "latency_ms": 1.0}
    cost = {"network_bytes": 0, "joules": None, "joules_source": ""}
    return Reply(source=source, degraded=degraded, reason=reason, **known, **cost)


def timed(at_s: float, answered: Reply | None, status: int = 200) -> Timed:
    return Timed(at_s, at_s + 0.1, Shot(100.0, answered, status))


@pytest.mark.slow
def test_two_sites_the_link_cut_under_load_and_joined_again() -> None:
    """The device site answers all of it, flagged; the edge is asked again without anybody's doing."""
    found = sites.run(start_site, QUERIES, sites.Plan(rate=20, seconds=1.5, deadline_ms=2000))
    assert found.failings == [], found
    joined, cut, again = found.phases
    assert (cut.answered, cut.lies) == (cut.sent, {})
    assert set(cut.reasons) == {"edge_unavailable"}
    assert min(joined.sources["edge"], again.sources["edge"], cut.flagged) > 0


@pytest.mark.slow
def test_every_function_replaced_under_load_and_no_request_fails() -> None:
    found = rolling.run(start_whole, QUERIES, rolling.Plan(rate=20, pause_s=0.3, deadline_ms=10_000))
    assert found.failings == [], found
    assert [restart.name for restart in found.restarts] == ["federation", "dispatcher", "device", "edge"]
    assert {"device", "edge", "federation"} <= set(found.sources)


def test_requests_leave_at_a_constant_rate_whatever_comes_back() -> None:
    enough, numbers = threading.Event(), []

    def ask(number: int) -> Shot:
        numbers.append(number)
        if number == 5:
            enough.set()
        return Shot(1.0)

    with steadily(ask, 100) as steady:
        assert enough.wait(20)
    assert sorted(numbers) == list(range(len(steady.timed)))
    assert len(between(steady.timed, 0, float("inf"))) == len(numbers)


@pytest.mark.parametrize(
    ("cut", "again", "failing"),
    [
        ([reply(degraded=True, reason="edge_unavailable")], [reply("edge")], []),
        ([None], [reply("edge")], ["every request is answered", "what the cut costs is flagged"]),
        ([reply()], [reply("edge")], ["what the cut costs is flagged"]),
        ([reply("canned", reason="edge_unavailable")], [reply("edge")], ["what the cut costs is flagged"]),
        (
            [reply("edge"), reply(degraded=True, reason="edge_unavailable")],
            [reply("edge")],
            ["nothing comes from the edge while the link is cut", "what the cut costs is flagged"],
        ),
        ([reply(degraded=True, reason="edge_unavailable")], [reply()], ["the edge is asked again"]),
    ],
)
def test_what_a_cut_link_demands(cut: list[Any], again: list[Any], failing: list[str]) -> None:
    shots = [timed(1, reply("edge")), *(timed(11, r) for r in cut), *(timed(21, r) for r in again)]
    found = sites.summed(shots, [0, 10, 20, float("inf")])
    assert found.failings == failing
    assert found.as_dict()["verdict"]["passed"] == (not failing)
    assert found.resumed_s == (None if "the edge is asked again" in failing else pytest.approx(1.1))


def test_a_request_on_its_way_when_the_link_is_cut_may_still_come_from_the_edge() -> None:
    shots = [timed(1, reply("edge")), timed(9.95, reply("edge")), timed(11, reply(degraded=True, reason="edge_gone"))]
    found = sites.summed([*shots, timed(21, reply("edge"))], [0, 10, 20, float("inf")])
    assert found.failings == []


@pytest.mark.parametrize(
    ("shots", "status", "failing"),
    [
        ([timed(1, reply())], 0, []),
        ([timed(1, reply()), timed(2, None, 502)], 0, ["no request fails"]),
        ([timed(1, reply())], -9, ["every old replica ends with 0"]),
        ([], 0, ["no request fails"]),
    ],
)
def test_what_a_rolling_restart_demands(shots: list[Timed], status: int, failing: list[str]) -> None:
    found = rolling.summed(shots, [rolling.Restart("edge", 0.0, 1.0, status)])
    assert found.failings == failing
    assert found.as_dict()["verdict"]["passed"] == (not failing)


# ---- the gateway, when a replica closes instead of answering ----


@contextmanager
def listening(answers: list[bytes]) -> Iterator[tuple[str, list[int]]]:
    """A server that says the next of `answers` to each connection and closes it; gives the address and the calls."""
    calls: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for said in answers:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                calls.append(len(said))
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(said)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", calls
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.mark.parametrize(
    ("answers", "status", "calls"),
    [
        ([b"", ANSWER], 200, 2),
        ([b"", b"", ANSWER], 502, 2),
        ([b"HTTP/1.1 2", ANSWER], 200, 2),
        ([b"nonsense\r\n\r\n", ANSWER], 502, 1),
        ([ANSWER[:-1], ANSWER], 502, 1),
    ],
)
def test_a_replica_that_closes_before_it_answers_is_asked_once_more(
    answers: list[bytes], status: int, calls: int
) -> None:
    with (
        listening(answers) as (address, called),
        served(create_app(Config({"edge": address}))) as url,
    ):
        answer = httpx.post(f"{url}/function/edge/", content=b"hello", trust_env=False, timeout=30)
        assert (answer.status_code, len(called)) == (status, calls)


def test_another_replica_answers_for_one_that_is_gone(tmp_path: Path) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    with listening([ANSWER] * 3) as (there, called):
        entries = f'[{{"address": "{gone}", "state": "ready"}}, {{"address": "{there}", "state": "ready"}}]'
        listing = tmp_path / "replicas.json"
        listing.write_text(f'{{"edge": {{"replicas": {entries}}}}}')
        assert Balance({}, listing).names() == ["edge"]
        with served(create_app(Config({}, listing))) as url:
            for _ in range(3):
                assert httpx.get(f"{url}/function/edge/", trust_env=False, timeout=30).text == "ok"
        assert len(called) == 3
