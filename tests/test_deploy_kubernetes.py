"""The manifests: valid, as committed, true to stack.yml and to the metrics of the code."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

import edgecascade
from deploy.errors import ManifestError, StackError
from deploy.kubernetes.render import TREE, derived, overlays, render, whole, write
from deploy.kubernetes.rules import BURNS, REFUSALS, WINDOWS
from deploy.kubernetes.scaling import slo_seconds, tiers
from deploy.kubernetes.tree import build, folder
from deploy.kubernetes.workloads import at_the_edge, plain
from deploy.local.plan import WATCHDOG_KEYS
from deploy.stack import load, parse
from functions.dispatcher.power.series import series as power_series
from functions.serving.metrics import SECONDS, Metrics
from functions.serving.settings import Environment
from routing.power import Power
from tests.fakes import (
    FakeTier,
    card,
    dispatcher_app,
    federated,
    free_port,
    http_client,
    served,
    tier_app,
    wait_until,
)
from tests.kubernetes_schemas import CUSTOM
from tests.test_docs_readme import shell_lines

ROOT = Path(__file__).parents[1]
NAMES = ["gpu", "k3s", "kubeedge", "microk8s", "plain", "prometheus-trigger-only", "rebalance", "shards"]
# The oldest and the newest Kubernetes that the manifests are held against.
VERSIONS = ("1.27", "1.33")
ALERT_TESTS = ROOT / "tests" / "kubernetes_alerts.yml"
# The scaler may not be part of this tree yet.
SCALER_METRICS = import_module("scaler.metrics") if find_spec("scaler.metrics") else None
RULES = "monitoring/edgecascade.rules.yml"


@pytest.fixture(scope="module")
def stack():
    return load(ROOT / "stack.yml", {})


@pytest.fixture(scope="module")
def rendered(stack):
    return {name: render(stack, name) for name in NAMES}


def each(rendered, kind):
    return [manifest for made in rendered.values() for manifest in made if manifest["kind"] == kind]


def pods(manifests):
    """Name → pod specification of everything that makes pods."""
    return {m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in manifests if "template" in m.get("spec", {})}


def one(manifests, kind, name):
    (found,) = (m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return found


def environment(container):
    return {entry["name"]: entry.get("value") for entry in container["env"]}


# ---- the tree ----


def test_there_are_these_overlays():
    assert overlays() == NAMES


def test_committed_files_are_those_that_the_command_writes(stack):
    for name, text in derived(stack).items():
        assert (TREE / name).read_text("utf-8") == text, f"{name}: run `edgecascade kubernetes render --kustomize`"


def with_power(read):
    """A folder `mine` besides: the base with the component for nodes' power."""
    text = "kind: Kustomization\nnamespace: edgecascade\nresources: [../base]\ncomponents: [../power]\n"
    return lambda path: text if str(path) == "mine/kustomization.yaml" else read(path)


def test_every_file_of_the_tree_is_used_and_every_file_used_is_there(stack):
    asked = set()

    def read(path: PurePosixPath):
        asked.add(str(path))
        return folder(TREE, {})(path)

    for name in overlays():
        build(read, f"overlays/{name}")
    build(with_power(read), "mine")  # whoever has nodes that say what they allow adds the component
    here = {name for name in whole(stack) if name != RULES}  # for those without the operator
    assert asked == here


@pytest.mark.parametrize("name", NAMES)
def test_no_two_manifests_of_an_overlay_are_the_same_object(rendered, name):
    keys = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in rendered[name]]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", NAMES)
