"""Ranks as they are really run: gunicorn, signals, a socket between them. No answer changes, and none is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from models.build.assemble import build
from models.build.gguf_source import GgufSource
from tests.fakes import free_port, wait_until
from tests.test_functions_gunicorn import CHAT, Server, gunicorn
from tests.test_shards_processes import APP, BODY, Chain, streamed
from tests.tiny_models import quiet, write_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tier")
    build(GgufSource(write_gguf(folder / "tiny.gguf")), folder / "tier", "fp32", None, quiet)
    return folder / "tier"


@pytest.fixture
def chain(path: Path) -> Iterator[Chain]:
    """Rank 0 of two, and two replicas of rank 1; passes last as long as on a much slower machine."""
    common = {"MODEL_PATH": str(path), "THREADS": "1", "SLOWDOWN": "20"}
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        tails = [
            stack.enter_context(gunicorn(APP, **common, TENSOR_RANK="1/2", SHARD_LISTEN=str(port))) for port in ports
        ]
        peers = "|".join(f"127.0.0.1:{port}" for port in ports)
        head = stack.enter_context(gunicorn(APP, **common, TENSOR_RANK="0/2", TENSOR_PEERS=peers))
        for server in (*tails, head):
            server.wait_ready()
        yield Chain(head, (tails[0], tails[1]))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_signal_to_the_rank_at_work_changes_no_answer(chain: Chain, number: int) -> None:
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
    other = {**common, "TENSOR_RANK": "1/2", "SHARD_LISTEN": port}
    with gunicorn(APP, **common, TENSOR_RANK="0/2", TENSOR_PEERS=f"127.0.0.1:{port}") as head:
        with gunicorn(APP, **other) as first:
            first.wait_ready()
            head.wait_ready()
            assert head.client.post(CHAT, json=BODY).status_code == 200
        reply = head.client.post(CHAT, json=BODY)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shards_lost")
        assert int(reply.headers["Retry-After"]) >= 1
        assert head.client.get("/_/ready").status_code == 503
        with gunicorn(APP, **other) as second:
            second.wait_ready()
            wait_until(lambda: head.client.get("/_/ready").status_code == 200)
            assert head.client.post(CHAT, json=BODY).status_code == 200


@pytest.mark.slow
def test_a_rank_that_falls_silent_ends_the_request(path: Path) -> None:
    """No power, no network: nothing says that it is gone. With nobody in its place, the request ends with the code."""
    common = {"MODEL_PATH": str(path), "THREADS": "1", "SLOWDOWN": "20"}
    port = str(free_port())
    with (
        gunicorn(APP, **common, TENSOR_RANK="1/2", SHARD_LISTEN=port) as other,
        gunicorn(APP, **common, TENSOR_RANK="0/2", TENSOR_PEERS=f"127.0.0.1:{port}") as head,
    ):
        other.wait_ready()
        head.wait_ready()
        with head.client.stream("POST", CHAT, json={**BODY, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(line for line in lines if "content" in line)
            os.killpg(other.process.pid, signal.SIGSTOP)
            ended = next(line for line in lines if "error" in line)
        os.killpg(other.process.pid, signal.SIGCONT)
    assert "shards_lost" in ended
