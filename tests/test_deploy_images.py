"""Build contexts, images and what else is made of stack.yml; checked with the real tools where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import images
from deploy.compose.render import HEAD, PORTS, render
from deploy.errors import ImageError, StackError
from deploy.stack import load, parse
from tests.dockerfiles import read_image
from tests.fakes import free_port, http_client, wait_until

ROOT = Path(__file__).parents[1]
STACK = ROOT / "stack.yml"
NAMES = ("dispatcher", "device", "edge", "federation")
FAAS_CLI = shutil.which("faas-cli")
needs_faas_cli = pytest.mark.skipif(not FAAS_CLI, reason="faas-cli is not installed")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with small stand-ins for sealed tiers, which are not made in tests."""
    folder = tmp_path_factory.mktemp("project")
    for path in (*load(STACK, {}).copies, "./stack.yml"):
        source = ROOT / path
        if source.is_dir() and "sealed" not in path:
            (folder / path).symlink_to(source)
        elif source.is_file():
            shutil.copy(source, folder / path)
    for name in ("device", "edge"):
        (folder / "var" / "sealed" / name).mkdir(parents=True)
        (folder / "var" / "sealed" / name / "manifest.json").write_text("{}")
    (folder / "template" / "dockerfile").mkdir(parents=True)  # else faas-cli fetches its templates
    (folder / "template" / "dockerfile" / "template.yml").write_text("language: dockerfile\n")
    return folder


