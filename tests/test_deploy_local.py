"""The bundle as real processes: ready, reachable, stopped, and no orphan."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import httpx
import pytest

from deploy.errors import StartError
from deploy.local.bundle import Bundle, Settings, answers, site
from deploy.local.console import Console
from deploy.local.process import listen
from deploy.stack import parse

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def stack(*names: str, environment: str = "{}"):
    command = (
        f"gunicorn --bind x --worker-class gthread --threads 8 --no-control-socket --chdir {TESTS} standin_app:app"
    )
    functions = "".join(
        f"\n  {name}: {{image: i, handler: h, fprocess: '{command}', environment: {environment}}}" for name in names
    )
    return parse(f"functions:{functions}", {})


def settings(**changes):
    return Settings(site(ROOT, {}), port=0, stop_timeout_s=5.0, **changes)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def until(holds, limit_s: float = 10.0) -> bool:
    """Poll; the limit only bounds a failing run."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.02)
    return False


class Log(list):
    def __call__(self, name, line):
        self.append((name, line))


@pytest.fixture(scope="module")
def bundle():
    log = Log()
    with Bundle(stack("dispatcher", "device", environment="{NAME: standin, mode: http}"), settings(), log) as made:
        made.log = log
        yield made


@pytest.fixture
def client(bundle):
    with httpx.Client(base_url=bundle.url, trust_env=False, timeout=10) as made:
        yield made


def test_a_function_is_reached_by_name_with_path_and_query(client):
    said = client.post("/function/device/a/b%20c?q=1&r=%2F", content="hello").json()
    assert (said["method"], said["path"], said["body"]) == ("POST", "/a/b%20c?q=1&r=%2F", "hello")
    assert client.get("/function/device").json()["path"] == "/"
    assert client.get("/function/device?x=1").json()["path"] == "/?x=1"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("POST", "/"), ("GET", "/healthz")]
)
def test_the_front_door_leads_to_the_dispatcher(bundle, client, method, path):
    said = client.request(method, path).json()
    assert said["path"] == path
    assert said["master"] == bundle.processes[0].pid


def test_the_environment_of_a_function_is_its_own(client):
    environment = client.get("/function/device").json()["environment"]
    assert environment["NAME"] == "standin"
    assert "mode" not in environment
    assert "PYTEST_CURRENT_TEST" not in environment


def test_bodies_travel_in_chunks_as_the_real_gateway_sends_them(client):
    """A function that reads only Content-Length sees an empty body here, as it would in the cluster."""
    for body in (b"plain", iter([b"chunk", b"ed"])):
        said = client.post("/function/device/", content=body).json()
        assert said["chunked"]
        assert said["body"] in {"plain", "chunked"}


def test_calls_are_marked_and_hop_by_hop_headers_stay_behind(client):
    answer = client.get("/function/device/", headers={"Connection": "close"})
    said = answer.json()
    assert said["call_id"] == answer.headers["X-Call-Id"]
    assert said["start_time"] == answer.headers["X-Start-Time"]
    assert int(said["start_time"]) > 10**18
    assert said["connection"] != "close"
    assert client.get("/function/device/", headers={"X-Call-Id": "mine"}).headers["X-Call-Id"] == "mine"


@pytest.mark.parametrize(
    ("method", "path", "says"),
    [
        ("GET", "/function/cloud/x", "function 'cloud' is not deployed here; deployed: dispatcher, device"),
        ("GET", "/nowhere", "GET /nowhere is not known"),
        ("GET", "/", "GET / is not known"),
    ],
)
def test_an_unknown_place_is_a_404_in_json(client, method, path, says):
    answer = client.request(method, path)
    assert answer.status_code == 404
    assert says in answer.json()["error"]["message"]
    assert answer.headers["X-OpenFaaS-Internal"] == "gateway"


def test_too_large_a_body_is_a_413_and_the_next_request_works(client):
    answer = client.post("/function/device/", content=b"x" * (17 * 1024 * 1024))
    assert answer.status_code == 413
    assert "send a smaller one" in answer.json()["error"]["message"]
    assert client.get("/healthz").is_success


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("text/event-stream", True),
        ("text/event-stream, */*", True),
        ("application/json", False),
        ("*/*, text/event-stream", False),
    ],
)
def test_only_an_accept_that_starts_with_event_stream_streams(client, accept, streams):
    """As CE: an `openai` client without that header gets one buffered answer."""
    headers = {"Accept": accept, "X-Gap-S": "0.05"}
    with client.stream("GET", "/function/device/stream", headers=headers) as answer:
        assert ("Content-Length" not in answer.headers) == streams
        pieces = list(answer.iter_raw())
    assert b"".join(pieces) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert (len(pieces) == 3) == streams