def test_kustomize_makes_the_same_of_the_committed_files(rendered, name):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here")
    said = subprocess.run(
        ["kubectl", "kustomize", str(TREE / "overlays" / name)], capture_output=True, text=True, check=True, timeout=120
    )
    key = lambda m: (m["kind"], m["metadata"]["name"])  # noqa: E731
    theirs = list(yaml.safe_load_all(said.stdout))
    assert sorted(theirs, key=key) == sorted(rendered[name], key=key)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "a/kustomization.yaml cannot be read"),
        ({"a/kustomization.yaml": "kind: ["}, "a/kustomization.yaml is not YAML"),
        ({"a/kustomization.yaml": "- 1"}, "must hold mappings with a 'kind'"),
        ({"a/kustomization.yaml": "kind: K\nnamePrefix: x"}, "has 'namePrefix', which is not understood here"),
        ({"a/kustomization.yaml": "kind: K\nresources: [b.yaml]"}, "a/b.yaml cannot be read"),
        ({"a/kustomization.yaml": "kind: K\nresources: [../../b.yaml]"}, "leads out of deploy/kubernetes"),
        (
            {"a/kustomization.yaml": "kind: K\nconfigMapGenerator: [{name: x, files: []}]"},
            "names with a hash are not understood here",
        ),
        (
            {"a/kustomization.yaml": "kind: K\npatches: [{target: {kind: Pod}, patch: '[]'}]"},
            "no manifest is the target",
        ),
        (
            {
                "a/kustomization.yaml": "kind: K\nresources: [b.yaml]\npatches: [{target: {kind: Pod}, patch: '1'}]",
                "a/b.yaml": "kind: Pod\nmetadata: {name: b}",
            },
            "a patch must be a list of steps (RFC 6902), or part",
        ),
        *(
            (
                {
                    "a/kustomization.yaml": f"kind: K\nresources: [b.yaml]\npatches: [{{target: {{kind: Pod}}, patch: '[{{op: {op}, path: {path}, value: 1}}]'}}]",  # noqa: E501
                    "a/b.yaml": "kind: Pod\nmetadata: {name: b}\nspec: {a: [2]}",
                },
                f"{op} {path} does not fit Pod b",
            )
            for op, path in [
                ("replace", "/spec/b"),
                ("remove", "/spec/b"),
                ("add", "/spec/b/c"),
                ("replace", "/spec/a/1"),
                ("test", "/spec/a/0"),
                ("move", "/spec/a"),
            ]
        ),
    ],
)
def test_a_tree_that_does_not_hold_together_is_refused_by_name(tmp_path, files, says):
    write(files, tmp_path)
    with pytest.raises(ManifestError, match=re.escape(says)):
        build(folder(tmp_path, {}), "a")


# ---- validity ----


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_manifests_are_valid(rendered, name, version):
    for manifest in rendered[name]:
        if manifest["kind"] in CUSTOM:
            jsonschema.validate(manifest, CUSTOM[manifest["kind"]])
        else:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_manifest_names_is_there(rendered, name):
    """Services find pods, patches of ports find names, volumes are mounted, roles and accounts are bound."""
    made = rendered[name]
    templates = [m["spec"]["template"] for m in made if "template" in m.get("spec", {})]
    for manifest in made:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Service":
            chosen = [t for t in templates if spec["selector"].items() <= t["metadata"]["labels"].items()]
            assert len(chosen) == 1
            ports = {port["name"] for c in chosen[0]["spec"]["containers"] for port in c["ports"]}
            assert {port["targetPort"] for port in spec["ports"]} <= ports
        elif "template" in spec:
            assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
            volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
            mounted = {mount["name"] for c in spec["template"]["spec"]["containers"] for mount in c["volumeMounts"]}
            assert mounted == volumes
            account = spec["template"]["spec"].get("serviceAccountName")
            assert account is None or one(made, "ServiceAccount", account)
        elif manifest["kind"] == "RoleBinding":
            assert one(made, "Role", manifest["roleRef"]["name"])
            (subject,) = manifest["subjects"]
            account = one(made, "ServiceAccount", subject["name"])
            assert subject["namespace"] == account["metadata"]["namespace"]
        elif manifest["kind"] == "ScaledObject":
            for trigger in spec["triggers"]:
                if "authenticationRef" in trigger:
                    assert one(made, "TriggerAuthentication", trigger["authenticationRef"]["name"])


def test_ports_are_named_and_say_their_protocol_for_a_service_mesh(rendered):
    for service in each(rendered, "Service"):
        for port in service["spec"]["ports"]:
            assert port["name"].split("-")[0] == port["appProtocol"]
    assert one(rendered["k3s"], "Service", "edgecascade-scaler")["spec"]["ports"][0] == {
        "name": "grpc", "port": 6000, "targetPort": "grpc", "appProtocol": "grpc",
    }  # fmt: skip


def test_pods_run_as_an_ordinary_user_who_may_write_nowhere_but_tmp(rendered):
    for made in rendered.values():
        for pod in pods(made).values():
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["enableServiceLinks"] is False
            for container in pod["containers"]:
                own = container["securityContext"]
                assert own["readOnlyRootFilesystem"] is True
                assert own["allowPrivilegeEscalation"] is False
                assert own["capabilities"] == {"drop": ["ALL"]}
                assert set(container["resources"]) == {"requests", "limits"}
                assert container["imagePullPolicy"] == "IfNotPresent"
                writable = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
                assert writable == ["/tmp"]  # noqa: S108 - as the path in a container


