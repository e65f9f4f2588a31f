"""stack.yml: read as faas-cli reads it, and true to the images."""

import re
from pathlib import Path

import pytest
import yaml

from bench.client import TIMEOUT_S
from deploy.errors import StackError
from deploy.local.plan import WATCHDOG_KEYS, Site, commands, function_command
from deploy.stack import load, parse, substitute
from functions.serving.settings import Common
from tests.dockerfiles import read_image

ROOT = Path(__file__).parents[1]
SITE = Site(Path("/repo"), Path("/repo/var"))
PORTS = {"dispatcher": 5001, "device": 5002, "edge": 5003, "federation": 5004}


@pytest.fixture
def stack():
    return load(ROOT / "stack.yml", {})


@pytest.mark.parametrize(
    ("text", "environment", "wanted"),
    [
        ("a ${X} b", {"X": "1"}, "a 1 b"),
        ("a ${X} b", {}, "a  b"),
        ("${X:-http://h:1/p}", {}, "http://h:1/p"),
        ("${X:-d}", {"X": ""}, "d"),
        ("${X:-d}", {"X": "v"}, "v"),
        ("# ${X:-d}", {"X": "v"}, "# v"),
        ("$X $$ {X}", {"X": "v"}, "$X $$ {X}"),
    ],
)
def test_substitution(text, environment, wanted):
    assert substitute(text, environment) == wanted


def test_a_varied_stack_has_the_named_functions_alone_each_with_its_changes(stack):
    varied = stack.varied({"fast": ("device", {"THREADS": "8"}), "device": ("device", {})})
    assert list(varied.functions) == ["fast", "device"]
    assert varied.functions["device"] == stack.functions["device"]
    fast = varied.functions["fast"]
    assert (fast.name, fast.environment) == ("fast", {**stack.functions["device"].environment, "THREADS": "8"})
    with pytest.raises(StackError, match="no function 'cloud'"):
        stack.varied({"x": ("cloud", {})})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not YAML"),
        ("version: 1.0", "names no functions"),
        ("functions: []", "names no functions"),
        ("functions: {f: 3}", "'f' in stack.yml is not a mapping"),
        ("functions: {f: {image: i, handler: h}}", "'f' in stack.yml needs 'fprocess'"),
        ("functions: {f: {image: i, handler: h, fprocess: p, environment: {N: 3}}}", "'f': 'N' must be text"),
    ],
)
def test_a_malformed_stack_is_refused_by_name(text, says):
    with pytest.raises(StackError, match=re.escape(says)):
        parse(text, {})


def test_a_missing_stack_is_one_sentence(tmp_path):
    with pytest.raises(StackError, match="cannot be read"):
        load(tmp_path / "stack.yml", {})


def test_only_keeps_the_named_functions_and_refuses_strangers(stack):
    assert list(stack.only(("device",)).functions) == ["device"]
    assert stack.only(()).functions == stack.functions
    with pytest.raises(StackError, match="no function 'cloud'; it has dispatcher, device, edge, federation"):
        stack.only(("cloud",))


def test_functions_find_each_other_and_their_models_on_this_machine(stack):
    made = {c.name: c for c in commands(stack, PORTS, 8080, SITE, {"PATH": "/bin", "AWS_SECRET": "s"})}
    assert list(made) == ["dispatcher", "device", "edge", "federation", "gateway"]
    assert made["dispatcher"].environment["DEVICE_URL"] == "http://127.0.0.1:5002"
    assert made["dispatcher"].environment["EDGE_URL"] == "http://127.0.0.1:5003"
    assert made["federation"].environment["FEDERATION_NODES"] == "device=http://127.0.0.1:5002"
    assert made["federation"].environment["FEDERATION_STATE_PATH"] == "/repo/var/federation"
    assert made["device"].environment["MODEL_PATH"] == "/repo/models/tiers/device"
    assert made["edge"].environment["MODEL_PATH"] == "/repo/var/edge"
    assert made["gateway"].environment["GATEWAY_ROUTES"].startswith("dispatcher=http://127.0.0.1:5001,")
    for command in made.values():
        assert not WATCHDOG_KEYS & set(command.environment)
        assert "AWS_SECRET" not in command.environment
        assert command.environment["PATH"] == "/bin"


