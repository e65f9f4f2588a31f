"""Replicas out of Kubernetes' API: a stand-in server, the real client."""

import json
from pathlib import Path

import pytest
import yaml

from scaler.errors import SettingsError, SourceError
from scaler.kubernetes_replicas import connect
from tests.fakes import free_port
from tests.scaler_rigs import http_server


def pod(name, phase="Running", ready=True, ip="10.0.0.1", **metadata):
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}, {"type": "Initialized", "status": "True"}]
    return {
        "metadata": {"name": name, **metadata},
        "status": {"phase": phase, "podIP": ip, "conditions": conditions},
        "spec": {"containers": [{"name": "edge"}]},
    }


PODS = [
    pod("serves"),
    pod("starts", ready=False, ip="10.0.0.2"),
    pod("six", ip="fd00::7"),
    pod("pending", phase="Pending", ready=False, ip=None),
    pod("leaves", deletionTimestamp="2026-11-25T00:00:00Z"),
    pod("failed", phase="Failed", ready=False),
]


class Api:
    def __init__(self):
        self.asked, self.status, self.body = [], 200, json.dumps({"kind": "PodList", "apiVersion": "v1", "items": PODS})

    def __call__(self, path):
        self.asked.append(path)
        return self.status, self.body


@pytest.fixture
def kubeconfig(tmp_path, monkeypatch):
    def write(server):
        file = tmp_path / "config"
        cluster, user = {"name": "c", "cluster": {"server": server}}, {"name": "u", "user": {}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [cluster], "users": [user], "contexts": [context],
        }  # fmt: skip
        file.write_text(yaml.safe_dump(config))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return write


def test_pods_are_counted_by_what_they_are_about(kubeconfig):
    api = Api()
    with http_server(api) as url:
        kubeconfig(url)
        found = connect().of("edge", "openfaas-fn")
    assert (found.ready, found.starting) == (2, 2)
    assert [r.address for r in found.replicas] == [
        "http://10.0.0.1:8080",
        "http://10.0.0.2:8080",
        "http://[fd00::7]:8080",
        "",
    ]
    (path,) = api.asked
    assert path.startswith("/api/v1/namespaces/openfaas-fn/pods?")
    assert "labelSelector=faas_function%3Dedge" in path


@pytest.mark.parametrize("status", [401, 403, 500])
def test_what_the_api_refuses_is_an_error(kubeconfig, status):
    api = Api()
    api.status, api.body = status, "{}"
    with http_server(api) as url:
        kubeconfig(url)
        with pytest.raises(SourceError, match=rf"does not list the pods of 'openfaas-fn' \({status}\)"):
            connect().of("edge", "openfaas-fn")


def test_an_api_that_is_gone_or_talks_nonsense_is_an_error(kubeconfig):
    kubeconfig(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SourceError, match="did not answer"):
        connect().of("edge", "openfaas-fn")
    api = Api()
    with http_server(api) as url:
        kubeconfig(url)
        connected = connect()
        for body in ("<html>", '{"items": 3}', '{"kind": "PodList"}'):
            api.body = body
            with pytest.raises(SourceError):
                connected.of("edge", "openfaas-fn")


def test_without_a_cluster_the_start_stops(monkeypatch, tmp_path):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(Path(tmp_path, "none")))
    with pytest.raises(SettingsError, match="neither a service account nor a kubeconfig"):
        connect()


def node(name, allowed=None, ready=True, **spec):
    annotations = {} if allowed is None else {"edgecascade.io/power-ceiling": allowed}
    conditions = [{"type": "Ready", "status": "True" if ready else "Unknown"}]
    return {"metadata": {"name": name, "annotations": annotations}, "spec": spec, "status": {"conditions": conditions}}


@pytest.mark.parametrize(
    ("nodes", "ceiling"),
    [
        ([node("a", "3"), node("b", "0"), node("c", "2")], 5),
        ([node("a", "3"), node("gone", "9", ready=False), node("closed", unschedulable=True)], 3),
        ([node("a", "3"), node("silent")], None),
        ([node("a", "3"), node("mistaken", "many")], None),
        ([], None),
    ],
)
def test_what_nodes_allow_is_a_ceiling_where_all_of_them_say(kubeconfig, nodes, ceiling):
    asked = []

    def api(path):
        asked.append(path)
        found = ("NodeList", nodes) if "/nodes?" in path else ("PodList", PODS)
        return 200, json.dumps({"kind": found[0], "apiVersion": "v1", "items": found[1]})

    with http_server(api) as url:
        kubeconfig(url)
        assert connect("edgecascade.io/site=edge").of("edge", "openfaas-fn").power_ceiling == ceiling
        assert "labelSelector=edgecascade.io" in asked[1]
        assert connect().of("edge", "openfaas-fn").power_ceiling is None
    assert len(asked) == 3


def test_nodes_that_may_not_be_listed_are_an_error(kubeconfig):
    def api(path):
        return (403, "{}") if "/nodes?" in path else (200, json.dumps({"kind": "PodList", "items": PODS}))

    with http_server(api) as url:
        kubeconfig(url)
        with pytest.raises(SourceError, match=r"does not list the nodes 'site=edge' \(403\)"):
            connect("site=edge").of("edge", "openfaas-fn")
