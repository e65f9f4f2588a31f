"""What was acknowledged is there after SIGKILL: the function as it is really run, killed while many write."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.fakes import FakeTier, card, free_port, http_client, served, tier_app, user, wait_until

ROOT = Path(__file__).parents[1]
WRITERS = 4


@contextmanager
def gunicorn(**settings: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """The federation in processes of its own, ready; killed at the end, all of them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = ["--bind", f"fd://{listener.fileno()}", "--worker-class", "gthread", "--threads", "32"]
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *words, "--no-control-socket", "functions.federation.app:create_app()"],
            cwd=ROOT,
            env={**os.environ, "FEDERATION_NODES": "near=http://127.0.0.1:1", **settings},
            pass_fds=(listener.fileno(),),
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with http_client(url) as client:
            wait_until(lambda: answers(client), timeout_s=60)
            yield process, client
    finally:
        kill(process)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/_/ready").is_success
    except httpx.TransportError:
        return False


def kill(process: subprocess.Popen[bytes]) -> None:
    """End master and worker at once, without a word."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def waiting_readers(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("edgecascade_waiting_readers{"))


def test_nothing_that_was_acknowledged_is_lost(tmp_path: Path) -> None:
    """Four writers, killed in the middle; then every acknowledged event and question is there, once."""
    port = free_port()
    settings = {"FEDERATION_STATE_PATH": str(tmp_path), "EDGE_URL": f"http://127.0.0.1:{port}"}
    events: dict[str, int] = {}
    questions: list[str] = []

    with gunicorn(**settings) as (process, client):

        def write(writer: int) -> None:
            number = 0
            while True:
                name = f"w{writer}-{number}"
                event = {"id": name, "conversation": "tour", "kind": "fact", "body": number}
                question: dict[str, Any] = {"id": name, "request": {"messages": user("hello"), "skill": "assistant"}}
                try:
                    taken = client.post("/v1/state/events", json=event).json()
                    events[name] = taken["sequence"]
                    if number < 3:
                        assert client.post("/v1/deferred", json=question).status_code == 202
                        questions.append(name)
                except httpx.TransportError:
                    return
                number += 1

        threads = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(events) >= 60, timeout_s=120)
        kill(process)
        for thread in threads:
            thread.join()

    edge = FakeTier(card("edge"))
    with served(tier_app(edge), port), gunicorn(**settings) as (_, client):
        found: dict[str, int] = {}
        after = 0
        while page := client.get("/v1/state/events", params={"after": after}).json()["events"]:
            for one in page:
                assert one["id"] not in found
                found[one["id"]] = after = one["sequence"]
        assert events.items() <= found.items()
        for name in questions:
            wait_until(lambda n=name: client.get(f"/v1/deferred/{n}").json()["status"] == "answered", timeout_s=60)


def test_it_stops_when_told_though_a_reader_waits(tmp_path: Path) -> None:
    with gunicorn(FEDERATION_STATE_PATH=str(tmp_path)) as (process, client):
        replies: list[httpx.Response] = []
        reader = threading.Thread(
            target=lambda: replies.append(client.get("/v1/state/events", params={"wait_ms": 25_000}))
        )
        reader.start()
        wait_until(lambda: waiting_readers(client) == 1)
        process.send_signal(signal.SIGTERM)
        reader.join(timeout=30)
        assert process.wait(timeout=30) == 0
        assert [reply.json()["events"] for reply in replies] == [[]]