def test_a_peer_elsewhere_stays_elsewhere_and_one_left_out_is_asked_through_the_gateway():
    far = load(ROOT / "stack.yml", {"EDGE_URL": "https://store.example/function/edge"})
    made = function_command(far.functions["dispatcher"], PORTS, 8080, SITE, {})
    assert made.environment["EDGE_URL"] == "https://store.example/function/edge"
    near = load(ROOT / "stack.yml", {})
    made = function_command(near.functions["dispatcher"], {"dispatcher": 5001}, 8080, SITE, {})
    assert made.environment["EDGE_URL"] == "http://127.0.0.1:8080/function/edge"


def test_each_peer_of_a_list_is_found():
    cluster = "http://gateway.openfaas.svc.cluster.local:8080/function"
    nodes = f"a={cluster}/device,b=http://headset:8080,c={cluster}/elsewhere"
    stack = load(ROOT / "stack.yml", {"FEDERATION_NODES": nodes})
    made = function_command(stack.functions["federation"], PORTS, 8080, SITE, {})
    here = "a=http://127.0.0.1:5002,b=http://headset:8080,c=http://127.0.0.1:8080/function/elsewhere"
    assert made.environment["FEDERATION_NODES"] == here


def test_a_command_without_a_socket_is_refused():
    stack = parse("functions: {f: {image: i, handler: h, fprocess: python app.py}}", {})
    with pytest.raises(StackError, match="'f' has no '--bind ADDRESS'"):
        function_command(stack.functions["f"], {}, 8080, SITE, {})


def test_images_name_no_registry_of_ours_and_take_one_from_the_environment(stack):
    for name, function in stack.functions.items():
        assert function.image == f"registry.example/edgecascade-{name}:latest"
    other = load(ROOT / "stack.yml", {"REGISTRY": "r.example:5000", "TAG": "1"})
    assert other.functions["edge"].image == "r.example:5000/edgecascade-edge:1"


def test_timeouts_nest(stack):
    """Deadline < exec ≤ gateway < read and write; the drain of gunicorn fits in the watchdog's."""
    for function in stack.functions.values():
        seconds = {k: float(v.rstrip("s")) for k, v in function.environment.items() if k.endswith("_timeout")}
        assert seconds["exec_timeout"] <= 60 < seconds["read_timeout"] == seconds["write_timeout"]
        words = function.fprocess.split()
        assert float(words[words.index("--graceful-timeout") + 1]) <= seconds["write_timeout"]
        lingers = float(function.environment["LINGER_S"])
        assert float(function.environment["healthcheck_interval"].rstrip("s")) < lingers < seconds["exec_timeout"]
        assert Common().deadline_s < seconds["exec_timeout"]
    assert seconds["write_timeout"] < TIMEOUT_S
    assert float(stack.functions["dispatcher"].environment["DEADLINE_MS"]) / 1000 < 60


def test_each_function_has_more_threads_than_it_admits_requests(stack):
    """Else readiness would wait behind work; and the watchdog refuses only what the function itself would."""
    for function in stack.functions.values():
        env, words = function.environment, function.fprocess.split()
        admitted = int(env["MAX_INFLIGHT"]) + int(env["QUEUE_LIMIT"])
        assert admitted < int(env["max_inflight"]) < int(words[words.index("--threads") + 1])
        assert words[words.index("--workers") + 1] == "1"
        assert env["ready_path"] == "/_/ready"