def test_the_power_component_lets_the_scaler_list_nodes_and_nothing_more():
    made = build(with_power(folder(TREE, {})), "mine")
    (role,) = [manifest for manifest in made if manifest["kind"] == "ClusterRole"]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}]
    (binding,) = [manifest for manifest in made if manifest["kind"] == "ClusterRoleBinding"]
    account = next(m for m in made if m["kind"] == "ServiceAccount")
    names = {key: account["metadata"][key] for key in ("name", "namespace")}
    assert binding["subjects"] == [{"kind": "ServiceAccount", **names}]
    environment = pods(made)["edgecascade-scaler"]["containers"][0]["env"]
    assert {"name": "SCALER_POWER_NODES", "value": "edgecascade.io/site=edge"} in environment


def test_the_scaler_looks_and_touches_nothing(rendered):
    for role in each(rendered, "Role"):
        if role["metadata"]["name"] != "edgecascade-rebalance":
            assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    assert not each(rendered, "ClusterRole")
    for overlay, made in rendered.items():
        asks = {"edgecascade-scaler"} | ({"edgecascade-rebalance"} if overlay == "rebalance" else set())
        for name, pod in pods(made).items():
            assert name in asks or pod["automountServiceAccountToken"] is False


def test_the_rebalancer_changes_the_shards_and_nothing_else(rendered):
    made = rendered["rebalance"]
    looks, changes = one(made, "Role", "edgecascade-rebalance")["rules"]
    assert looks == {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}
    shards = [name for name in pods(made) if name == "edge" or name.startswith("edge-shard-")]
    assert sorted(changes.pop("resourceNames")) == sorted(shards)
    assert changes == {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get", "patch"]}
    assert [m["metadata"]["name"] for m in each(rendered, "Role")].count("edgecascade-rebalance") == 1


def test_the_rebalancer_alone_sets_the_replicas_of_shards(rendered):
    scaled = {m["metadata"]["name"] for m in rendered["rebalance"] if m["kind"] == "ScaledObject"}
    assert "edge" not in scaled
    assert "edge" in {m["metadata"]["name"] for m in rendered["shards"] if m["kind"] == "ScaledObject"}


def test_the_rebalancer_s_command_is_one_that_there_is(rendered):
    from typer.main import get_command

    import edgecascade

    (container,) = pods(rendered["rebalance"])["edgecascade-rebalance"]["containers"]
    name, *words = container["command"][1:]
    command = get_command(edgecascade.app).commands[name]
    found = command.make_context(name, words, resilient_parsing=True).params
    assert found["namespace"] == one(rendered["rebalance"], "Deployment", "edge")["metadata"]["namespace"]
    assert found["shards"] == 2
    assert container["ports"] == [{"name": "metrics", "containerPort": found["metrics_port"]}]
    assert str(found["nodes"][0]).startswith(container["volumeMounts"][0]["mountPath"])


def test_the_rebalancer_is_let_in_where_shards_let_nobody_in(rendered):
    made = rendered["rebalance"]
    policy = one(made, "NetworkPolicy", "edgecascade-rebalance-looks")["spec"]
    labels = one(made, "Deployment", "edge-shard-1")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    (rule,) = policy["ingress"]
    wanted = rule["from"][0]["podSelector"]["matchLabels"].items()
    assert wanted <= one(made, "Deployment", "edgecascade-rebalance")["spec"]["template"]["metadata"]["labels"].items()


def test_no_manifest_holds_a_secret(rendered):
    assert not each(rendered, "Secret")


# ---- scaling ----


def test_scaled_objects_keep_to_the_bounds_of_the_community_edition(rendered):
    for scaled in each(rendered, "ScaledObject"):
        spec = scaled["spec"]
        assert 1 <= spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"] <= 5
        (trigger,) = spec["triggers"]
        if trigger["type"] == "external":
            metadata = trigger["metadata"]
            assert metadata["minReplicas"] == str(spec["minReplicaCount"])
            assert metadata["maxReplicas"] == str(spec["maxReplicaCount"])
            assert metadata["namespace"] == scaled["metadata"]["namespace"]
            assert metadata["function"] == scaled["metadata"]["name"] == spec["scaleTargetRef"]["name"]


def test_nobody_else_sets_the_replicas_of_what_is_scaled(rendered, stack):
    """A manifest that named them would set them back with every apply; a label, with every deploy."""
    for name, made in rendered.items():
        scaled = {m["spec"]["scaleTargetRef"]["name"] for m in made if m["kind"] == "ScaledObject"}
        assert scaled, name
        for manifest in made:
            if manifest["kind"] == "Deployment" and manifest["metadata"]["name"] in scaled:
                assert "replicas" not in manifest["spec"]
        assert "com.openfaas.scale" not in json.dumps(made)


def test_the_scaler_is_found_under_the_name_that_keda_dials(rendered):
    for made in rendered.values():
        for scaled in (m for m in made if m["kind"] == "ScaledObject"):
            metadata = scaled["spec"]["triggers"][0]["metadata"]
            if "scalerAddress" in metadata:
                service = one(made, "Service", "edgecascade-scaler")
                names = service["metadata"]["name"], service["metadata"]["namespace"]
                port = service["spec"]["ports"][0]["port"]
                assert metadata["scalerAddress"] == f"{'.'.join(names)}.svc:{port}"
                assert metadata["enableTLS"] == "true"


def test_keda_s_certificates_come_from_a_secret_alone(rendered):
    for authentication in each(rendered, "TriggerAuthentication"):
        parameters = {entry["parameter"]: entry["key"] for entry in authentication["spec"]["secretTargetRef"]}
        assert parameters == {"caCert": "ca.crt", "tlsClientCert": "tls.crt", "tlsClientKey": "tls.key"}


def test_without_our_scaler_keda_asks_prometheus_and_needs_nothing_of_ours(rendered):
    made = rendered["prometheus-trigger-only"]
    assert {m["kind"] for m in made} == {"ScaledObject"}
    thresholds = {m["metadata"]["name"]: m["spec"]["triggers"][0]["metadata"]["threshold"] for m in made}
    assert thresholds == {"device": "2.8", "edge": "2.8"}  # 0.7 of four slots
    assert all(m["spec"]["triggers"][0]["metadata"]["ignoreNullValues"] == "false" for m in made)


def test_the_scaler_itself_takes_each_trigger_and_each_setting(rendered):
    """By the scaler's own parser."""
    trigger = pytest.importorskip("scaler.trigger", reason="the scaler is not part of this tree yet")
    settings = pytest.importorskip("scaler.settings")
    for scaled in each(rendered, "ScaledObject"):
        (found,) = scaled["spec"]["triggers"]
        if found["type"] == "external":
            parsed = trigger.parse(found["metadata"], "elsewhere")
            assert parsed.namespace == scaled["metadata"]["namespace"]
            assert (parsed.target.minimum, parsed.target.maximum) == (1, 5)
    for pod in (pods(made)["edgecascade-scaler"] for made in rendered.values() if "edgecascade-scaler" in pods(made)):
        assert set(environment(pod["containers"][0])) <= set(settings.KEYS)


# ---- the functions as Deployments ----


def test_each_function_of_the_stack_is_a_deployment_with_its_image_environment_and_resources(stack):
    made = plain(stack)
    for function in stack.functions.values():
        (container,) = one(made, "Deployment", function.name)["spec"]["template"]["spec"]["containers"]
        assert container["image"] == function.image
        assert container["resources"] == {"requests": function.requests, "limits": function.limits}
        own = environment(container)
        assert set(own) == set(function.environment) - WATCHDOG_KEYS
        Environment({key: value or "" for key, value in own.items()}).check_names()
        assert container["command"][:3] == ["gunicorn", "--bind", "0.0.0.0:8080"]
        assert one(made, "Service", function.name)["spec"]["type"] == "ClusterIP"
    (dispatcher,) = one(made, "Deployment", "dispatcher")["spec"]["template"]["spec"]["containers"]
    assert environment(dispatcher)["DEVICE_URL"] == "http://device:8080"
    assert environment(dispatcher)["EDGE_URL"] == "http://edge:8080"


def test_a_pod_is_given_the_time_that_its_drain_takes(rendered, stack):
    words = stack.functions["edge"].fprocess.split()
    drain_s = int(words[words.index("--graceful-timeout") + 1])
    for made in (rendered["plain"], rendered["kubeedge"]):
        for name, pod in pods(made).items():
            if name != "edgecascade-scaler":
                leave_s = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
                assert pod["terminationGracePeriodSeconds"] > leave_s + drain_s


def test_probes_ask_routes_that_every_function_has(rendered):
    """And by names of ports that the container has."""
    app = tier_app(FakeTier()).test_client()
    for made in rendered.values():
        for name, pod in pods(made).items():
            for container in pod["containers"]:
                ports = {port["name"] for port in container["ports"]}
                for key in ("startupProbe", "readinessProbe", "livenessProbe"):
                    if name in {"edgecascade-scaler", "edgecascade-rebalance"}:
                        asked = container.get(key, {"tcpSocket": {"port": container["ports"][0]["name"]}})
                        assert asked["tcpSocket"]["port"] in ports
                        continue
                    asked = container[key]["httpGet"]
                    assert asked["port"] in ports
                    assert app.get(asked["path"]).status_code in {200, 503}


def test_a_container_starts_as_its_deployment_says_answers_its_probes_and_ends_in_peace(stack):
    (container,) = one(plain(stack), "Deployment", "device")["spec"]["template"]["spec"]["containers"]
    port = free_port()
    words = [word.replace("0.0.0.0:8080", f"127.0.0.1:{port}") for word in container["command"]]
    own = {key: value for key, value in environment(container).items() if "/secrets/" not in (value or "")}
    values = {key: value or "a-node" for key, value in own.items() if value != ""}
    values["MODEL_PATH"] = str(ROOT / "models" / "tiers" / "device")
    process = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, env={"PATH": os.environ["PATH"], **values}, stderr=subprocess.DEVNULL
    )
    try:
        with http_client(f"http://127.0.0.1:{port}") as client:

            def probed(name):
                return client.get(container[name]["httpGet"]["path"]).status_code

            def started():
                try:
                    return probed("startupProbe") == 200
                except httpx.TransportError:
                    assert process.poll() is None
                    return False

            wait_until(started, timeout_s=120)
            assert probed("readinessProbe") == probed("livenessProbe") == 200
            assert client.post("/", content="what is the weather").status_code == 200
            assert 'node_id="a-node"' in client.get("/metrics").text
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(20)