def test_one_function_dies_the_others_go_on_and_nobody_restarts_it():
    log = Log()
    with Bundle(stack("dispatcher", "edge"), settings(), log) as made:
        stop = threading.Event()
        watcher = threading.Thread(target=made.watch, args=(stop,))
        watcher.start()
        answer = httpx.get(f"{made.url}/function/edge/die", trust_env=False, timeout=10)
        assert answer.status_code == 502
        assert until(lambda: any("ended with status" in line for name, line in log if name == "edge"))
        answer = httpx.get(f"{made.url}/function/edge/", trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "function_unreachable")
        assert httpx.get(f"{made.url}/healthz", trust_env=False).is_success
        stop.set()
        watcher.join()


def test_stop_lets_a_request_finish_and_leaves_no_process(tmp_path):
    with Bundle(stack("dispatcher"), settings(), Log()) as made:
        said = httpx.get(f"{made.url}/healthz", trust_env=False).json()
        pids = [said["pid"], said["master"], *(p.pid for p in made.processes)]
        seen = []
        begun = tmp_path / "begun"

        def call():
            url, headers = f"{made.url}/function/dispatcher/slow", {"X-Mark": str(begun)}
            seen.append(httpx.get(url, headers=headers, trust_env=False, timeout=10))

        caller = threading.Thread(target=call)
        caller.start()
        assert until(begun.exists)
    caller.join()
    assert seen[0].status_code == 200
    assert [p.exit_code for p in made.processes] == [0, 0]
    assert not any(map(alive, pids))
    assert not answers(made.url)


def test_a_function_that_cannot_start_is_named_with_its_last_lines():
    broken = parse(
        "functions: {edge: {image: i, handler: h, fprocess: gunicorn --bind x --no-control-socket nowhere:app}}", {}
    )
    log = Log()
    with (
        pytest.raises(StartError, match=r"edge ended with status \d+ before it was ready") as caught,
        Bundle(broken, settings(), log),
    ):
        pass
    assert "ModuleNotFoundError" in str(caught.value)


def test_a_function_that_never_gets_ready_is_stopped():
    made = Bundle(stack("edge", environment='{NEVER_READY: "1"}'), settings(ready_timeout_s=6.0), Log())
    with pytest.raises(StartError, match=r"edge was not ready after 6 s \(its last answer: 503\)"):
        made.__enter__()
    assert all(p.exit_code is not None for p in made.processes)


def test_a_taken_port_is_one_sentence():
    taken = listen()
    taken.listen()
    port = taken.getsockname()[1]
    with taken, pytest.raises(StartError, match=f"port {port} cannot be used"):
        Bundle(stack("edge"), Settings(site(ROOT, {}), port=port), Log()).__enter__()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ties children to parents on Linux only")
def test_killed_outright_the_bundle_leaves_no_orphan(tmp_path):
    """SIGKILL gives the parent no chance to clean up; the kernel then ends the children."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, threading
        sys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}]
        from test_deploy_local import Bundle, settings, stack
        with Bundle(stack("edge"), settings(), lambda name, line: None) as made:
            print(*(p.pid for p in made.processes), flush=True)
            threading.Event().wait()
        """)
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    with parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        os.kill(parent.pid, signal.SIGKILL)
    assert until(lambda: not any(map(alive, pids)))


def test_log_lines_carry_their_function_and_colour_only_on_a_terminal(capsys):
    class Terminal:
        text = ""

        def __init__(self, tty):
            self.tty = tty

        def isatty(self):
            return self.tty

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    plain, coloured = Terminal(tty=False), Terminal(tty=True)
    Console(plain, ["edge", "gateway"])("edge", "hello")
    Console(coloured, ["edge", "gateway"])("edge", "hello")
    assert plain.text == "edge    | hello\n"
    assert coloured.text == "\x1b[36medge    |\x1b[0m hello\n"
