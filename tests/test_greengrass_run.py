"""What keeps a function on a core device: it tells how the function is, hands SIGTERM on, and ends when that is not."""

import json
import logging
import os
import signal
import sys
import threading

import httpx
import psutil
import pytest

from deploy.greengrass.run import Health, Keeper, ask, keeper
from deploy.greengrass.status import IpcPublish, StatusTopic
from tests.fakes import free_port, wait_until
from tests.greengrass_rigs import ROOT
from tests.nucleus import Nucleus

GUNICORN = [
    "--worker-class",
    "gthread",
    "--threads",
    "4",
    "--graceful-timeout",
    "3",
    "--timeout",
    "120",
    "--no-control-socket",
]


class Topic:
    """A nucleus's local topics; refuses with `error` while there is one."""

    def __init__(self):
        self.heard, self.error, self.connections, self.closed = [], None, 0, 0

    def connect(self):
        self.connections += 1
        if isinstance(self.error, OSError):
            raise self.error
        return self

    def __call__(self, topic, message):
        if self.error:
            raise self.error
        self.heard.append((topic, dict(message)))

    def close(self):
        self.closed += 1


@pytest.fixture
def handlers():
    """The keeper takes SIGTERM and SIGINT for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def kept(words, port, topic=None, **more):
    status = StatusTopic("edgecascade/status/f" if topic else "", topic.connect if topic else IpcPublish)
    return Keeper("f", words, ("127.0.0.1", port), status, look_every_s=0.02, **more)


SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(sys.argv[2]))
        self.end_headers()
        self.wfile.write(sys.argv[3].encode())

    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(port, status, body):
    """A function that says one thing of itself."""
    return [sys.executable, "-c", SERVER, str(port), str(status), json.dumps(body)]


@pytest.mark.parametrize(
    ("status", "body", "health"),
    [
        (200, {"ready": True, "reason": ""}, Health("ready")),
        (429, {"ready": False, "reason": "the queue is full"}, Health("ready", "the queue is full")),
        (503, {"ready": False, "reason": "loading"}, Health("starting", "loading")),
        (503, {"reason": "loading failed: no tier"}, Health("failed", "loading failed: no tier")),
        (503, [], Health("starting")),
    ],
)
def test_how_a_function_is_stands_in_its_readiness(handlers, status, body, health):
    port, topic = free_port(), Topic()
    made = kept(server(port, status, body), port, topic)

    def stop():
        wait_until(lambda: health.state in [message["state"] for _, message in topic.heard])
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop if health.state != "failed" else bool)
    thread.start()
    assert made.run() == (1 if health.state == "failed" else 0)
    thread.join()
    assert ask(made.address).state == "silent"
    assert topic.heard[0][0] == "edgecascade/status/f"
    assert health.reason in [message["reason"] for _, message in topic.heard]
    told = [message["state"] for _, message in topic.heard]
    assert health.state in told
    assert told[-1] == "stopped"
    assert topic.closed == 1


def test_a_function_that_never_answers_is_ended(handlers):
    topic = Topic()
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert kept(words, free_port(), topic, longest_silence_s=0.1).run() == 1
    assert [message["state"] for _, message in topic.heard] == ["silent", "stopped"]
    assert not psutil.Process().children()


@pytest.mark.parametrize(("ends", "status"), [("raise SystemExit(3)", 3), ("pass", 1)])
def test_a_function_that_ends_by_itself_is_a_failure(handlers, ends, status):
    assert kept([sys.executable, "-c", ends], free_port()).run() == status


def start(port, environment=None):
    words = [sys.executable, "-m", "deploy.greengrass.run", "f", "--", "gunicorn", "--bind", f"127.0.0.1:{port}"]
    words += [*GUNICORN, "--chdir", str(ROOT / "tests"), "standin_app:app"]
    nucleus = Nucleus(ROOT, "amd64")
    nucleus.words = lambda component, phase: words
    nucleus._work = lambda component: ROOT
    return nucleus.start(None, PYTHONPATH=str(ROOT), **(environment or {}))


def answers(port):
    return ask(("127.0.0.1", port)).state == "ready"


def test_sigterm_lets_a_request_finish_and_leaves_no_process(tmp_path):
    port, begun, seen = free_port(), tmp_path / "begun", []
    process = start(port)
    wait_until(lambda: answers(port))

    def call():
        headers = {"X-Mark": str(begun)}
        seen.append(
            httpx.get(f"http://127.0.0.1:{port}/slow", headers=headers, trust_env=False, timeout=20).status_code
        )

    caller = threading.Thread(target=call)
    caller.start()
    wait_until(begun.exists)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    status, _ = Nucleus.stop(process)
    caller.join()
    process.stdout.close()
    assert (status, seen) == (0, [200])
    assert not any(child.is_running() for child in children)


def test_a_request_that_goes_on_too_long_does_not_cost_an_orderly_end():
    """Status 0, not SIGKILL's: everything had ended before the nucleus lost its patience."""
    port = free_port()
    process = start(port)
    wait_until(lambda: answers(port))
    url, headers = f"http://127.0.0.1:{port}/stream", {"X-Gap-S": "60"}
    with httpx.stream("GET", url, headers=headers, trust_env=False, timeout=20) as answer:
        next(answer.iter_raw())
        status, _ = Nucleus.stop(process)
    process.stdout.close()
    assert status == 0