def test_at_the_edge_the_device_site_is_one_pod_that_needs_no_network(rendered):
    made = rendered["kubeedge"]
    pod = pods(made)["device-site"]
    assert one(made, "DaemonSet", "device-site")
    dispatcher, device = pod["containers"]
    assert (dispatcher["name"], device["name"]) == ("dispatcher", "device")
    (port,) = device["ports"]
    assert environment(dispatcher)["DEVICE_URL"] == f"http://127.0.0.1:{port['containerPort']}"
    assert device["command"][2] == f"0.0.0.0:{port['containerPort']}"
    assert environment(dispatcher)["EDGE_URL"] == "http://edge:8080"
    assert pod["nodeSelector"] == {"node-role.kubernetes.io/edge": "", "edgecascade.io/site": "device"}


def test_pods_of_a_node_that_is_cut_off_stay(rendered):
    for name, pod in pods(rendered["kubeedge"]).items():
        if name == "edgecascade-scaler":
            assert "tolerations" not in pod  # it belongs where the API server is
            continue
        stay = {t["key"]: t for t in pod["tolerations"] if t["effect"] == "NoExecute"}
        assert set(stay) == {"node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"}
        assert all("tolerationSeconds" not in toleration for toleration in stay.values())


def test_a_daemon_set_is_not_scaled(rendered):
    kinds = {m["metadata"]["name"] for m in rendered["kubeedge"] if m["kind"] == "ScaledObject"}
    assert kinds == {"edge"}


