"""Rebalance: when a plan is looked at again, when it moves, and what is told; appliers against a fake API."""

import itertools
import json
import logging
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from kubernetes import client
from prometheus_client import CollectorRegistry

from scaler.placement.apply import (
    LAYERS,
    NEXT,
    KubernetesApplier,
    Shard,
    assignments,
    connect,
    deployment,
)
from scaler.placement.controller import Controller
from scaler.placement.errors import ApplyError
from scaler.placement.plan import place
from scaler.placement.rebalance import Action, Observed, Policy, Reason, State, decide
from scaler.placement.values import Goal, Layer, Link, Model, Node, Problem, Workload

MIB = 2**20
SHARDS = [Shard(f"s{n}", f"s{n}-links:5051") for n in range(3)]
POLICY = Policy(slo_ms=500, sustained_s=10, silent_s=2, interval_s=60, moves_per_hour=3)


def problem(speeds, memory_mib=100, replicas=1, n_layers=12):
    nodes = [Node(name, memory_mib * MIB, 1 / s, 0.1 / s, 0.5 / s) for name, s in speeds.items()]
    links = dict.fromkeys(itertools.permutations(speeds, 2), Link(0.5, 1000))
    model = Model([Layer(5 * MIB)] * n_layers, MIB, MIB, 0, 1000, 2000)
    return Problem(nodes, links, model, Workload(64, 32, 128, 2), replicas=replicas)


def begin(given, goal=Goal.LATENCY):
    return State(given, place(given, goal))


def two_and_a_spare():
    """A and b are needed for memory; c is a little slower and free."""
    return begin(problem({"a": 2.0, "b": 2.0, "c": 1.8}, memory_mib=40))


def seen(at_s=100.0, **rest):
    return Observed(at_s, **{"requests_per_s": 2.0, "sessions": 1, **rest})


def test_nothing_seen_changes_nothing():
    state = two_and_a_spare()
    after, decision = decide(state, seen(), POLICY)
    assert (after, decision.action, decision.reason) == (state, Action.KEEP, Reason.STEADY)


def test_a_silent_node_is_replaced_at_once():
    state = two_and_a_spare()
    gone = state.plan.stages[0].nodes[0]
    assert decide(state, seen(silent_s={gone: 1.0}), POLICY)[1].action is Action.KEEP
    after, decision = decide(state, seen(silent_s={gone: 3.0}), POLICY)
    assert (decision.action, decision.reason, decision.forced) == (Action.MOVE, Reason.NODE_SILENT, True)
    assert gone not in after.plan.by_node
    assert after.moves_s == (100.0,)


def test_a_silent_node_that_runs_nothing_is_nobody_s_concern():
    state = two_and_a_spare()
    spare = ({"a", "b", "c"} - set(state.plan.by_node)).pop()
    assert decide(state, seen(silent_s={spare: 99.0}), POLICY)[1].reason is Reason.STEADY


def test_where_no_plan_is_left_the_old_one_stays_and_the_reason_is_said():
    state = begin(problem({"a": 2.0, "b": 2.0}, memory_mib=40))
    _, decision = decide(state, seen(silent_s={"a": 9.0}), POLICY)
    assert (decision.action, decision.reason, decision.trigger) == (
        Action.KEEP,
        Reason.INFEASIBLE,
        Reason.NODE_SILENT,
    )
    assert "MiB are missing" in decision.sentence


def test_a_lost_replica_is_replaced_and_with_nobody_left_fewer_replicas_will_do():
    state = begin(problem({"a": 2.0, "b": 2.0, "c": 1.0}, replicas=2))
    lost = state.plan.stages[0].nodes[0]
    _, decision = decide(state, seen(silent_s={lost: 3.0}), POLICY)
    assert (decision.action, decision.forced) == (Action.MOVE, True)
    assert len(decision.plan.stages[0].nodes) == 2
    _, decision = decide(state, seen(silent_s={"a": 3.0, "b": 3.0}), POLICY)
    assert [stage.nodes for stage in decision.plan.stages] == [("c",)]


