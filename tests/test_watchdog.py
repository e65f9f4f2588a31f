"""One contract for of-watchdog's stand-in and, where it is on the PATH as `fwatchdog`, for the real one.

And every function of stack.yml behind it: started as its own Dockerfile starts it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.stack import Function, load
from functions.dispatcher.config import DispatcherConfig
from functions.federation.config import FederationConfig
from functions.serving import keys as serving_keys
from functions.serving.settings import ConfigError, TierConfig
from functions.serving.tier_app import create_tier_app
from models.artifact.keys import PUBLIC, SEALING, LocalKey, key_text, public_key_of
from models.artifact.store import Artifact
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.build.seal import seal_artifact
from tests.dockerfiles import Image, read_image
from tests.fakes import free_port, http_client, user, wait_until
from tests.tiny_models import quiet, write_adapter, write_gguf

ROOT = Path(__file__).parents[1]
STAND_IN = [sys.executable, str(ROOT / "tests" / "watchdog.py")]
REAL = shutil.which("fwatchdog")
KINDS = {"stand-in": STAND_IN, "real": [REAL or ""]}
TIER = "tests.fakes:create_app_for_gunicorn()"
GUNICORN = "gunicorn --bind 127.0.0.1:PORT --worker-class gthread --workers 1 --threads 16 --no-control-socket"
STAND_IN_APP = f"{GUNICORN} --chdir {ROOT / 'tests'} standin_app:app"
CHAT = "/v1/chat/completions"
NAMES = ("dispatcher", "device", "edge", "federation")
API_KEY, MODEL_KEY, SIGNING_KEY = "a-key-of-the-bundle", b"model-key-model-key-model-key-32", bytes(range(32))


@dataclass(frozen=True)
class Running:
    """A watchdog of its own; `client` talks to it."""

    process: subprocess.Popen[str]
    client: httpx.Client
    log: list[str]

    def wait_ready(self) -> None:
        wait_until(self._is_ready, timeout_s=60)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            return self.client.get("/_/ready").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def watched(words: list[str], fprocess: str, folder: Path, **environment: str) -> Iterator[Running]:
    """Run a function behind a watchdog, on free ports instead of 8080 and 5000."""
    port, inner = free_port(), free_port()
    fprocess = fprocess.replace("127.0.0.1:5000", f"127.0.0.1:{inner}").replace(":PORT", f":{inner}")
    settings = {
        "mode": "http",
        "upstream_url": f"http://127.0.0.1:{inner}",
        "prefix_logs": "false",
        **{key: value for key, value in environment.items() if key != "upstream_url"},
        "port": str(port),
        "fprocess": fprocess,
        "TMPDIR": str(folder),
    }
    folder.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={"PATH": path, "HOME": str(folder), **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log: list[str] = []
    pump = threading.Thread(target=lambda: log.extend(process.stdout or ()), daemon=True)
    pump.start()
    try:
        with http_client(f"http://127.0.0.1:{port}") as client:
            yield Running(process, client, log)
    finally:
        with_group(process, signal.SIGKILL)
        process.wait(20)
        pump.join(20)
        assert process.stdout
        process.stdout.close()


def with_group(process: subprocess.Popen[str], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.skipif(not REAL, reason="no fwatchdog"))])
def words(request: Any) -> list[str]:
    return KINDS[request.param]


def tier(words: list[str], tmp_path: Path, **environment: str) -> Any:
    settings = {"TIER_NAME": "edge", "MODEL_PATH": "nowhere", "ready_path": "/_/ready", **environment}
    return watched(words, f"{GUNICORN} {TIER}", tmp_path / "tmp", **settings)


def chat(tokens: int, **fields: Any) -> dict[str, Any]:
    return {"messages": user("hi"), "max_tokens": tokens, **fields}


# ---- the contract ----


def test_bodies_arrive_in_chunks_and_the_answer_says_how_long_it_took(words: list[str], tmp_path: Path) -> None:
    with watched(words, STAND_IN_APP, tmp_path / "tmp", ready_path="/") as running:
        running.wait_ready()
        for body in (b"plain", iter([b"pla", b"in"])):
            answer = running.client.post("/a/b?c=d", content=body)
            said = answer.json()
            assert (said["body"], said["chunked"], said["path"]) == ("plain", True, "/a/b?c=d")
            assert float(answer.headers["X-Duration-Seconds"]) >= 0


def test_health_is_a_lock_file_and_not_the_function(words: list[str], tmp_path: Path) -> None:
    with watched(words, STAND_IN_APP, tmp_path / "tmp", NEVER_READY="1", ready_path="/_/ready") as running:
        wait_until(lambda: _status(running, "/_/health") == 200)
        wait_until(lambda: _status(running, "/healthz") == 200)
        assert _status(running, "/_/ready") == 503
        (tmp_path / "tmp" / ".lock").unlink()
        assert _status(running, "/_/health") == 503


@pytest.mark.parametrize(("accept", "pieces"), [("text/event-stream", 3), ("a/b, text/event-stream", 3), ("*/*", 1)])
def test_an_answer_is_buffered_unless_accept_names_a_stream(
    words: list[str], tmp_path: Path, accept: str, pieces: int
) -> None:
    """The real one buffers blocks of some KiB, longer answers come in several; ours buffers all."""
    with watched(words, STAND_IN_APP, tmp_path / "tmp", ready_path="/") as running:
        running.wait_ready()
        with running.client.stream("GET", "/stream", headers={"Accept": accept, "X-Gap-S": "0.1"}) as answer:
            found = list(answer.iter_raw())
        assert (b"".join(found), len(found)) == (b"data: 0\n\ndata: 1\n\ndata: 2\n\n", pieces)


def test_above_max_inflight_it_refuses(words: list[str], tmp_path: Path) -> None:
    with tier(words, tmp_path, max_inflight="1", FAKE_TOKEN_S="0.05", MAX_INFLIGHT="4") as running:
        running.wait_ready()
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(running.client.post, CHAT, json=chat(40))
            wait_until(lambda: _status(running, "/_/ready") == 429)
            refused = running.client.post(CHAT, json=chat(1))
            assert (refused.status_code, "X-OpenFaaS-Internal" in refused.headers) == (429, True)
            assert long.result(30).status_code == 200


def test_a_call_that_outlasts_exec_timeout_is_cut(words: list[str], tmp_path: Path) -> None:
    with tier(words, tmp_path, exec_timeout="500ms", FAKE_TOKEN_S="0.05") as running:
        running.wait_ready()
        cut = running.client.post(CHAT, json=chat(100))
        assert (cut.status_code, cut.headers["X-OpenFaaS-Internal"]) == (504, "of-watchdog")
        assert running.client.post(CHAT, json=chat(40), headers={"X-Timeout": "100ms"}).status_code == 504
        assert running.client.post(CHAT, json=chat(1)).status_code == 200


def test_a_caller_that_leaves_is_noticed_by_the_function(words: list[str], tmp_path: Path) -> None:
    with tier(words, tmp_path, FAKE_TOKEN_S="0.02", MAX_INFLIGHT="1", QUEUE_LIMIT="1") as running:
        running.wait_ready()
        with pytest.raises(httpx.ReadTimeout):
            running.client.post(CHAT, json=chat(500), timeout=0.5)
        assert running.client.post(CHAT, json=chat(1), headers={"X-Deadline-Ms": "3000"}).status_code == 200


def test_sigterm_goes_to_the_child_at_once_and_requests_finish(words: list[str], tmp_path: Path) -> None:
    """What still arrives within healthcheck_interval finds a function that lingers; all end well."""
    with tier(words, tmp_path, healthcheck_interval="1s", LINGER_S="3", FAKE_TOKEN_S="0.02") as running:
        running.wait_ready()
        with ThreadPoolExecutor(2) as pool:
            slow = pool.submit(running.client.post, CHAT, json=chat(100))
            wait_until(lambda: _metric(running, "edgecascade_inflight_requests") == 1)
            running.process.send_signal(signal.SIGTERM)
            wait_until(lambda: _metric(running, "edgecascade_ready") == 0)
            assert _status(running, "/_/health") == 503
            assert running.client.post(CHAT, json=chat(1)).status_code == 200
            assert slow.result(30).json()["usage"]["completion_tokens"] == 100
        assert running.process.wait(30) == 0


def test_without_lingering_what_arrives_after_sigterm_is_lost(words: list[str], tmp_path: Path) -> None:
    """This is what LINGER_S is for."""
    with tier(words, tmp_path, healthcheck_interval="5s") as running:
        running.wait_ready()
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: running.client.post(CHAT, json=chat(1)).status_code == 500)


def test_a_child_that_fails_takes_the_watchdog_with_it(words: list[str], tmp_path: Path) -> None:
    with tier(words, tmp_path, MAX_INFLIGHT="none") as running:
        assert running.process.wait(60) == 1
    assert "MAX_INFLIGHT is 'none'" in "".join(running.log)


def _status(running: Running, path: str) -> int:
    try:
        return running.client.get(path).status_code
    except httpx.TransportError:
        return 0


def _metric(running: Running, name: str) -> float:
    lines = running.client.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")), -1.0)


# ---- the functions of stack.yml ----


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the secrets, and sealed tiers as the images hold them; the edge's is a tiny one."""
    folder = tmp_path_factory.mktemp("site")
    texts = {"model-key": key_text(SEALING, MODEL_KEY), "model-signer": key_text(PUBLIC, public_key_of(SIGNING_KEY))}
    for name, text in {**texts, "api-key": API_KEY}.items():
        (folder / "secrets").mkdir(exist_ok=True)
        (folder / "secrets" / name).write_text(text + "\n")
    source = GgufSource(write_gguf(folder / "tiny.gguf"))
    build(source, folder / "plain", "int8", write_adapter(folder / "adapter", source), quiet)
    for name, plain in {"device": ROOT / "models" / "tiers" / "device", "edge": folder / "plain"}.items():
        seal_artifact(Artifact.open(plain), folder / "tiers" / name, LocalKey(MODEL_KEY), SIGNING_KEY, quiet)
    return folder