def test_shards_hold_all_layers_and_find_each_other_by_a_headless_service(rendered):
    made = rendered["shards"]
    head, tail = (pods(made)[name]["containers"][0] for name in ("edge", "edge-shard-1"))
    assert head["image"] == tail["image"]
    first, last = (environment(shard) for shard in (head, tail))
    layers = [layer for shard in (first, last) for layer in range_of(shard["SHARD_LAYERS"])]
    assert layers == list(range(30)), "those of the shipped edge tier"
    name, _, port = first["SHARD_NEXT"].partition(":")
    service = one(made, "Service", name)["spec"]
    assert (service["clusterIP"], service["selector"]) == ("None", {"faas_function": "edge-shard-1"})
    assert [str(p["port"]) for p in service["ports"]] == [port] == [last["SHARD_LISTEN"]]
    assert "SHARD_NEXT" not in last
    assert one(made, "Deployment", "edge-shard-1")["spec"]["replicas"] == 2
    for shard in (first, last):
        assert shard["MODEL_PATH"] == "/home/app/tiers/edge"
        assert shard["SHARD_PEERS"] == "spiffe://edgecascade/edge"


def range_of(text):
    first, last = text.split("-")
    return range(int(first), int(last) + 1)


def test_a_shard_itself_takes_its_settings(rendered, tmp_path):
    """By the edge function's own parser."""
    config = pytest.importorskip("functions.edge.config", reason="shards are not part of this tree yet")
    for name in ("edge", "edge-shard-1"):
        (container,) = pods(rendered["shards"])[name]["containers"]
        values = {key: value or "" for key, value in environment(container).items()}
        for key in ("SHARD_TLS_CERT", "SHARD_TLS_KEY", "SHARD_TLS_CA"):
            values[key] = str(tmp_path / Path(values[key]).name)
            Path(values[key]).touch()
        Environment(values).check_names()
        parsed = config.ShardConfig.from_environment(values)
        assert parsed.layers == range_of(values["SHARD_LAYERS"])