@pytest.mark.parametrize(("factor", "wanted"), [(1.2, Reason.STEADY), (6.0, Reason.NODE_SLOW)])
def test_a_slow_node_is_left_if_it_pays(factor, wanted):
    state = two_and_a_spare()
    slow = state.plan.stages[1].nodes[0]
    _, decision = decide(state, seen(slowdown={slow: factor}), POLICY)
    assert decision.reason is wanted
    if wanted is Reason.NODE_SLOW:
        assert decision.action is Action.MOVE
        assert slow not in decision.plan.by_node
        assert decision.gain_s > decision.cost_s > 0


def test_a_slow_link_is_left():
    state = two_and_a_spare()
    one, other = (stage.nodes[0] for stage in state.plan.stages)
    slow = {pair: Link(20.0, 1000) for pair in ((one, other), (other, one))}
    _, decision = decide(state, seen(links=slow), POLICY)
    assert (decision.action, decision.reason) == (Action.MOVE, Reason.LINK_SLOW)
    assert set(decision.plan.by_node) != {one, other}


def test_a_move_that_costs_more_than_it_saves_is_not_made():
    state = two_and_a_spare()
    slow = state.plan.stages[1].nodes[0]
    _, decision = decide(state, seen(slowdown={slow: 6.0}, requests_per_s=0.001, sessions=50), POLICY)
    assert (decision.action, decision.reason) == (Action.KEEP, Reason.NOT_WORTH_IT)
    assert 0 < decision.gain_s < decision.cost_s


def test_latency_must_stay_over_the_objective():
    state = two_and_a_spare()
    for at_s, latency_ms, wanted in [
        (0, 600, Reason.STEADY), (9, 600, Reason.STEADY), (10, 400, Reason.STEADY),
        (11, 600, Reason.STEADY), (22, 600, Reason.SAME_PLAN),
    ]:  # fmt: skip
        state, decision = decide(state, seen(at_s, latency_ms=latency_ms), POLICY)
        assert decision.reason is wanted, at_s
    assert decision.trigger is Reason.OVER_SLO


def test_moves_are_rate_limited():
    state, slow = two_and_a_spare(), {}
    reasons = []
    for at_s in range(0, 400, 10):
        used = list(state.plan.by_node)
        slow = {used[-1]: 50.0}  # whoever is used is slow: it would move all the time
        state, decision = decide(state, seen(float(at_s), slowdown=slow), POLICY)
        reasons.append(decision.reason if decision.action is Action.KEEP else Action.MOVE)
    assert reasons.count(Action.MOVE) == POLICY.moves_per_hour == len(state.moves_s)
    gaps = [b - a for a, b in itertools.pairwise(state.moves_s)]
    assert min(gaps) >= POLICY.interval_s
    assert Reason.TOO_SOON in reasons
    _, later = decide(state, seen(4000.0, slowdown={next(iter(state.plan.by_node)): 50.0}), POLICY)
    assert later.action is Action.MOVE


def test_a_forced_move_does_not_wait_for_the_interval():
    state = replace(two_and_a_spare(), moves_s=(95.0,))
    gone = state.plan.stages[0].nodes[0]
    assert decide(state, seen(silent_s={gone: 3.0}), POLICY)[1].action is Action.MOVE
    state = replace(state, moves_s=(95.0, 96.0, 97.0))
    assert decide(state, seen(silent_s={gone: 3.0}), POLICY)[1].reason is Reason.TOO_SOON


class Recorder:
    """An applier that writes down what it is told."""

    def __init__(self, refuses=""):
        self.plans, self.refuses, self.other = [], refuses, False

    def apply(self, plan):
        if self.refuses:
            raise ApplyError(self.refuses)
        self.plans.append(plan)

    def drifted(self, plan):
        return self.other


def controller(applier, **rest):
    registry = CollectorRegistry()
    return Controller(two_and_a_spare(), POLICY, applier, registry, **rest), registry


def count(registry, **labels):
    return registry.get_sample_value("edgecascade_rebalance_total", labels)


