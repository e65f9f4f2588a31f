"""The command line: every door opens, its faults are one sentence, its JSON is JSON."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer.main
from click.testing import CliRunner

import edgecascade
from tests.fake_bundle import QUERIES, start_here

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "up",
    "ask",
    "eval",
    "build",
    "adapt",
    "distil",
    "calibrate",
    "demo",
    "bench cascade",
    "bench chaos",
    "bench faults",
    "bench grammar",
    "bench leaks",
    "bench links",
    "bench load",
    "bench overhead",
    "bench placed",
    "bench placement",
    "bench rebalance",
    "bench rpc",
    "bench seal",
    "bench survival",
    "greengrass deploy",
    "greengrass lint",
    "greengrass publish",
    "greengrass render",
    "greengrass status",
    "keys",
    "kubernetes render",
    "plan",
    "profile-node",
    "rebalance",
    "rules check",
    "rules try",
    "scaler",
    "seal",
    "verify",
]


def completion(body):
    words = body["messages"][-1]["content"].split()
    source = "device" if body["model"] == "device" or (body["model"] == "auto" and len(words) == 1) else "edge"
    frame = None if body["skill"] == "chat" else {"intent": words[-1], "slots": {}}
    extra = {
        "source": source, "route": source, "reason": "confident", "degraded": False, "confidence": 0.9,
        "threshold": 0.5, "frame": frame, "network_bytes": {"sent": 1, "received": 2}, "joules": None,
    }  # fmt: skip
    return json.dumps(frame) if frame else "Hello there", extra


class Bundle(BaseHTTPRequestHandler):
    """A bundle as far as the command line sees it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(b"{}", "application/json")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, extra = completion(body)
        if not body.get("stream"):
            whole = {"choices": [{"message": {"content": text}}], "edgecascade": extra}
            return self.answer(json.dumps(whole).encode(), "application/json")
        pieces = [{"choices": [{"delta": {"content": word + " "}}]} for word in text.split()]
        events = [*pieces, {"choices": [{"delta": {}}], "edgecascade": extra}]
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return self.answer(lines.encode(), "text/event-stream")

    def answer(self, data, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Bundle) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the door in this process; returns (status, stdout, stderr)."""

    def call(*words, stdin=""):
        monkeypatch.setattr(sys, "argv", ["edgecascade", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            edgecascade.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(typer.main.get_command(edgecascade.app), [*command.split(), "--help"])
    assert result.exit_code == 0
    assert command == "demo" or "Example" in result.output


def test_help_needs_no_heavy_room():
    """A newcomer's first `--help` must not load numpy or onnxruntime."""
    code = (
        "import sys, edgecascade; print(sorted({'numpy', 'onnxruntime', 'rich.progress', 'httpx'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "[]"


def test_a_frame_on_stdout_and_how_it_came_on_stderr(run, url):
    status, out, err = run("ask", "wake", "--url", url)
    assert (status, json.loads(out)) == (0, {"intent": "wake", "slots": {}})
    assert err.startswith("device (confident), confidence 0.90, ")


def test_a_frame_as_json(run, url):
    status, out, _ = run("ask", "please wake", "--url", url, "--json")
    assert status == 0
    assert (json.loads(out)["source"], json.loads(out)["network_bytes"]) == ("edge", 3)


def test_a_chat_goes_on_until_nothing_is_said(run, url):
    status, out, err = run("ask", "--chat", "--url", url, stdin="Hi\nAnd you?\n\nnever sent\n")
    assert (status, out) == (0, "Hello there \nHello there \n")
    assert err.count("(confident), confidence 0.90") == 2


def test_saying_nothing_is_refused(run, url):
    status, _, err = run("ask", "--url", url)
    assert status == 1
    assert err.startswith("edgecascade: say something")


@pytest.fixture
def queries(tmp_path):
    file = tmp_path / "q.jsonl"
    lines = [{"text": f"say {word}", "intent": word} for word in "abcd"] + [{"text": "e", "intent": "wrong"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def test_an_evaluation_as_json(run, url, queries):
    status, out, _ = run("eval", "--data", queries, "--skill", "banking", "--url", url, "--json")
    figures = json.loads(out)
    assert status == 0
    assert set(figures["rows"]) == {"device", "edge", "cascade", "oracle"}
    assert figures["rows"]["cascade"]["accuracy"] == pytest.approx(0.8)
    assert figures["rows"]["cascade"]["share_local"] == pytest.approx(0.2)
    assert figures["realised_local_error"] == pytest.approx(1.0)
    assert (figures["n"], figures["threshold"]) == (5, 0.5)


def test_an_evaluation_for_a_person_with_a_plot(run, url, queries, tmp_path):
    plot = tmp_path / "p.png"
    status, out, _ = run("eval", "--data", queries, "--url", url, "--limit", "4", "--plot", str(plot))
    assert status == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "4 queries" in out
    assert all(name in out for name in ("device only", "edge only", "cascade", "oracle"))


def test_one_tier_alone(run, url, queries):
    _, out, _ = run("eval", "--data", queries, "--tier", "edge", "--url", url, "--json")
    assert set(json.loads(out)["rows"]) == {"edge"}


def test_load_as_json_and_with_a_plot(run, url, tmp_path):
    plot = tmp_path / "l.png"
    status, out, _ = run("bench", "load", url, "--requests", "6", "--callers", "2", "--plot", str(plot), "--json")
    figures = json.loads(out)
    assert (status, figures["answered"], figures["errors"]) == (0, 6, {})
    assert figures["first_token_ms"]["p50"] is not None
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_open_loop_load_for_a_person(run, url):
    status, out, _ = run("bench", "load", url, "--rate", "40,80", "--seconds", "0.1")
    assert status == 0
    assert "first token" in out


@pytest.fixture
def bundle(monkeypatch):
    """The benches' bundles are fake tiers behind the real dispatcher, here in this process."""
    monkeypatch.setattr(edgecascade, "_variants", start_here)


@pytest.fixture
def labelled(tmp_path):
    file = tmp_path / "labelled.jsonl"
    lines = [{"skill": q.skill, "text": q.text, "intent": q.intent} for q in QUERIES]
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def test_the_cascades_ways_as_json_and_as_a_plot(run, bundle, labelled, tmp_path):
    plot = tmp_path / "f.png"
    words = ["--data", labelled, "--as-is", "--deadlines", "900,4000", "--plot", str(plot)]
    status, out, err = run("bench", "cascade", *words, "--json")
    assert status == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert {"device", "edge", "sequential", "random", "oracle"} <= set(figures["rows"])
    assert {p["deadline_ms"] for p in figures["frontier"]} >= {900, 4000}
    assert figures["slowdown"] == {"device": 1.0, "edge": 1.0}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_cascades_ways_for_a_person_on_slowed_tiers(run, bundle, labelled):
    status, out, _ = run("bench", "cascade", "--data", labelled, "--device-ms", "5", "--edge-ms", "30")
    assert status == 0
    assert "sequential escalation" in out
    assert "random router" in out


@pytest.mark.parametrize("as_json", [True, False])
def test_chaos_and_overhead(run, bundle, labelled, as_json):
    asked = ["--json"] if as_json else []
    few = ["--requests", "4", "--kind", "stopped", "--deadline", "4000", "--slowdown", "1", "--seconds", "0.2"]
    status, broken, err = run("bench", "chaos", "--data", labelled, *few, *asked)
    assert status == 0, err
    status, added, err = run("bench", "overhead", "--data", labelled, "--pairs", "10", "--seconds", "1", *asked)
    assert status == 0, err
    if as_json:
        assert json.loads(broken)["faults"]["verdict"]["failings"].keys() <= {"none", "device stopped", "edge stopped"}
        assert set(json.loads(broken)["saturation"]["verdict"]) == {"goodput", "rejections"}
        assert json.loads(added)["pairs"]["n"] == 10
    else:
        assert "edge stopped" in broken
        assert "added by the dispatcher" in added


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ask", "hi", "--url", "http://127.0.0.1:9"], "did not answer"),
        (["eval", "--data", "none.jsonl"], "none.jsonl cannot be read"),
        (["eval", "--data", "none.jsonl", "--tier", "cloud"], "tier 'cloud' is unknown"),
        (["up", "--only", "cloud"], "stack.yml has no function 'cloud'"),
        (["build", "nothing.gguf", "out"], "is no model"),
        (["calibrate", "nothing", "--data", ".", "--grade", "guess"], "grade 'guess' is unknown"),
        (["bench", "chaos", "--kind", "gremlins"], "fault 'gremlins' is unknown"),
        (["bench", "cascade", "--skill", "juggling"], "holds no query"),
        (["bench", "faults", "127.0.0.1:9", "--faults", "{}"], "must look like http://"),
        (["bench", "faults", "http://127.0.0.1:9", "--faults", "{lag"], "are no JSON object"),
        (["bench", "faults", "http://127.0.0.1:9", "--faults", '{"lag": 1}'], "no fault 'lag'"),
        (["bench", "load", "http://127.0.0.1:9", "--rate", "fast"], "the rate 'fast' is not a number"),
        (["bench", "load", "http://127.0.0.1:9", "--requests", "2"], "none of 2 requests was answered"),
    ],
)
def test_a_fault_is_one_sentence_and_a_status(run, words, says):
    status, _, err = run(*words)
    assert status == 1
    assert says in err
    assert "Traceback" not in err


def test_training_without_torch_says_what_to_install(run, monkeypatch, tmp_path):
    real = __import__("models.build.recipes", fromlist=["recipes"])

    def without_torch(*_args):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(real, "adapt_edge", without_torch)
    status, _, err = run("adapt", "smollm2", str(tmp_path), "--data", ".")
    assert status == 1
    assert "pip install -e '.[train]'" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_stops_cleanly_on_a_signal(tmp_path, number):
    """The real `up`, with a stack of stand-ins in place of the models."""
    command = f"gunicorn --bind x --worker-class gthread --no-control-socket --chdir {ROOT / 'tests'} standin_app:app"
    (tmp_path / "stack.yml").write_text(f"functions: {{dispatcher: {{image: i, handler: h, fprocess: '{command}'}}}}")
    code = f"import pathlib, edgecascade; edgecascade.ROOT = pathlib.Path({str(tmp_path)!r}); edgecascade.main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", code, "up", "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment
    )
    with child:
        seen = []
        for line in child.stdout:
            seen.append(line)
            if "ready at http://127.0.0.1:" in line:
                child.send_signal(number)
        assert child.wait(30) == 0
    said = "".join(seen)
    assert "dispatcher | " in said
    assert "up         | stopping" in said
