"""What is seen of shards: silence, slow nodes and links, from their own pages or Prometheus; and the loop around it."""

import itertools
import threading
from types import SimpleNamespace

import httpx
import pytest
from kubernetes import client
from prometheus_client import CollectorRegistry

from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.runtime.tier import Chat, Limits
from scaler.errors import SourceError
from scaler.placement.controller import Controller
from scaler.placement.pages import PrometheusPages, ShardPages, trigger
from scaler.placement.plan import place
from scaler.placement.rebalance import Action, Policy, Reason, State
from scaler.placement.server import KubernetesShards, Loop, Options
from scaler.placement.values import Goal, Layer, Link, Model, Node, Problem, Workload
from scaler.placement.watch import Placed, Watch
from scaler.signals.series import Series, Window
from scaler.signals.source import SHARD
from tests.tiny_models import SHAPE, quiet, write_gguf

MIB = 2**20
LAYERS = 12


def problem():
    """Nodes a and b are needed for memory; c is as good and free."""
    nodes = [Node(name, 40 * MIB, 1.0, 0.1, 2.0) for name in "abc"]
    links = dict.fromkeys(itertools.permutations("abc", 2), Link(0.5, 1000))
    return Problem(nodes, links, Model([Layer(5 * MIB)] * LAYERS, MIB, MIB, 0, 1000, 1000), Workload(64, 32, 128, 2))


STATE = State(problem(), place(problem(), Goal.LATENCY))
FIRST, LAST = (stage.nodes[0] for stage in STATE.plan.stages)


def window(**counters):
    """A window in which counters rose so far, from second 0 to 10."""
    return Window(
        [Series(f"edgecascade_{name}", {}, [(0.0, 0.0), (10.0, float(value))]) for name, value in counters.items()],
        missed=0.0,
    )


def passes(count, each_ms, tokens=None):
    return {
        "passes_total": count,
        "pass_tokens_total": tokens or count,
        "pass_seconds_total": count * each_ms / 1e3,
    }


class Site:
    """Shards and pages as a test sets them."""

    def __init__(self, **windows):
        self.windows = windows

    def shards(self):
        return [Placed(name, f"http://{name}") for name in self.windows]

    def read(self, shards, now_s):
        return {s.node: self.windows[s.node] for s in shards if self.windows[s.node] is not None}


def watched(site, **rest):
    return Watch(site, site, **rest)


def test_a_node_is_silent_from_the_first_look_without_an_answer_until_it_answers():
    site = Site(**{FIRST: window(), LAST: window()})
    watch = watched(site)
    assert watch.look(STATE, 0.0).silent_s == {}
    site.windows[LAST] = None
    assert watch.look(STATE, 5.0).silent_s == {LAST: 0.0}
    assert watch.look(STATE, 7.0).silent_s == {LAST: 2.0}
    del site.windows[LAST]
    assert watch.look(STATE, 8.0).silent_s == {LAST: 3.0}, "a pod that is gone says nothing either"
    site.windows[LAST] = window()
    assert watch.look(STATE, 9.0).silent_s == {}


def test_a_silent_node_that_was_left_is_remembered_and_tried_again_later():
    site = Site(**{FIRST: window(), LAST: None})
    watch = watched(site, trusted_s=100.0)
    watch.look(STATE, 0.0)
    (spare,) = {"a", "b", "c"} - {FIRST, LAST}
    stages = [s if s.nodes == (FIRST,) else type(s)((spare,), s.first, s.stop) for s in STATE.plan.stages]
    moved = State(STATE.problem, type(STATE.plan)(**{**vars(STATE.plan), "stages": tuple(stages)}))
    site.windows = {FIRST: window(), spare: window()}
    assert watch.look(moved, 50.0).silent_s == {LAST: 50.0}
    assert watch.look(moved, 101.0).silent_s == {}


def test_slow_nodes_are_told_by_their_passes_shared_ones_included():
    stages = {stage.nodes[0]: stage for stage in STATE.plan.stages}
    n_first, n_last = (stages[name].stop - stages[name].first for name in (FIRST, LAST))
    site = Site(
        **{
            FIRST: window(**passes(100, 3 * n_first)),
            LAST: window(**passes(100, n_last * (1.0 + 2 * 0.1) + 2.0, tokens=300)),
        }
    )
    found = watched(site).look(STATE, 1.0).slowdown
    assert found == {FIRST: pytest.approx(3.0), LAST: pytest.approx(1.0)}


def test_too_few_passes_say_nothing_and_what_was_measured_holds_for_a_while():
    site = Site(**{FIRST: window(**passes(100, 36.0)), LAST: window(**passes(3, 500.0))})
    watch = watched(site, trusted_s=60.0)
    first = watch.look(STATE, 0.0).slowdown
    assert set(first) == {FIRST}
    site.windows[FIRST] = window()
    assert watch.look(STATE, 30.0).slowdown == first
    assert watch.look(STATE, 61.0).slowdown == {}