def test_every_decision_is_logged_and_counted_with_its_reason(caplog):
    caplog.set_level(logging.DEBUG)
    applier = Recorder()
    control, registry = controller(applier)
    control.step(seen())
    gone = control.state.plan.stages[0].nodes[0]
    control.step(seen(silent_s={gone: 3.0}))
    assert applier.plans == [control.state.plan]
    assert count(registry, action="keep", reason="steady", trigger="steady", result="done") == 1
    assert count(registry, action="move", reason="node_silent", trigger="node_silent", result="done") == 1
    quiet, told = caplog.records
    words = json.loads(told.getMessage().removeprefix("rebalance "))
    assert (quiet.levelname, told.levelname) == ("DEBUG", "INFO")
    assert words["reason"] == "node_silent"
    assert words["says"].startswith(f"nothing was heard of {gone} for 3.0 s")
    assert [stage["layers"] for stage in words["plan"]] == [s.layers for s in control.state.plan.stages]
    predicted = registry.get_sample_value("edgecascade_placement_predicted_ms", {"of": "token"})
    assert predicted == control.state.plan.prediction.token_ms


def test_a_dry_run_says_what_it_would_do_and_does_nothing():
    applier = Recorder()
    control, registry = controller(applier, dry_run=True)
    before = control.state.plan
    decision = control.step(seen(silent_s={before.stages[0].nodes[0]: 3.0}))
    assert decision.action is Action.MOVE
    assert (applier.plans, control.state.plan) == ([], before)
    assert count(registry, action="move", reason="node_silent", trigger="node_silent", result="dry_run") == 1


def test_a_plan_that_is_refused_is_not_taken_for_applied(caplog):
    caplog.set_level(logging.INFO)
    control, registry = controller(Recorder(refuses="no rights"))
    before = control.state.plan
    control.step(seen(silent_s={before.stages[0].nodes[0]: 3.0}))
    assert control.state.plan == before
    assert count(registry, action="move", reason="node_silent", trigger="node_silent", result="failed") == 1
    assert json.loads(caplog.records[0].getMessage().removeprefix("rebalance "))["error"] == "no rights"


def test_what_somebody_else_deployed_is_put_right_a_few_times_an_hour():
    applier = Recorder()
    control, _ = controller(applier)
    applier.other = True
    reasons = [control.step(seen(float(at))).reason for at in range(5)]
    assert reasons == [Reason.DRIFTED] * 3 + [Reason.TOO_SOON] * 2
    assert applier.plans == [control.state.plan] * 3


# ---- appliers ----


def test_shards_are_told_their_layers_and_those_left_over_stop():
    plan = two_and_a_spare().plan
    found = assignments(plan, SHARDS)
    assert [(a.shard, a.layers, a.nodes, a.next) for a in found] == [
        ("s0", plan.stages[0].layers, plan.stages[0].nodes, "s1-links:5051"),
        ("s1", plan.stages[1].layers, plan.stages[1].nodes, ""),  # a shard that ends the model refuses a next one
        ("s2", "", (), ""),
    ]
    with pytest.raises(ApplyError, match="2 ranges of layers and the bundle 1 shards; add 1 to"):
        assignments(plan, SHARDS[:1])


