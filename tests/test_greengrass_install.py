# ruff: noqa: T201 - figures for docs/decisions/0021, shown by `pytest -s`
"""A component's own steps, for real: installed offline from the shipped wheels, run, asked, stopped."""

import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.greengrass.build import read
from tests.fakes import free_port, wait_until
from tests.greengrass_rigs import DEVICE, DISPATCHER, ROOT
from tests.nucleus import Nucleus

pytestmark = pytest.mark.slow
TIER = ROOT / "models" / "tiers" / "device"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "aarch64"}.get(platform.machine(), "")


def edgecascade(folder, *words):
    """The command line, in a folder."""
    words = [sys.executable, str(ROOT / "edgecascade.py"), *words]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Where the keys of the sealed tier and what was rendered lie."""
    return tmp_path_factory.mktemp("greengrass")


@pytest.fixture(scope="module")
def built(keys):
    """Both components of the device site, with their true wheels and a sealed tier."""
    if not ARCHITECTURE:
        pytest.skip(f"no wheels are shipped for {platform.machine()}")
    folder = keys
    page = (ROOT / "docs" / "greengrass.md").read_text("utf-8")
    line = next(line for line in page.splitlines() if line.startswith("edgecascade greengrass render"))
    key, signing = str(folder / "keys" / "seal.key"), str(folder / "keys" / "sign.key")
    assert edgecascade(folder, "keys", "keys").returncode == 0
    assert edgecascade(folder, "seal", str(TIER), "sealed", "--key-file", key, "--signing-key", signing).returncode == 0
    done = edgecascade(folder, *shlex.split(line)[1:], "--arch", ARCHITECTURE, "--model", "device=sealed")
    if done.returncode != 0 and "cannot be" in done.stderr:
        pytest.skip(f"the wheels cannot be had here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return {component.name: component for component in read(folder / "greengrass-build")}


@pytest.fixture(scope="module")
def nucleus(built, keys, tmp_path_factory):
    """Both installed, without any network."""
    made = Nucleus(tmp_path_factory.mktemp("root"), ARCHITECTURE)
    device, edge = free_port(), free_port()
    made.configuration = {
        DEVICE: {
            "BIND": f"127.0.0.1:{device}", "PYTHON": sys.executable,
            "MODEL_KEY_FILE": str(keys / "keys" / "seal.key"), "MODEL_PUBLIC_KEY": str(keys / "keys" / "sign.pub"),
        },
        DISPATCHER: {
            "BIND": f"127.0.0.1:{free_port()}", "PYTHON": sys.executable,
            "DEVICE_URL": f"http://127.0.0.1:{device}", "EDGE_URL": f"http://127.0.0.1:{edge}",
        },
    }  # fmt: skip
    for component in built.values():
        made.place(component)
        begun = time.monotonic()
        done = made.install(component, _no_network())
        print(f"{component.name}: installed in {time.monotonic() - begun:.1f} s")
        assert done.returncode == 0, done.stderr
    return made


def _no_network():
    """A network namespace of its own, where one may be made; pip's --no-index holds anyway."""
    words = ["unshare", "--net"]
    if shutil.which(words[0]) and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
        return words
    return []


@pytest.fixture
def running(built, nucleus):
    """Both run; stopped at the end."""
    processes = {name: nucleus.start(component) for name, component in built.items()}
    urls = {name: f"http://{nucleus.configuration[name]['BIND']}" for name in built}
    try:
        for url in urls.values():
            wait_until(lambda url=url: _ready(url), timeout_s=120)
        yield processes, urls
    finally:
        for process in processes.values():
            if process.poll() is None:
                nucleus.stop(process)
            process.stdout.close()


def _ready(url):
    try:
        return httpx.get(f"{url}/_/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_the_installed_functions_answer_and_stop_within_five_seconds(running, nucleus):
    processes, urls = running
    for url in urls.values():
        assert httpx.get(f"{url}/healthz", trust_env=False).json() == {"status": "ok"}
    said = httpx.post(f"{urls[DISPATCHER]}/", json={"text": "play some jazz"}, trust_env=False, timeout=60).json()
    assert said["edgecascade"]["source"] == "device"
    assert 'node_id="kiosk-1"' in httpx.get(f"{urls[DEVICE]}/metrics", trust_env=False).text
    for name, process in processes.items():
        keeper = psutil.Process(process.pid)
        print(f"{name}: the keeper has {keeper.memory_info().rss >> 20} MiB, gunicorn's processes "
              f"{sum(p.memory_info().rss for p in keeper.children(recursive=True)) >> 20} MiB")  # fmt: skip
        children = keeper.children(recursive=True)
        status, took_s = nucleus.stop(process)
        print(f"{name}: stopped in {took_s:.2f} s with status {status}")
        assert status == 0
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_the_tier_is_sealed_on_the_device(nucleus):
    folder = nucleus.root / "packages" / "artifacts" / DEVICE / "0.1.0"
    for name in ("manifest.json", "manifest.sig", "layer-000.safetensors"):
        assert (folder / name).is_file()
    assert (folder / "layer-000.safetensors").read_bytes() != (TIER / "layer-000.safetensors").read_bytes()


def test_a_function_whose_model_is_spoilt_ends_so_that_the_nucleus_knows(built, nucleus):
    folder = nucleus.root / "packages" / "artifacts" / DEVICE / "0.1.0"
    layer = folder / "layer-000.safetensors"
    content = layer.read_bytes()
    layer.chmod(0o600)
    layer.write_bytes(content[:-1] + b"x")
    try:
        process = nucleus.start(built[DEVICE])
        said, _ = process.communicate(timeout=120)
    finally:
        layer.write_bytes(content)
    assert process.returncode == 1
    assert "device is not well: failed loading failed: " in said


def test_a_wheel_that_was_exchanged_is_not_installed(built, nucleus):
    wheels = (
        nucleus.root / "packages" / "artifacts-unarchived" / DISPATCHER / "0.1.0" / f"app-{ARCHITECTURE}" / "wheels"
    )
    wheel = next(wheels.glob("flask-*"))
    content = wheel.read_bytes()
    wheel.write_bytes(content + b"\0")
    try:
        done = nucleus.install(built[DISPATCHER])
    finally:
        wheel.write_bytes(content)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert nucleus.install(built[DISPATCHER]).returncode == 0


def test_the_extras_are_those_of_the_images():
    from deploy.greengrass.wheels import EXTRAS

    for name, extra in EXTRAS.items():
        installed = "shards" if name == "edge" else extra  # an image may be told to serve a part of the layers
        assert f'whl)[{installed}]"' in (ROOT / "functions" / name / "Dockerfile").read_text("utf-8")
    assert Path(sys.executable).exists()