@pytest.fixture(scope="module")
def contexts(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each function's build context."""
    stack, folder = load(STACK, {}), tmp_path_factory.mktemp("contexts")
    for function in stack.functions.values():
        images.write_context(project, stack, function, folder / function.name)
    return {name: folder / name for name in stack.functions}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_dockerfile_copies_is_in_the_context(contexts: dict[str, Path], name: str) -> None:
    context = contexts[name]
    image = read_image(context / "Dockerfile")
    sources = [source for copy in image.copies if not copy.stage for source in copy.sources]
    assert len(sources) > 9
    for source in sources:
        assert (context / source).exists(), source
    ignored = [line for line in (context / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert not {source for source in sources if source in ignored}
    assert "**/__pycache__" in ignored


@pytest.mark.parametrize("name", NAMES)
def test_only_a_functions_own_tier_gets_into_its_image_and_only_sealed(contexts: dict[str, Path], name: str) -> None:
    copies = read_image(contexts[name] / "Dockerfile").copies
    tiers = {source for copy in copies for source in copy.sources if "tiers" in copy.target or "sealed" in source}
    assert tiers == ({f"var/sealed/{name}"} if name in {"device", "edge"} else set())


@needs_faas_cli
@pytest.mark.parametrize("name", NAMES)
def test_the_context_is_the_one_that_faas_cli_makes(contexts: dict[str, Path], project: Path, name: str) -> None:
    faas_cli(project, "build", "--shrinkwrap", "-f", "stack.yml", "--filter", name)
    assert files(project / "build" / name) == files(contexts[name])


def test_a_tier_that_is_not_sealed_yet_is_one_sentence(tmp_path: Path) -> None:
    stack = parse("functions: {f: {image: i, handler: h, fprocess: p}}\nconfiguration: {copy: [./var/sealed]}", {})
    (tmp_path / "h").mkdir()
    with pytest.raises(ImageError, match=r"\./var/sealed is not there; make them with: make sealed"):
        images.write_context(tmp_path, stack, stack.functions["f"], tmp_path / "out")


def test_images_are_built_under_the_names_of_stack_yml() -> None:
    stack = load(STACK, {"REGISTRY": "r.example", "TAG": "7", "EDGE_ONNXRUNTIME": "onnxruntime-gpu==1.0"})
    made = images.command(stack.functions["edge"], "podman", "linux/arm64")
    assert made[:2] == ["podman", "build"]
    assert made[made.index("--tag") + 1] == "r.example/edgecascade-edge:7"
    assert made[made.index("--platform") + 1] == "linux/arm64"
    assert made[made.index("--build-arg") + 1] == "ONNXRUNTIME=onnxruntime-gpu==1.0"
    assert "--platform" not in images.command(stack.functions["edge"], "docker")


@pytest.mark.parametrize(
    ("named", "installed", "wanted"),
    [("", "podman", "podman"), ("", "docker podman", "docker"), ("podman", "docker podman", "podman")],
)
def test_the_engine_is_the_one_that_is_there(named: str, installed: str, wanted: str) -> None:
    assert images.engine_here(named, lambda engine: engine if engine in installed.split() else None) == wanted


@pytest.mark.parametrize(("named", "says"), [("", "docker or podman is not installed"), ("kaniko", "'kaniko' cannot")])
def test_without_an_engine_it_says_what_to_do(named: str, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        images.engine_here(named, lambda _engine: None)


def test_a_build_runs_in_the_context_and_a_failing_one_is_told(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\nls Dockerfile routing\necho $*\nexit $STATUS\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stack, said = load(STACK, {}).only(("device",)), list[tuple[str, str]]()
    monkeypatch.setenv("STATUS", "0")
    images.build(project, stack, "docker", "", lambda name, line: said.append((name, line)))
    assert ("device", "Dockerfile") in said
    assert said[-1] == ("device", "build --tag registry.example/edgecascade-device:latest .")
    monkeypatch.setenv("STATUS", "3")
    with pytest.raises(ImageError, match="ended with status 3"):
        images.build(project, stack, "docker", "")


def _engine_with(*bases: str) -> str | None:
    """An engine that has all these images already; nothing is pulled."""
    for engine in images.ENGINES:
        found = [shutil.which(engine) and _run(engine, "image", "inspect", base).returncode == 0 for base in bases]
        if all(found):
            return engine
    return None


def _run(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, **how)


@pytest.mark.slow
def test_the_device_image_builds_and_runs(tmp_path: Path) -> None:
    """With tiers and secrets as `make sealed` leaves them."""
    engine = _engine_with("python:3.11-slim", "ghcr.io/openfaas/of-watchdog:0.11.6")
    if engine is None:
        pytest.skip("no docker or podman that runs and has python:3.11-slim and of-watchdog")
    if not (ROOT / "var" / "sealed" / "device" / "manifest.json").is_file():
        pytest.skip("no sealed tiers: make sealed")
    stack = load(STACK, {"REGISTRY": "localhost", "TAG": "test"}).only(("device",))
    images.build(ROOT, stack, engine, "")
    port, function = free_port(), stack.functions["device"]
    options = [f"--publish=127.0.0.1:{port}:8080", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL"]
    mounts = [f"--volume={ROOT}/.secrets/{name}:/var/openfaas/secrets/{name}:ro" for name in function.secrets]
    settings = [f"--env={key}={value}" for key, value in function.environment.items()]
    started = _run(engine, "run", "--detach", "--rm", *options, *mounts, *settings, function.image)
    assert started.returncode == 0, started.stderr
    container = started.stdout.strip()
    try:
        with http_client(f"http://127.0.0.1:{port}") as client:
            wait_until(lambda: _status(client) == 200, timeout_s=60)
            key = {"X-API-Key": (ROOT / ".secrets" / "api-key").read_text().split()[0]}
            assert client.post("/", json={"text": "play some jazz", "skill": "home"}, headers=key).status_code == 200
    finally:
        _run(engine, "stop", "--time", "20", container)


def _status(client: Any) -> int:
    try:
        code: int = client.get("/_/ready").status_code
    except Exception:  # noqa: BLE001  # whatever it is, it is not there yet
        return 0
    return code


# ---- faas-cli ----


def faas_cli(folder: Path, *arguments: str, **variables: str) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **variables}
    said = _run(FAAS_CLI or "", *arguments, cwd=folder, env=environment)
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout


@needs_faas_cli
@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (("--regex", "dispatcher|device"), {"dispatcher", "device"}),
        (("--regex", "edge|federation"), {"edge", "federation"}),
        (("--filter", "edge"), {"edge"}),
        ((), set(NAMES)),
    ],
)
def test_faas_cli_reads_the_file_as_we_do(project: Path, choice: tuple[str, ...], wanted: set[str]) -> None:
    variables = {"REGISTRY": "r.example", "TAG": "9", "EDGE_URL": "https://store.example/function/edge"}
    text = faas_cli(project, "generate", "-f", "stack.yml", *choice, **variables)
    ours = load(STACK, variables).functions
    found = {document["metadata"]["name"]: document["spec"] for document in yaml.safe_load_all(text) if document}
    assert set(found) == wanted
    for name, spec in found.items():
        assert spec["image"] == ours[name].image
        assert spec["environment"] == ours[name].environment
        assert tuple(spec["secrets"]) == ours[name].secrets
        assert spec["labels"] == ours[name].labels


KNATIVE = ("generate", "--api", "serving.knative.dev/v1", "-f", "stack.yml")


@needs_faas_cli
def test_what_faas_cli_makes_for_knative_and_what_it_drops(project: Path) -> None:
    """The page about it says so; what is dropped and needed is in the images."""
    functions = load(STACK, {}).functions
    for service in yaml.safe_load_all(faas_cli(project, *KNATIVE)):
        function = functions[service["metadata"]["name"]]
        (container,) = service["spec"]["template"]["spec"]["containers"]
        assert set(service["spec"]["template"]) == {"spec"}
        assert set(service["spec"]["template"]["spec"]) == {"containers", "volumes"}
        assert set(container) == {"image", "env", "volumeMounts"}
        assert {pair["name"]: pair["value"] for pair in container["env"]} == function.environment
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {secret: f"/var/openfaas/secrets/{secret}" for secret in function.secrets}
        assert "labels" not in service["metadata"]


# ---- compose ----


def test_the_compose_file_is_the_one_that_stack_yml_makes() -> None:
    kept = (ROOT / "deploy" / "compose" / "compose.yaml").read_text("utf-8")
    assert kept == render(STACK.read_text("utf-8")), "make it again: edgecascade compose > deploy/compose/compose.yaml"


def test_compose_has_every_function_with_its_settings_secrets_and_limits() -> None:
    text = (ROOT / "deploy" / "compose" / "compose.yaml").read_text("utf-8")
    assert text.startswith(HEAD)
    raw, made = yaml.safe_load(STACK.read_text("utf-8"))["functions"], yaml.safe_load(text)
    assert list(made["services"]) == list(raw)
    assert "gateway.openfaas" not in text
    for name, spec in raw.items():
        service = made["services"][name]
        assert service["image"] == spec["image"]
        assert service["environment"].keys() == spec["environment"].keys()
        assert [secret["source"] for secret in service["secrets"]] == spec["secrets"]
        assert all(secret["target"].endswith(f"/secrets/{secret['source']}") for secret in service["secrets"])
        assert set(spec["secrets"]) <= set(made["secrets"])
        assert service["read_only"] is True
        assert ("ports" in service) == (name in PORTS)
    assert made["services"]["dispatcher"]["environment"]["EDGE_URL"] == "${EDGE_URL:-http://edge:8080}"
    assert made["services"]["federation"]["environment"]["FEDERATION_NODES"].endswith("device=http://device:8080}")
    limits = {name: service["deploy"]["resources"]["limits"] for name, service in made["services"].items()}
    assert limits["edge"] == {"cpus": "2", "memory": "1G"}
    assert limits["device"] == {"cpus": "1", "memory": "512M"}


@pytest.mark.parametrize("text", ["a: [", "functions: {f: 3}", "version: 1.0"])
def test_compose_of_no_stack_is_one_sentence(text: str) -> None:
    with pytest.raises(StackError, match=r"stack\.yml cannot be read"):
        render(text)


def test_the_gpu_profile_asks_for_one(tmp_path: Path) -> None:
    profile = yaml.safe_load((ROOT / "deploy" / "openfaas" / "gpu-profile.yml").read_text("utf-8"))
    assert (profile["apiVersion"], profile["kind"]) == ("openfaas.com/v1", "Profile")
    assert profile["metadata"]["name"] == "nvidia-gpu"
    assert profile["spec"]["resources"]["limits"] == {"nvidia.com/gpu": 1}


def run_door(*words: str) -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, str(ROOT / "edgecascade.py"), *words, cwd=ROOT)


def test_the_command_line_prints_the_compose_file() -> None:
    assert run_door("compose").stdout == (ROOT / "deploy" / "compose" / "compose.yaml").read_text("utf-8")


def test_the_scalers_image_copies_what_is_there_and_runs_as_nobody_special() -> None:
    image = read_image(ROOT / "scaler" / "Dockerfile")
    kept = {
        line[1:] for line in (ROOT / "scaler" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for copy in image.copies:
        assert copy.stage or all((ROOT / source).exists() and source in kept for source in copy.sources)
    assert image.user.isdigit()