def placed(function: Function, image: Image, site: Path, urls: dict[str, str]) -> dict[str, str]:
    """The environment that the function has in its container, its folders moved to `site`."""
    environment = {**image.environment, **function.with_secrets(site / "secrets").environment, **urls}
    moved = {key: value.replace("/home/app/tiers", str(site / "tiers")) for key, value in environment.items()}
    state = {"FEDERATION_STATE_PATH": str(site / "state")} if "FEDERATION_STATE_PATH" in moved else {}
    return {key: value for key, value in {**moved, **state}.items() if key not in {"PATH", "fprocess"}}


@contextmanager
def function_running(name: str, words: list[str], site: Path, tmp: Path, **changes: str) -> Iterator[Running]:
    """A function as its image starts it: CMD is the watchdog, fprocess what stack.yml and the image say alike."""
    function = load(ROOT / "stack.yml", {}).functions[name]
    image = read_image(ROOT / function.handler / "Dockerfile")
    assert image.command == ["fwatchdog"]
    assert image.environment["fprocess"] == function.fprocess
    brief = {"healthcheck_interval": "500ms", "LINGER_S": "1"}  # else each would take six seconds to stop
    environment = {**placed(function, image, site, {}), **brief, **changes}
    with watched(words, function.fprocess, tmp, **environment) as running:
        yield running