def test_the_gpu_overlay_asks_for_a_gpu_and_uses_it(rendered):
    (edge,) = pods(rendered["gpu"])["edge"]["containers"]
    assert edge["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert environment(edge)["EXECUTION_PROVIDERS"] == "CUDA,CPU"
    assert len(edge["env"]) == len(environment(edge))


def test_secrets_of_the_stack_are_mounted_where_openfaas_has_them():
    spec = "{image: i, handler: h, fprocess: gunicorn --bind x y, labels: {site: edge}, secrets: [model-key]}"
    pod = pods(plain(parse(f"functions: {{edge: {spec}}}", {})))["edge"]
    assert pod["volumes"][1]["projected"]["sources"] == [{"secret": {"name": "model-key"}}]
    assert pod["containers"][0]["volumeMounts"][1] == {
        "name": "edge-secrets", "mountPath": "/var/openfaas/secrets", "readOnly": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{image: i, handler: h, fprocess: gunicorn --bind x y}", "'f' needs the label 'site: device' or 'site: edge'"),
        ("{image: i, handler: h, fprocess: python app.py, labels: {site: edge}}", "'f' has no '--bind ADDRESS'"),
    ],
)
def test_a_function_that_fits_no_site_or_port_is_refused_by_name(spec, says):
    with pytest.raises(StackError, match=re.escape(says)):
        at_the_edge(parse(f"functions: {{f: {spec}}}", {}))


# ---- metrics, rules, alerts, the dashboard ----


@pytest.fixture(scope="module")
def measured():
    """Series → labels they may have, as the functions really expose them; each function with what it adds."""
    texts = []
    with ExitStack() as running:
        device = running.enter_context(served(tier_app(FakeTier())))
        edge = tier_app(FakeTier(card("edge")))
        apps = [edge, dispatcher_app(device, device), running.enter_context(federated({"device": device}))]
        for app in apps:
            client = app.test_client()
            body = {"messages": [{"role": "user", "content": "hi"}], "skill": "assistant"}
            client.post("/v1/chat/completions", json=body, headers={"X-Deadline-Class": "kiosk"})
            client.post("/v1/chat/completions", json=body)
            client.post("/v1/chat/completions", data="[")
            texts.append(client.get("/metrics").text)
    metrics = Metrics("n", "s")
    metrics.add(power_series(lambda: Power(level=0.5, source="s", charging=True, celsius=40.0)))
    texts.append(metrics.exposition(inflight=0, waiting=0, limit=1, ready=True).decode())
    found = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    if SCALER_METRICS is not None:
        own = SCALER_METRICS.Metrics().registry._names_to_collectors
        found |= {name: set(collector._labelnames) for name, collector in own.items()}
    return found


def expressions(stack):
    rules = yaml.safe_load(derived(stack)[RULES])["groups"]
    yield from (rule["expr"] for group in rules for rule in group["rules"])
    panels = json.loads(derived(stack)["monitoring/dashboard.json"])["panels"]
    yield from (target["expr"] for panel in panels for target in panel["targets"])
    for scaled in render(stack, "prometheus-trigger-only"):
        yield scaled["spec"]["triggers"][0]["metadata"]["query"]