def test_without_a_nucleus_the_function_runs_all_the_same():
    """The real library, and no socket to speak to: said once, in the log."""
    port = free_port()
    process = start(port, {"STATUS_TOPIC": "edgecascade/status/f"})
    wait_until(lambda: answers(port))
    status, _ = Nucleus.stop(process)
    said = process.stdout.read()
    process.stdout.close()
    assert status == 0
    assert said.count("no status to edgecascade/status/f: KeyError") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage"),
        (["f", "gunicorn", "--bind", "x:1"], "usage"),
        (["f", "--", "gunicorn", "--bind"], "usage"),
        (["f", "--", "gunicorn", "--bind", "127.0.0.1"], "BIND must look like 127.0.0.1:8081"),
        (["f", "--", "gunicorn", "--bind", "127.0.0.1:http"], "BIND must look like"),
    ],
)
def test_a_bad_command_line_is_one_sentence(arguments, says):
    with pytest.raises(SystemExit, match=says):
        keeper(arguments, {})


@pytest.mark.parametrize(
    ("bind", "asked"),
    [
        ("127.0.0.1:1", "127.0.0.1"),
        ("0.0.0.0:1", "127.0.0.1"),
        (":1", "127.0.0.1"),
        ("[::1]:1", "::1"),
    ],
)
def test_a_function_is_asked_where_it_listens(bind, asked):
    assert keeper(["f", "--", "gunicorn", "--bind", bind, "a:b"], {}).address == (asked, 1)


# ---- the topic ----


def test_what_a_nucleus_lacks_is_said_once_and_tried_again_later(caplog):
    from awsiot.greengrasscoreipc.model import ServiceError, UnauthorizedError

    now, topic = [0.0], Topic()
    status = StatusTopic("t", topic.connect, lambda: now[0])
    topic.error = ServiceError(message="not implemented")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not status.tell({"state": "ready"})
            now[0] += 61
        assert [record.args[1] for record in caplog.records] == ["ServiceError"]
        topic.error = UnauthorizedError(message="no policy")
        assert not status.tell({"state": "ready"})
        assert caplog.records[-1].args[1] == "UnauthorizedError"
    connections = topic.connections
    assert not status.tell({"state": "ready"})  # within the minute nobody is asked
    assert topic.connections == connections
    now[0], topic.error = now[0] + 61, None
    assert status.tell({"state": "ready"})
    assert topic.heard == [("t", {"state": "ready"})]


def test_without_a_topic_nobody_is_told():
    topic = Topic()
    assert not StatusTopic("", topic.connect).tell({"state": "ready"})
    assert topic.connections == 0


def test_a_connection_that_does_not_close_is_no_fault():
    topic = Topic()
    status = StatusTopic("t", topic.connect)
    assert status.tell({})

    def broken():
        raise RuntimeError

    topic.close = broken
    status.close()
    status.close()
