"""Shards and ranks as they are really run: gunicorn, signals, sockets between them. No answer changes, none is lost."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from models.build.assemble import build
from models.build.gguf_source import GgufSource
from tests.fakes import free_port, user, wait_until
from tests.test_functions_gunicorn import CHAT, Server, gunicorn
from tests.tiny_models import SHAPE, quiet, write_gguf

APP = "functions.edge.app:create_app()"
BODY = {"messages": user("the"), "max_tokens": 48, "temperature": 1.5, "seed": 3, "skill": "chat"}


@dataclass(frozen=True)
class Parts:
    """What the two parts of a tier are told: which they are, and the first in `peers` where replicas of the other are.

    `joint` stands between their addresses.
    """

    quant: str
    first: Mapping[str, str]
    second: Mapping[str, str]
    peers: str
    joint: str


SHARDS = Parts("int4", {"SHARD_LAYERS": "0-0"}, {"SHARD_LAYERS": f"1-{SHAPE.n_layers - 1}"}, "SHARD_NEXT", ",")
RANKS = Parts("fp32", {"TENSOR_RANK": "0/2"}, {"TENSOR_RANK": "1/2"}, "TENSOR_PEERS", "|")


@dataclass(frozen=True)
class Chain:
    """A head, and two replicas of what comes after."""

    head: Server
    tails: tuple[Server, Server]

    def at_work(self) -> Server:
        return next(tail for tail in self.tails if sessions(tail))


def sessions(tail: Server) -> float:
    page = tail.client.get("/metrics").text
    found = re.search(r"^edgecascade_shard_sessions\{.*\} (\S+)$", page, re.MULTILINE)
    assert found
    return float(found[1])


@pytest.fixture(scope="module", params=[SHARDS, RANKS], ids=["shards", "ranks"])
def parts(request: pytest.FixtureRequest) -> Parts:
    found: Parts = request.param
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, parts: Parts) -> Path:
    folder = tmp_path_factory.mktemp("tier")
    build(GgufSource(write_gguf(folder / "tiny.gguf")), folder / "tier", parts.quant, None, quiet)
    return folder / "tier"


@contextmanager
def running(path: Path, parts: Parts, replicas: int) -> Iterator[tuple[Server, list[Server]]]:
    """The first part, and replicas of the second; each pass lasts as long as on a much slower machine."""
    common = {"MODEL_PATH": str(path), "THREADS": "1", "SLOWDOWN": "20"}
    ports = [str(free_port()) for _ in range(replicas)]
    peers = {parts.peers: parts.joint.join(f"127.0.0.1:{port}" for port in ports)}
    with ExitStack() as stack:
        tails = [stack.enter_context(gunicorn(APP, **common, **parts.second, SHARD_LISTEN=port)) for port in ports]
        head = stack.enter_context(gunicorn(APP, **common, **parts.first, **peers))
        for server in (*tails, head):
            server.wait_ready()
        yield head, tails


@pytest.fixture
def chain(path: Path, parts: Parts) -> Iterator[Chain]:
    """Two replicas of the second part."""
    with running(path, parts, 2) as (head, (one, other)):
        yield Chain(head, (one, other))


def streamed(head: Server, then: Any = None) -> str:
    """An answer; `then` is called after its first piece."""
    text = ""
    with head.client.stream("POST", CHAT, json={**BODY, "stream": True}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            data = line.removeprefix("data: ")
            if not line or data == "[DONE]":
                continue
            event = json.loads(data)
            assert "error" not in event, event
            piece = (event["choices"] or [{}])[0].get("delta", {}).get("content") or ""
            if piece and not text and then:
                then()
            text += piece
    return text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_signal_to_the_part_at_work_changes_no_answer(chain: Chain, number: int) -> None:
    wanted = streamed(chain.head)
    assert len(wanted) > 8
    struck: list[Server] = []

    def strike() -> None:
        struck.append(chain.at_work())
        group = struck[0].process.pid
        (os.kill if number == signal.SIGTERM else os.killpg)(group, number)

    assert streamed(chain.head, strike) == wanted
    assert streamed(chain.head) == wanted, "the next request goes to the other"
    if number == signal.SIGTERM:
        assert struck[0].process.wait(30) == 0


@pytest.mark.slow
def test_with_nobody_left_it_says_503_and_is_ready_again_with_the_next(path: Path, parts: Parts) -> None:
    common = {"MODEL_PATH": str(path), "THREADS": "1"}
    port = str(free_port())
    tail = {**common, **parts.second, "SHARD_LISTEN": port}
    with gunicorn(APP, **common, **parts.first, **{parts.peers: f"127.0.0.1:{port}"}) as head:
        with gunicorn(APP, **tail) as first:
            first.wait_ready()
            head.wait_ready()
            assert head.client.post(CHAT, json=BODY).status_code == 200
        reply = head.client.post(CHAT, json=BODY)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shards_lost")
        assert int(reply.headers["Retry-After"]) >= 1
        assert head.client.get("/_/ready").status_code == 503
        with gunicorn(APP, **tail) as second:
            second.wait_ready()
            wait_until(lambda: head.client.get("/_/ready").status_code == 200)
            assert head.client.post(CHAT, json=BODY).status_code == 200


@pytest.mark.slow
def test_a_part_that_falls_silent_ends_the_request(path: Path, parts: Parts) -> None:
    """No power, no network: nothing says that it is gone. With nobody in its place, the request ends with the code."""
    with running(path, parts, 1) as (head, (other,)):
        with head.client.stream("POST", CHAT, json={**BODY, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(line for line in lines if "content" in line)
            os.killpg(other.process.pid, signal.SIGSTOP)
            ended = next(line for line in lines if "error" in line)
        os.killpg(other.process.pid, signal.SIGCONT)
    assert "shards_lost" in ended