def test_every_series_that_is_asked_for_is_one_that_the_code_exposes_with_such_labels(stack, measured):
    """`faas_function` comes from the scrape, so no function exposes it."""
    asked = set()
    for text in expressions(stack):
        for name, matchers in re.findall(r"\b(edgecascade_\w+)(?:\{([^}]*)\})?", text):
            if name.startswith("edgecascade_scaler_") and SCALER_METRICS is None:
                continue
            assert name in measured, name
            labels = set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', matchers)) - {"faas_function"}
            assert labels <= measured[name], (name, labels)
            asked.add(name)
        series = re.findall(r"\b(edgecascade_\w+)", text)
        if "edgecascade_scaler_" in text and SCALER_METRICS is None:
            continue
        for label in {x for by in re.findall(r"by \(([^)]*)\)", text) for x in by.split(", ")} - {"faas_function"}:
            assert not series or any(label in measured[name] for name in series), (label, text)
    assert len(asked) > 10


def test_every_recorded_series_that_is_asked_for_is_recorded(stack):
    groups = yaml.safe_load(derived(stack)[RULES])["groups"]
    recorded = {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    for text in expressions(stack):
        assert set(re.findall(r"\b(edgecascade:[\w:]+)", text)) <= recorded


def test_a_tier_s_time_is_the_bound_of_a_bucket(stack):
    for tier in tiers(stack):
        assert slo_seconds(tier) in SECONDS


def test_refusals_are_codes_of_the_functions():
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "functions").rglob("*.py"))
    for name in REFUSALS.split("|"):
        assert f'"{name}"' in code, name


def test_alerts_burn_as_the_workbook_says():
    assert [(b.factor, b.long, b.short) for b in BURNS] == [
        (14.4, "1h", "5m"), (6, "6h", "30m"), (3, "1d", "2h"), (1, "3d", "6h"),
    ]  # fmt: skip
    assert {window for burn in BURNS for window in (burn.long, burn.short)} == set(WINDOWS)


def test_the_operator_s_rules_are_those_of_the_file(stack, rendered):
    for rule in each(rendered, "PrometheusRule"):
        assert rule["spec"] == yaml.safe_load((TREE / RULES).read_text("utf-8"))


def promtool(*words):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not here (Debian: apt-get install prometheus)")
    return subprocess.run(["promtool", *words], capture_output=True, text=True, check=False, timeout=120)


def test_promtool_takes_the_rules():
    said = promtool("check", "rules", "--lint-fatal", str(TREE / RULES))
    assert said.returncode == 0, said.stdout + said.stderr


def test_alerts_fire_when_they_should_and_not_otherwise():
    said = promtool("test", "rules", str(ALERT_TESTS))
    assert said.returncode == 0, said.stdout + said.stderr