def test_a_link_is_what_answers_take_beyond_the_next_shard():
    site = Site(
        **{
            FIRST: window(link_steps_total=50, link_seconds_total=50 * 0.030),
            LAST: window(shard_steps_total=50, shard_step_seconds_total=50 * 0.010),
        }
    )
    links = watched(site).look(STATE, 1.0).links
    wanted_ms = (20.0 - STATE.problem.links[FIRST, LAST].busy_ms(1000)) / 2
    assert links == {pair: Link(pytest.approx(wanted_ms), 1000) for pair in ((FIRST, LAST), (LAST, FIRST))}


def test_latency_and_load_are_the_head_s():
    bucket = [
        Series("edgecascade_request_seconds_bucket", {"le": le}, [(0.0, 0.0), (10.0, n)])
        for le, n in (("1", 0.0), ("2", 20.0), ("+Inf", 20.0))
    ]
    rest = window(requests_total=20, inflight_requests=0).series
    head = Window([*bucket, *rest, Series("edgecascade_inflight_requests", {}, [(10.0, 3.0)])], missed=0.0)
    seen = watched(Site(**{FIRST: head, LAST: window(requests_total=999)})).look(STATE, 1.0)
    assert 1900 < seen.latency_ms <= 2000
    assert (seen.requests_per_s, seen.sessions) == (2.0, 3)


PAGE = 'edgecascade_passes_total{{node_id="{node}"}} {n}\nsomething_else 3\n'


def test_pages_are_read_shard_by_shard_and_one_that_fails_is_not_heard_of():
    counts = itertools.count(0, 5)

    def answer(request):
        if request.url.host == "b":
            raise httpx.ConnectError("gone")
        return httpx.Response(200, text=PAGE.format(node=request.url.host, n=next(counts)))

    with httpx.Client(transport=httpx.MockTransport(answer)) as http:
        pages = ShardPages(http, trigger("edge", "fn", 20.0))
        shards = [Placed("a", "http://a:1"), Placed("b", "http://b:1"), Placed("c", "")]
        pages.read(shards, 0.0)
        found = pages.read(shards, 5.0)
    assert set(found) == {"a"}
    assert found["a"].increase("edgecascade_passes_total") == 5.0
    assert found["a"].named("something_else") == []


def test_prometheus_tells_nodes_apart_by_their_label():
    asked = []

    def answer(request):
        query = request.url.params["query"]
        asked.append(query)
        if query == "time()":
            return httpx.Response(200, json={"status": "success", "data": {"result": [1000.0, "1000"]}})
        rows = [
            {"metric": {"__name__": "edgecascade_passes_total", "node_id": node}, "values": [[at, "0"], [at + 5, "9"]]}
            for node, at in (("a", 990), ("b", 900))
        ]
        return httpx.Response(200, json={"status": "success", "data": {"result": rows if "passes" in query else []}})

    with httpx.Client(transport=httpx.MockTransport(answer)) as http:
        wanted = trigger("edge", "fn", 20.0, "http://prometheus:9090")
        pages = PrometheusPages.of(http, wanted, ["edge", "edge-shard-1"])
        found = pages.read([Placed("a", ""), Placed("b", ""), Placed("c", "")], 50.0)
    assert set(found) == {"a"}, "b was scraped too long ago, c never"
    assert found["a"].increase("edgecascade_passes_total") == 9.0
    assert any('faas_function=~"edge|edge-shard-1"' in query for query in asked)


def pod(node, ip, *, leaves=False):
    return SimpleNamespace(
        metadata=SimpleNamespace(deletion_timestamp="now" if leaves else None),
        spec=SimpleNamespace(node_name=node),
        status=SimpleNamespace(pod_ip=ip),
    )


def test_pods_say_where_shards_run():
    asked = []

    class Api:
        def list_namespaced_pod(self, namespace, **rest):
            asked.append((namespace, rest["label_selector"]))
            items = [
                pod("a", "10.0.0.1"),
                pod("b", "fd00::1"),
                pod("c", None),
                pod("", None),
                pod("d", "1.1.1.1", leaves=True),
            ]
            return SimpleNamespace(items=items)

    found = KubernetesShards(Api(), "fn", Options(shards=2).names).shards()
    assert [(p.node, p.address) for p in found] == [
        ("a", "http://10.0.0.1:8080"), ("b", "http://[fd00::1]:8080"), ("c", ""),
    ]  # fmt: skip
    assert asked == [("fn", "faas_function in (edge,edge-shard-1)")]


