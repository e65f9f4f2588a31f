"""Shards as they are really run: gunicorn, signals, a socket between them. No answer changes, and none is lost."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
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


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tier")
    build(GgufSource(write_gguf(folder / "tiny.gguf")), folder / "tier", "int4", None, quiet)
    return folder / "tier"


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


@pytest.fixture
def chain(path: Path) -> Iterator[Chain]:
    """Each pass lasts as long as on a much slower machine, so that there is time to be killed in."""
    common = {"MODEL_PATH": str(path), "THREADS": "1", "SLOWDOWN": "20"}
    ports = [free_port(), free_port()]
    after = ",".join(f"127.0.0.1:{port}" for port in ports)
    with ExitStack() as stack:
        tails = [
            stack.enter_context(gunicorn(APP, **common, SHARD_LAYERS=f"1-{SHAPE.n_layers - 1}", SHARD_LISTEN=str(port)))
            for port in ports
        ]
        head = stack.enter_context(gunicorn(APP, **common, SHARD_LAYERS="0-0", SHARD_NEXT=after))
        for server in (*tails, head):
            server.wait_ready()
        yield Chain(head, (tails[0], tails[1]))


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
def test_a_signal_to_the_shard_at_work_changes_no_answer(chain: Chain, number: int) -> None:
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
def test_with_nobody_left_it_says_503_and_is_ready_again_with_the_next(path: Path) -> None:
    common = {"MODEL_PATH": str(path), "THREADS": "1"}
    port = str(free_port())
    tail = {**common, "SHARD_LAYERS": f"1-{SHAPE.n_layers - 1}", "SHARD_LISTEN": port}
    with gunicorn(APP, **common, SHARD_LAYERS="0-0", SHARD_NEXT=f"127.0.0.1:{port}") as head:
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