def test_every_function_starts_by_its_images_entrypoint_and_answers(site: Path, tmp_path: Path) -> None:
    """Device and edge with sealed tiers; dispatcher and federation ask them with the bundle's key, as they must."""
    words, key = STAND_IN, {"Authorization": f"Bearer {API_KEY}"}
    question = {"text": "how much is in my savings account", "skill": "assistant"}
    with (
        function_running("device", words, site, tmp_path / "device") as device,
        function_running("edge", words, site, tmp_path / "edge") as edge,
    ):
        urls = {"DEVICE_URL": str(device.client.base_url), "EDGE_URL": str(edge.client.base_url)}
        nodes = {"FEDERATION_NODES": f"device={urls['DEVICE_URL']}", "EDGE_URL": urls["EDGE_URL"]}
        with (
            function_running("dispatcher", words, site, tmp_path / "dispatcher", **urls) as dispatcher,
            function_running("federation", words, site, tmp_path / "federation", **nodes) as federation,
        ):
            for running in (device, edge, dispatcher, federation):
                running.wait_ready()
                assert running.client.get("/_/health").status_code == 200
                assert running.client.get("/metrics").status_code == 200
                assert running.client.post("/", json=question).status_code == 401
            for running in (device, dispatcher, federation):
                answer = running.client.post("/", json=question, headers=key)
                assert answer.json()["frame"]["intent"] == "balance", answer.text
            said = dispatcher.client.post("/", json={**question, "model": "edge"}, headers=key)
            assert edge.client.post("/", json={"text": "on", "skill": "lamp"}, headers=key).status_code == 200
            assert said.status_code == 200
            models = dispatcher.client.get("/v1/models", headers=key).json()["data"]
            known = {entry["id"]: entry["edgecascade"]["available"] for entry in models}
            assert known["device"]
            assert known["edge"]
            for running in (dispatcher, federation, device, edge):
                running.process.send_signal(signal.SIGTERM)
            for running in (dispatcher, federation, device, edge):
                assert running.process.wait(60) == 0