def test_every_alert_has_a_case_in_which_it_fires(stack):
    groups = yaml.safe_load(derived(stack)[RULES])["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    cases = yaml.safe_load(ALERT_TESTS.read_text("utf-8"))["tests"]
    fired = {test["alertname"] for case in cases for test in case["alert_rule_test"] if test.get("exp_alerts")}
    assert fired == alerts


def test_the_dashboard_can_be_narrowed_to_a_node_a_shard_and_a_model(stack):
    board = json.loads(derived(stack)["monitoring/dashboard.json"])
    assert [v["name"] for v in board["templating"]["list"]] == ["source", "node_id", "shard_id", "model_version"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places)
    for panel in board["panels"]:
        for target in panel["targets"]:
            if "edgecascade:" not in target["expr"] and "edgecascade_scaler" not in target["expr"]:
                assert all(f'{name}=~"${name}"' in target["expr"] for name in ("node_id", "shard_id", "model_version"))


# ---- the command ----


def run(*words, **variables):
    return CliRunner().invoke(
        edgecascade.typer.main.get_command(edgecascade.app),
        ["kubernetes", "render", *words],
        env=variables,
        obj=edgecascade.rooms(),
    )


def test_the_command_prints_an_overlay_with_the_variables_of_the_shell():
    said = run("--overlay", "plain", REGISTRY="r.example:5000/team", TAG="7", DEADLINE_MS="1234")
    assert said.exit_code == 0
    made = list(yaml.safe_load_all(said.output))
    assert made[0]["kind"] == "Namespace"
    images = {c["image"] for pod in pods(made).values() for c in pod["containers"]}
    assert images == {
        f"r.example:5000/team/edgecascade-{name}:7" for name in ("dispatcher", "device", "edge", "federation", "scaler")
    }
    (dispatcher,) = pods(made)["dispatcher"]["containers"]
    assert environment(dispatcher)["DEADLINE_MS"] == "1234"


def test_the_command_writes_a_file_or_a_whole_tree(tmp_path, stack):
    said = run("--overlay", "k3s", "--out", str(tmp_path))
    assert said.output.split() == [str(tmp_path / "k3s.yaml")]
    assert list(yaml.safe_load_all((tmp_path / "k3s.yaml").read_text("utf-8"))) == render(stack, "k3s")
    tree = tmp_path / "tree"
    run("--kustomize", "--out", str(tree), TAG="9")
    made = build(folder(tree, {}), "overlays/plain")
    assert made == build(folder(TREE, derived(load(ROOT / "stack.yml", {"TAG": "9"}))), "overlays/plain")
    assert run("--kustomize", "--out", str(tree), TAG="9").output == "", "nothing has changed"


def test_a_site_can_be_rendered_alone():
    made = list(yaml.safe_load_all(run("--overlay", "k3s", "--site", "edge").output))
    assert [m["metadata"]["name"] for m in made if m["kind"] == "ScaledObject"] == ["edge"]
    made = list(yaml.safe_load_all(run("--overlay", "plain", "--site", "device").output))
    assert set(pods(made)) == {"dispatcher", "device", "edgecascade-scaler"}
    said = run("--site", "moon")
    assert str(said.exception) == "no function of stack.yml is of the site 'moon'; sites are device and edge"


def test_an_overlay_that_is_none_is_one_sentence():
    said = run("--overlay", "moon")
    assert isinstance(said.exception, ManifestError)
    assert str(said.exception) == f"there is no overlay 'moon'; there are {', '.join(NAMES)}"


# ---- docs/kubernetes.md ----


PAGE = ROOT / "docs" / "kubernetes.md"


def page_lines(program):
    return [words for words in shell_lines(PAGE) if words[0] == program]


def test_the_page_s_certificates_are_those_that_keda_and_scaler_need(tmp_path, rendered):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here")
    for words in page_lines("openssl"):
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=60)

    def openssl(*words):
        return subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    for name in ("scaler", "keda"):
        assert f"{name}.crt: OK" in openssl("verify", "-CAfile", "ca.crt", f"{name}.crt")
    address = one(rendered["k3s"], "ScaledObject", "edge")["spec"]["triggers"][0]["metadata"]["scalerAddress"]
    assert f"DNS:{address.rpartition(':')[0]}" in openssl(
        "x509", "-in", "scaler.crt", "-noout", "-ext", "subjectAltName"
    )
    made = [words for words in page_lines("kubectl") if words[1:3] == ["create", "secret"]]
    mounted = pods(rendered["k3s"])["edgecascade-scaler"]["volumes"][0]["secret"]["secretName"]
    asked = {entry["name"] for m in each(rendered, "TriggerAuthentication") for entry in m["spec"]["secretTargetRef"]}
    assert {words[4] for words in made} == {mounted} | asked
    for words in made:
        files = [word.removeprefix("--from-file=").partition("=") for word in words if word.startswith("--from-file=")]
        assert {key for key, _, _ in files} == {"tls.crt", "tls.key", "ca.crt"}
        assert all((tmp_path / (file or key)).is_file() for key, _, file in files)


def test_what_the_page_applies_is_there():
    applied = {words[-1] for words in page_lines("kubectl") if words[1] == "apply"}
    ours = {path for path in applied if path.startswith("deploy/")}
    assert {Path(path).name for path in ours} | {"plain"} == set(NAMES)
    assert all((ROOT / path / "kustomization.yaml").is_file() for path in ours)
    assert all(f"| `{name}` |" in PAGE.read_text("utf-8") for name in NAMES)


def test_the_page_names_every_alert(stack):
    groups = yaml.safe_load(derived(stack)[RULES])["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert set(re.findall(r"^\| `(Edgecascade\w+)`", PAGE.read_text("utf-8"), re.MULTILINE)) == alerts