NAMES = ["dispatcher", "device", "edge", "federation"]
# faas-cli's schema.go: what a stack file may hold; it passes over any other key in silence.
FILE_KEYS = {"version", "provider", "functions", "configuration"}
FUNCTION_KEYS = {
    *("lang", "handler", "image", "fprocess", "environment", "environment_file", "secrets", "skip_build"),
    *("constraints", "labels", "annotations", "limits", "requests", "readonly_root_filesystem", "build_options"),
    *("build_args", "build_secrets", "platforms", "namespace"),
}


def image_of(stack, name):
    return read_image(ROOT / stack.functions[name].handler / "Dockerfile")


def copied(stack, name):
    """The sources of each COPY from the build context."""
    return [source for copy in image_of(stack, name).copies if not copy.stage for source in copy.sources]


@pytest.mark.parametrize("name", ["dispatcher", "device", "edge", "federation"])
def test_what_a_dockerfile_copies_is_in_its_build_context(stack, name):
    """faas-cli makes the context of the handler's folder and each path of `configuration.copy`, under its own name."""
    sources = copied(stack, name)
    assert sources
    for source in sources:
        parents = {str(Path(source)), *map(str, Path(source).parents)}
        assert parents & {str(Path(path)) for path in stack.copies}, f"{source} is not in the build context"
        if not source.startswith("var/sealed/"):  # made by `make sealed`
            assert (ROOT / source).exists()


@pytest.mark.parametrize("name", ["dispatcher", "device", "edge", "federation"])
def test_images_run_the_watchdog_as_an_ordinary_user_with_the_model_where_stack_yml_says(stack, name):
    function, image = stack.functions[name], image_of(stack, name)
    assert (image.user, image.command) == ("1000", ["fwatchdog"])
    watchdog = next(copy for copy in image.copies if copy.stage == "watchdog")
    assert (watchdog.sources, watchdog.target) == (("/fwatchdog",), "/usr/bin/fwatchdog")
    assert len(image.bases) == 3
    tiers = {copy.sources: copy.target for copy in image.copies if copy.target.startswith("./tiers/")}
    if "MODEL_PATH" in function.environment:
        folder = function.environment["MODEL_PATH"].removeprefix("/home/app/")
        assert tiers == {(f"var/sealed/{name}",): f"./{folder}"}
        assert function.environment["MODEL_KEY_FILE"] == "/var/openfaas/secrets/model-key"
    else:
        assert not tiers


@pytest.mark.parametrize("name", NAMES)
def test_an_image_runs_where_nobody_reads_fprocess(stack, name):
    """`faas-cli generate` drops it, for Knative as for OpenFaaS' own objects; `docker run` has never heard of it."""
    function, image = stack.functions[name], image_of(stack, name)
    assert image.environment["fprocess"] == function.fprocess
    for key in ("mode", "upstream_url"):
        assert image.environment[key] == function.environment[key]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_no_digest_nobody_has_seen_and_no_architecture(stack, name):
    text = (ROOT / stack.functions[name].handler / "Dockerfile").read_text("utf-8")
    assert not re.search(r"sha256:|--platform|amd64(?! and)|x86_64", text)
    assert "-c constraints.txt" in text