@pytest.mark.skipif(not REAL, reason="no fwatchdog")
@pytest.mark.parametrize("name", NAMES)
def test_every_function_starts_behind_the_real_watchdog(name: str, site: Path, tmp_path: Path) -> None:
    """One at a time, for its port for metrics is fixed."""
    nobody = f"http://127.0.0.1:{free_port()}"
    urls = {"DEVICE_URL": nobody, "EDGE_URL": nobody, "FEDERATION_NODES": f"device={nobody}"}
    with function_running(name, [REAL or ""], site, tmp_path, **urls) as running:
        running.wait_ready()
        assert running.client.post("/", json={"text": "hello"}).status_code == 401
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0


STARTS: dict[str, Callable[[dict[str, str]], Any]] = {
    "dispatcher": DispatcherConfig.from_environment,
    "device": lambda values: create_tier_app(TierConfig.from_environment(values, "device")),
    "edge": lambda values: create_tier_app(TierConfig.from_environment(values, "edge")),
    "federation": FederationConfig.from_environment,
}


@pytest.mark.parametrize("fault", ["missing", "empty", "group-writable", "world-writable"])
@pytest.mark.parametrize("name", NAMES)
def test_a_secret_that_cannot_be_used_stops_the_start_with_its_name(
    name: str, fault: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_keys, "forbid_core_dumps", lambda: None)
    function = load(ROOT / "stack.yml", {}).functions[name]
    environment = placed(function, read_image(ROOT / function.handler / "Dockerfile"), site, {})
    for broken in function.secrets:
        secrets = tmp_path / broken
        shutil.copytree(site / "secrets", secrets)
        content = (secrets / broken).read_text().strip()
        _spoil(secrets / broken, fault)
        moved = {k: v.replace(str(site / "secrets"), str(secrets)) for k, v in environment.items()}
        with pytest.raises(ConfigError, match=f"names the secret '{broken}', which") as caught:
            STARTS[name](moved)
        assert content not in str(caught.value)


def test_a_missing_secret_ends_the_container_with_its_name(words: list[str], site: Path, tmp_path: Path) -> None:
    with function_running("device", words, site, tmp_path, MODEL_KEY_FILE=str(site / "secrets" / "lost")) as running:
        assert running.process.wait(60) == 1
    assert "MODEL_KEY_FILE names the secret 'lost', which cannot be read" in "".join(running.log)


def _spoil(path: Path, fault: str) -> None:
    if fault == "missing":
        path.unlink()
    elif fault == "empty":
        path.write_text(" \n")
    else:
        path.chmod(0o664 if fault == "group-writable" else 0o646)