@pytest.mark.parametrize("error", [client.ApiException(status=403), OSError()])
def test_pods_that_cannot_be_listed_are_an_error_of_ours(error):
    class Api:
        def list_namespaced_pod(self, *_args, **_rest):
            raise error

    with pytest.raises(SourceError, match="Kubernetes"):
        KubernetesShards(Api(), "fn", ["edge"]).shards()


class Recorder:
    def __init__(self):
        self.plans = []

    def apply(self, plan):
        self.plans.append(plan)

    def drifted(self, plan):
        return False


def looped(site, **rest):
    registry, applier, told = CollectorRegistry(), Recorder(), []
    controller = Controller(STATE, Policy(silent_s=2.0), applier, registry, told=told.append, **rest)
    return Loop(watched(site), controller, registry), applier, told, registry


def test_a_node_that_falls_silent_is_replaced_by_the_loop():
    site = Site(**{FIRST: window(), LAST: window()})
    loop, applier, told, registry = looped(site)
    loop.step(0.0)
    site.windows[LAST] = None
    loop.step(1.0)
    loop.step(4.0)
    (plan,) = applier.plans
    assert LAST not in plan.by_node
    assert [d.action for d in told] == [Action.KEEP, Action.KEEP, Action.MOVE]
    assert told[-1].reason is Reason.NODE_SILENT
    labels = {"action": "move", "reason": "node_silent", "trigger": "node_silent", "result": "done"}
    assert registry.get_sample_value("edgecascade_rebalance_total", labels) == 1
    assert registry.get_sample_value("edgecascade_rebalance_looks_total", {"outcome": "answered"}) == 3


def test_a_dry_loop_applies_nothing():
    loop, applier, told, _ = looped(Site(**{FIRST: window(), LAST: None}), dry_run=True)
    loop.step(0.0)
    loop.step(9.0)
    assert told[-1].action is Action.MOVE
    assert applier.plans == []


def test_where_nothing_can_be_known_the_plan_stays_and_that_is_said_once(caplog):
    class Blind(Site):
        def shards(self):
            raise SourceError("nobody says where")

    loop, applier, told, registry = looped(Blind())
    for now_s in range(3):
        loop.step(float(now_s))
    assert (applier.plans, told) == ([], [])
    assert [r.getMessage() for r in caplog.records] == [
        "the shards cannot be looked at, and the plan stays: nobody says where"
    ]
    assert registry.get_sample_value("edgecascade_rebalance_looks_total", {"outcome": "failed"}) == 3


def test_the_loop_ends_when_it_is_told_to():
    stop = threading.Event()
    site = Site(**{FIRST: window(), LAST: window()})
    loop, *_ = looped(site)
    thread = threading.Thread(target=loop.run, args=(stop, 0.01))
    thread.start()
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_every_series_that_is_looked_at_is_one_that_shards_show(tmp_path):
    """A renamed series would silently read as nothing."""
    from functions.edge.shard_app import Next, held_metrics, pass_metrics
    from tests.shard_rigs import linked

    path = tmp_path / "tier"
    build(GgufSource(write_gguf(tmp_path / "tiny.gguf")), path, "int4", None, quiet)
    with linked(path, [0, 1, SHAPE.n_layers]) as rig:
        list(rig.tier.generate(Chat(({"role": "user", "content": "the"},)), Limits(max_tokens=8)))
        served = rig.shards[1, 0]
        stage, labels = served.service._stage, {"node_id": "a"}
        families = [*held_metrics(served.service, stage.held_bytes, labels), *pass_metrics(stage, labels)]
        families += Next(None, rig.replicas).metrics(labels)
    shown = {s.name: s.value for family in families for s in family.samples}
    assert set(SHARD) <= set(shown)
    steps = shown["edgecascade_shard_steps_total"]
    assert steps == shown["edgecascade_link_steps_total"] > 0
    assert shown["edgecascade_link_seconds_total"] > shown["edgecascade_shard_step_seconds_total"] > 0
    assert shown["edgecascade_pass_seconds_total"] > 0


def test_without_a_cluster_the_command_says_so(monkeypatch, tmp_path, capsys):
    import sys

    import edgecascade

    path, nodes = tmp_path / "tier", tmp_path / "nodes.yaml"
    build(GgufSource(write_gguf(tmp_path / "tiny.gguf")), path, "int4", None, quiet)
    nodes.write_text("nodes: [{name: a, memory_mib: 100, decode_ms: 1, prefill_ms: 1}]")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["edgecascade", "rebalance", str(nodes), "--model", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        edgecascade.main()
    assert ended.value.code == 1
    assert "neither a service account nor a kubeconfig" in capsys.readouterr().err