def test_packages_of_the_project_and_of_the_images_are_the_same(stack):
    """A package that pyproject.toml lists but an image lacks would break that image's installation."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = set(re.findall(r'^  "(\w+)(?:\.\w+)*",$', text.split("packages = [")[1].split("]")[0], re.MULTILINE))
    for name in stack.functions:
        assert listed <= set(copied(stack, name))


def test_no_key_is_unknown_to_faas_cli():
    values = yaml.safe_load((ROOT / "stack.yml").read_text("utf-8"))
    assert set(values) <= FILE_KEYS
    assert set(values["provider"]) <= {"name", "gateway"}
    assert set(values["configuration"]) <= {"copy", "templates"}
    for spec in values["functions"].values():
        assert set(spec) <= FUNCTION_KEYS
        for key in ("environment", "labels", "annotations", "build_args", "limits", "requests"):
            assert all(isinstance(value, str) for value in spec.get(key, {}).values()), key
        assert all(isinstance(secret, str) for secret in spec["secrets"])


def test_prometheus_finds_the_functions_own_metrics(stack):
    """With dots, not a slash: faas-netes adds `prometheus.io.scrape: "false"` where that very key is missing."""
    values = yaml.safe_load((ROOT / "stack.yml").read_text("utf-8"))
    wanted = {"prometheus.io.scrape": "true", "prometheus.io.port": "8080", "prometheus.io.path": "/metrics"}
    assert all(wanted.items() <= spec["annotations"].items() for spec in values["functions"].values())


def test_where_probes_can_be_chosen_they_ask_the_watchdog_and_through_it_the_function(stack):
    """Standard and for Enterprises read these; CE knows `/_/health` alone, and refuses annotations of clouds only."""
    values = yaml.safe_load((ROOT / "stack.yml").read_text("utf-8"))
    for name, spec in values["functions"].items():
        annotations = spec["annotations"]
        assert annotations["com.openfaas.health.http.path"] == "/_/health"
        assert annotations["com.openfaas.ready.http.path"] == stack.functions[name].environment["ready_path"]
        assert not any("amazonaws.com" in key or "gke.io" in key for key in annotations)


def test_sites_are_labels_and_what_the_documented_filters_choose(stack):
    sites = {name: set(stack.site(name).functions) for name in ("device", "edge")}
    assert sites == {"device": {"dispatcher", "device"}, "edge": {"edge", "federation"}}
    for name, expression in {"device": "dispatcher|device", "edge": "edge|federation"}.items():
        assert {f for f in stack.functions if re.search(expression, f)} == sites[name]
    with pytest.raises(StackError, match="no site 'cloud'; it has device, edge"):
        stack.site("cloud")


def test_secrets_that_functions_name_are_those_that_they_get(stack):
    for function in stack.functions.values():
        folder = "/var/openfaas/secrets/"
        named = {v.removeprefix(folder) for v in function.environment.values() if v.startswith(folder)}
        assert named == set(function.secrets)
        assert "api-key" in named


def test_secrets_lie_in_a_folder_here_or_are_left_out(stack):
    edge = stack.functions["edge"]
    assert edge.with_secrets(Path("/s")).environment["MODEL_KEY_FILE"] == "/s/model-key"
    without = edge.with_secrets(None).environment
    assert not {"API_KEY_FILE", "MODEL_KEY_FILE", "MODEL_PUBLIC_KEY"} & set(without)
    assert set(edge.environment) - set(without) == {"API_KEY_FILE", "MODEL_KEY_FILE", "MODEL_PUBLIC_KEY"}
    elsewhere = load(ROOT / "stack.yml", {"EDGE_KEY_FILE": "/mine/seal.key"}).functions["edge"]
    assert elsewhere.with_secrets(None).environment["MODEL_KEY_FILE"] == "/mine/seal.key"


def test_with_secrets_the_sealed_tiers_run_as_in_the_images(stack):
    site = Site(Path("/repo"), Path("/repo/var"), Path("/repo/.secrets"))
    made = {c.name: c.environment for c in commands(stack, PORTS, 8080, site, {})}
    assert made["device"]["MODEL_PATH"] == "/repo/var/sealed/device"
    assert made["edge"]["MODEL_PATH"] == "/repo/var/sealed/edge"
    assert made["federation"]["API_KEY_FILE"] == "/repo/.secrets/api-key"


def test_the_file_is_plain_yaml_of_schema_1_0():
    values = yaml.safe_load((ROOT / "stack.yml").read_text("utf-8"))
    assert str(values["version"]) == "1.0"
    assert values["provider"]["name"] == "openfaas"
    for spec in values["functions"].values():
        assert spec["lang"] == "dockerfile"
        assert spec["readonly_root_filesystem"] is True
        assert set(spec["limits"]) == set(spec["requests"]) == {"memory", "cpu"}
        assert not any(label.startswith("com.openfaas.scale") for label in spec.get("labels", {}))
