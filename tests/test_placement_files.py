"""Nodes files, the commands that read and write them, and the page that explains them."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

import edgecascade
from bench.placement import fleet, measure
from bench.profile import Plan as Effort
from bench.profile import profile
from models.artifact.sizes import Sizes, sizes
from models.artifact.store import Artifact
from models.build.assemble import build
from models.build.folder_source import write_folder_source
from models.build.gguf_source import GgufSource
from models.errors import ArtifactError
from scaler.placement import report
from scaler.placement.errors import NodesFileError
from scaler.placement.plan import place
from scaler.placement.predict import fault
from scaler.placement.read import goal, parse, problem
from scaler.placement.values import Goal, Layer, Link, Model
from tests.tiny_models import SHAPE, quiet, random_head, random_tensors, write_gguf

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "placement" / "nodes.yaml"
PAGE = (ROOT / "docs" / "placement.md").read_text("utf-8")
MODEL = Model([Layer(100)] * 6, 50, 70, 30, 1, 64)
EDGE = Sizes((8045816,) + (6220376,) * 3 + (7191800,) * 6 + (7191832,) * 20, 32590472, 32590472, 32590472, 1536, 2304)
"""SmolLM2 as `edgecascade demo` builds it; the exits go with the first layer."""


def read(text, **rest):
    return parse({"n.yaml": text}, MODEL, **rest)


NODE = "{name: a, memory_mib: 1, decode_ms: 1, prefill_ms: 0.1}"
LINKS = f"nodes: [{NODE}]\nlinks: "


def test_what_a_file_says_is_what_is_planned_for():
    found = read(
        """
        nodes:
        - {name: a, memory_mib: 2, decode_ms: 1, prefill_ms: 0.1, head_ms: 0.5, watts: 3, measured: {model: m}}
        - {name: b, count: 2, memory_mib: 1.5, decode_ms: 2, prefill_ms: 0.2}
        links:
          default: {latency_ms: 1, mbit_per_s: 100}
          between: [{nodes: [a, b-1], latency_ms: 0, mbit_per_s: 10}, {nodes: [b-1, b-2], cut: true}]
        workload: {prompt_tokens: 10, sessions: 3}
        pins: [{node: a, layers: 0-2}]
        exclude: [b-2, {node: b-1, layers: 5}]
        replicas: 2
        """,
        model_id="m",
    )
    assert [(n.name, n.memory_bytes, n.head_ms, n.watts) for n in found.nodes] == [
        ("a", 2 << 20, 0.5, 3.0), ("b-1", 3 << 19, 0.0, None), ("b-2", 3 << 19, 0.0, None),
    ]  # fmt: skip
    assert found.links["a", "b-1"] == found.links["b-1", "a"] == Link(0, 10)
    assert found.links["a", "b-2"] == Link(1, 100)
    assert ("b-1", "b-2") not in found.links
    assert (found.workload.prompt_tokens, found.workload.sessions, found.workload.context) == (10, 3, 2048)
    assert [(rule.node, rule.layers) for rule in found.pins] == [("a", range(3))]
    assert [(rule.node, rule.layers) for rule in found.exclusions] == [("b-2", range(6)), ("b-1", range(5, 6))]
    assert found.replicas == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nodes: [", "n.yaml is not YAML"),
        ("- a", "n.yaml is not a mapping"),
        ("nodes: []", "must list 1 to 1000 'nodes'; there are 0"),
        ("nodes: {}", "'nodes' in n.yaml must be a list"),
        ("nodes: [a]", "'nodes' in n.yaml is not a mapping"),
        ("nodes: [{memory_mib: 1}]", "'nodes' in n.yaml lacks the key 'name'"),
        ("nodes: [{name: a, memory_mib: 0, decode_ms: 1, prefill_ms: 1}]", "'nodes.memory_mib' .* a number above 0"),
        ("nodes: [{name: a, memory_mib: .inf, decode_ms: 1, prefill_ms: 1}]", "'nodes.memory_mib' .* a number above 0"),
        ("nodes: [{name: a, memory_mib: true, decode_ms: 1, prefill_ms: 1}]", "'nodes.memory_mib' .* a number above 0"),
        ("nodes: [{name: a, memory_mb: 1, memory_mib: 1, decode_ms: 1, prefill_ms: 1}]", "unknown key 'memory_mb'"),
        (f"nodes: [{NODE}]\nlink: 1", "n.yaml has the unknown key 'link'"),
        (f"nodes: [{NODE}, {NODE.replace('a,', 'b,')}]", "must give 'links', at least a 'default'"),
        (LINKS + "{default: {latency_ms: -1, mbit_per_s: 1}}", "'links.default.latency_ms' .* from 0"),
        (LINKS + "{between: [{nodes: [a]}]}", "'links.between.nodes' .* must name two nodes"),
        (f"nodes: [{NODE}]\npins: [{{node: a, layers: x}}]", "'pins.layers' .* a range such as 0-7"),
        (f"nodes: [{NODE}]\npins: [{{node: a, layers: 5-3}}]", "'pins.layers' .* a range such as 0-7"),
        (f"nodes: [{NODE}]\nworkload: {{sessions: 0}}", "'workload.sessions' .* a whole number from 1 on"),
        (f"nodes: [{NODE}]\nreplicas: two", "'replicas' in n.yaml must be a whole number"),
        (f"nodes: [{NODE.replace('}', ', measured: {model: other}}')}]", "measured with other, and the plan is for m"),
    ],
)  # fmt: skip
def test_a_file_that_says_something_else_is_refused_by_name(text, says):
    with pytest.raises(NodesFileError, match=says):
        read(text, model_id="m")


def test_a_file_that_is_not_there_and_a_goal_that_is_none():
    with pytest.raises(NodesFileError, match="cannot be read; name a nodes file"):
        problem([Path("none.yaml")], EDGE)
    with pytest.raises(NodesFileError, match="goal 'speed' is unknown; use latency or throughput"):
        goal("speed")


def test_the_page_shows_the_example_and_its_plan():
    blocks = dict(re.findall(r"```(yaml|text)\n(.*?)\n```", PAGE, re.DOTALL))
    assert blocks["yaml"] == EXAMPLE.read_text("utf-8").rstrip()
    given = problem([EXAMPLE], EDGE)
    assert blocks["text"] == report.text(given, place(given, Goal.LATENCY))


@pytest.fixture(scope="module")
def tier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    return build(GgufSource(write_gguf(folder / "tiny.gguf")), folder / "edge", "int4", None, quiet)


def test_sizes_are_those_of_the_files(tier):
    found, files = sizes(tier.manifest), tier.manifest.files
    assert found.layers == tuple(files[f"layer-00{n}.safetensors"].size_bytes for n in range(3))
    assert found.first == found.last == found.shared == files["head.safetensors"].size_bytes
    assert (found.kv_bytes, found.hidden_bytes) == (2 * 2 * 16 * 4, 64 * 4)
    for layers in (range(1), range(1, 2), range(2, 3)):
        opened = Artifact.open(tier.path, layers)
        read_bytes = sum(files[name].size_bytes for name in opened.files if name.endswith(".safetensors"))
        ends = found.first * (layers.start == 0) + found.last * (layers.stop == 3)
        assert read_bytes == sum(found.layers[n] for n in layers) + ends


def test_a_tier_that_writes_no_text_cannot_be_cut(tmp_path):
    tokenizer = GgufSource(write_gguf(tmp_path / "tiny.gguf")).tokenizer()
    values = {"shape": SHAPE, "tensors": random_tensors(4), "tokenizer": tokenizer, "head": random_head()}
    source = write_folder_source(tmp_path / "s", model_id="tiny", **values)
    device = build(source, tmp_path / "device", "int8", None, quiet)
    with pytest.raises(ArtifactError, match="cannot be cut"):
        sizes(device.manifest)
    with pytest.raises(ArtifactError, match="cannot be cut"):
        profile(device.path, Effort(), lambda *_: None)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the door in this process; returns (status, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["edgecascade", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            edgecascade.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return call


def test_a_profile_is_a_nodes_file_that_plan_reads(run, tier, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.profile.READ_BYTES", 1 << 20)
    status, out, _ = run("profile-node", "--model", tier.path, "--name", "here", "--threads", "1", "--watts", "4")
    (node,) = yaml.safe_load(out)["nodes"]
    assert status == 0
    assert node["measured"]["model"] == "tiny int4"
    assert node["decode_ms"] > 0 < node["prefill_ms"]
    assert node["watts"] == 4
    file, drawing = tmp_path / "here.yaml", tmp_path / "plan.png"
    file.write_text(out, "utf-8")
    status, said, _ = run("plan", file, "--model", tier.path, "--json", "--plot", drawing)
    assert status == 0
    assert [(stage["nodes"], stage["layers"]) for stage in json.loads(said)["stages"]] == [(["here"], "0-2")]
    assert drawing.read_bytes().startswith(b"\x89PNG")
    status, _, err = run("plan", file, "--model", tier.path, "--plot", tmp_path / "none" / "plan.png")
    assert (status, err.count("\n")) == (1, 1)
    assert "plan.png cannot be written" in err


def test_plan_draws_and_says_what_is_missing(run, tier, tmp_path):
    file = tmp_path / "nodes.yaml"
    kib = 2**-10
    node = "- {{name: {}, memory_mib: {}, decode_ms: 1, prefill_ms: 0.1, head_ms: 1}}\n"
    workload = "workload: {context: 8, sessions: 1}\nlinks: {default: {latency_ms: 0.1, mbit_per_s: 100}}\n"
    file.write_text("nodes:\n" + node.format("a", 90 * kib) + node.format("b", 90 * kib) + workload, "utf-8")
    status, out, _ = run("plan", file, "--model", tier.path, "--goal", "throughput")
    assert status == 0
    assert re.search(r"^a  █+·+  layers", out, re.MULTILINE)
    assert "proven best" in out
    file.write_text("nodes:\n" + node.format("a", 20 * kib) + workload, "utf-8")
    status, out, err = run("plan", file, "--model", tier.path)
    assert (status, out) == (1, "")
    assert err.startswith("edgecascade: the model needs")
    assert len(err.splitlines()) == 1


def test_the_bench_s_fleets_can_be_planned_for():
    rows = measure(16, 12, [1], now=iter(range(100)).__next__)
    assert [row["seconds_max"] for row in rows] == [1] * 6
    assert all(0 <= row["gap_median"] <= row["gap_max"] for row in rows)
    drawn = fleet("links alike", 16, 12, 1)
    assert not fault(drawn, place(drawn, Goal.LATENCY).stages)