class ApiServer(BaseHTTPRequestHandler):
    """As much of Kubernetes as applying takes: Deployments that merge what is applied, and are ready soon."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.split("/")[-1].split("?")[0]
        self.reply(self.server.deployments.get(name))

    def do_PATCH(self):
        name, _, query = self.path.split("/")[-1].partition("?")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.patches.append((name, query, self.headers["Content-Type"], body))
        found = self.server.deployments.get(name)
        if found and "dryRun" not in query:
            spec = body["spec"]
            found["spec"]["replicas"] = spec["replicas"]
            found["spec"]["template"] = spec.get("template", found["spec"]["template"])
            found["metadata"]["generation"] += 1
            n = spec["replicas"]
            found["status"] = {
                "observedGeneration": found["metadata"]["generation"],
                "replicas": n, "updatedReplicas": n, "readyReplicas": 0 if name in self.server.stuck else n,
            }  # fmt: skip
        self.reply(found)

    def reply(self, found):
        data = json.dumps(found or {"kind": "Status", "code": 404}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def blank(name):
    labels = {"faas_function": name}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": name, "image": "x"}]}}
    return {
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": name, "generation": 1},
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": pod},
        "status": {},
    }  # fmt: skip


@pytest.fixture
def cluster():
    with ThreadingHTTPServer(("127.0.0.1", 0), ApiServer) as server:
        server.deployments = {name: blank(name) for name in ("edge-0", "edge-1", "edge-2")}
        server.patches, server.stuck = [], set()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        settings = client.Configuration()
        settings.host, settings.retries = f"http://127.0.0.1:{server.server_address[1]}", 0
        with client.ApiClient(settings) as connection:
            server.api = client.AppsV1Api(connection)
            yield server
            connection.rest_client.pool_manager.clear()
        server.shutdown()
        thread.join()


def kubernetes_applier(cluster, **rest):
    ticks = itertools.count()
    shards = [Shard(f"edge-{n}", f"edge-{n}-links:5051") for n in range(3)]
    return KubernetesApplier(
        cluster.api, "openfaas-fn", shards, clock=lambda: float(next(ticks)), sleep=lambda _: None, **rest
    )


def test_deployments_get_their_layers_nodes_and_replicas_by_server_side_apply(cluster):
    plan = two_and_a_spare().plan
    applier = kubernetes_applier(cluster)
    assert applier.drifted(plan)
    applier.apply(plan)
    assert not applier.drifted(plan)
    tried, done = cluster.patches[:3], cluster.patches[3:]
    assert all("dryRun=All" in query for _, query, _, _ in tried)
    assert [name for name, *_ in done] == ["edge-2", "edge-1", "edge-0"]
    for _, query, kind, _ in cluster.patches:
        assert kind == "application/apply-patch+yaml"
        assert "fieldManager=edgecascade-placement" in query
        assert "force=" in query
    assert cluster.deployments["edge-2"]["spec"]["replicas"] == 0
    pod = cluster.deployments["edge-0"]["spec"]["template"]["spec"]
    told = [{"name": LAYERS, "value": plan.stages[0].layers}, {"name": NEXT, "value": "edge-1-links:5051"}]
    assert pod["containers"] == [{"name": "edge-0", "env": told}]


def test_a_redeploy_that_takes_the_layers_away_is_noticed(cluster):
    plan = two_and_a_spare().plan
    applier = kubernetes_applier(cluster)
    applier.apply(plan)
    cluster.deployments["edge-1"] = blank("edge-1")
    assert applier.drifted(plan)


def test_nothing_is_changed_where_a_shard_is_absent(cluster):
    del cluster.deployments["edge-1"]
    with pytest.raises(ApplyError, match="knows no such shard, deploy it first: Deployment 'edge-1' in 'openfaas-fn'"):
        kubernetes_applier(cluster).apply(two_and_a_spare().plan)
    assert all("dryRun=All" in query for _, query, _, _ in cluster.patches)


def test_a_shard_that_never_gets_ready_is_named(cluster):
    cluster.stuck.add("edge-1")
    with pytest.raises(ApplyError, match="'edge-1' is not ready 5 s after it was changed"):
        kubernetes_applier(cluster, ready_s=5).apply(two_and_a_spare().plan)


def test_an_api_out_of_reach_is_one_sentence():
    class Away:
        def read_namespaced_deployment(self, *_args, **_rest):
            raise OSError

    with pytest.raises(ApplyError, match="did not answer"):
        KubernetesApplier(Away(), "n", SHARDS).drifted(two_and_a_spare().plan)


def test_without_an_account_there_is_no_connection(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ApplyError, match="neither a service account nor a kubeconfig"):
        connect("openfaas-fn", SHARDS)


def test_what_is_applied_is_a_deployment_kubernetes_takes():
    """The fields, merged into a whole Deployment, against Kubernetes' own schema."""
    import kubernetes_validate

    plan = begin(problem({"a": 1.0, "b": 1.0}, replicas=2)).plan
    (assignment,) = assignments(plan, [Shard("edge-0")])
    whole, fields = blank("edge-0"), deployment(assignment)
    whole.pop("status")
    whole["spec"]["replicas"] = fields["spec"]["replicas"]
    pod = fields["spec"]["template"]["spec"]
    pod["containers"][0]["image"] = "x"
    whole["spec"]["template"]["spec"] = pod
    kubernetes_validate.validate(whole, "1.33", strict=True)
    assert fields["spec"]["replicas"] == 2
    assert SimpleNamespace(**pod).topologySpreadConstraints[0]["maxSkew"] == 1
