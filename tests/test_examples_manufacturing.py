"""Manufacturing: readings to scores to explanations; canned while models are slow, a model's again by themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
import pytest

from examples.manufacturing import monitor, signals, simulate, train
from functions.dispatcher.latency import LatencyWatch
from functions.dispatcher.rules import read_rules
from functions.serving.settings import ConfigError
from routing.latency import LatencyLimits
from tests.fakes import FakeTier, card, dispatcher_app, free_port, http_client, served, tier_app, wait_until

ROOT = Path(__file__).parents[1]
BOOK = read_rules(ROOT / "examples" / "manufacturing" / "explanations.toml")
LIMITS = LatencyLimits(canned_above_ms=1000, back_below_ms=500, probe_every=4, probe_after_s=1e9)
NAMED_BY = {
    "imbalance": {"turning speed"},
    "misalignment": {"twice turning speed"},
    "bearing": {"high frequency", "impacts"},
    "overheating": {"temperature"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "detector.onnx"
    train.train(path)
    return path


@pytest.fixture(scope="module")
def detector(model: Path) -> monitor.Detector:
    return monitor.Detector.open(model)


def payloads(fault: signals.Fault, count: int, seed: int = 3) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [json.dumps(signals.reading(rng, fault)).encode() for _ in range(count)]


# The detector.


def test_training_is_repeatable_and_the_graph_computes_what_numpy_does(tmp_path: Path) -> None:
    small, again = tmp_path / "small.onnx", tmp_path / "again.onnx"
    for path in (small, again):
        train.train(path, readings=100)
    assert again.read_bytes() == small.read_bytes()
    x = train.sample(np.random.default_rng(5), 20, "bearing")
    rng = np.random.default_rng(train.SEED)
    sound = train.sample(rng, 100)
    _, _, components = np.linalg.svd((sound - sound.mean(0)) / sound.std(0), full_matrices=False)
    expected = train.scores(x, sound.mean(0), sound.std(0), components[: train.KEPT_COMPONENTS].T)
    session = onnxruntime.InferenceSession(str(small), providers=["CPUExecutionProvider"])
    (score,) = session.run(["score"], {"features": x.astype(np.float32)})
    np.testing.assert_allclose(score, expected, rtol=1e-3)


def test_sound_machines_are_left_alone(detector: monitor.Detector) -> None:
    over = [detector.judge(monitor.read(payload).features).is_anomaly for payload in payloads("", 300)]
    assert sum(over) <= 5


@pytest.mark.parametrize("fault", signals.FAULTS)
def test_faults_are_found_and_named(detector: monitor.Detector, fault: signals.Fault) -> None:
    judged = [detector.judge(monitor.read(payload).features) for payload in payloads(fault, 100)]
    assert sum(one.is_anomaly for one in judged) >= 95
    named = [one.feature in NAMED_BY[fault] and one.off > 0 for one in judged]
    assert sum(named) >= 90


@pytest.mark.parametrize("fault", ["", *signals.FAULTS])
def test_whatever_is_asked_the_rules_can_explain(detector: monitor.Detector, fault: signals.Fault) -> None:
    for payload in payloads(fault, 20):
        plan = BOOK.plan(monitor.question("press-4", detector.judge(monitor.read(payload).features)))
        assert plan is not None
        assert plan.text.startswith("press-4: ")


def test_a_detector_that_is_missing_or_of_other_features_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="train it"):
        monitor.Detector.open(tmp_path / "none.onnx")
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes().replace(b"twice turning speed", b"thrice turned speed"))
    with pytest.raises(ConfigError, match="other features"):
        monitor.Detector.open(other)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vibration_mm_s": [0.0] * 5}, "vibration_mm_s"),
        ({"vibration_mm_s": [1e9] * signals.SAMPLES}, "vibration_mm_s"),
        ({"temperature_c": "hot"}, "temperature_c"),
        ({"speed_rpm": 0}, "speed_rpm"),
        ({"load": float("nan")}, "load"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_reading_is_refused_naming_the_field(detector: monitor.Detector, change: object, field: str) -> None:
    good = json.loads(payloads("", 1)[0])
    with pytest.raises(ValueError, match=field):
        monitor.read(json.dumps({**good, **change}).encode())  # type: ignore[dict-item]
    for payload in (b"", b"\xff", b"[1]", b"x" * 100_000):
        with pytest.raises(ValueError, match=r"payload|bytes"):
            monitor.read(payload)


def test_two_anomalies_in_a_row_are_one_alarm_until_the_machine_is_sound(detector: monitor.Detector) -> None:
    asked: list[str] = []
    watched = monitor.Monitor(detector, lambda question: (asked.append(question) or "because", "edge"))
    sound, broken = payloads("", 1)[0], payloads("imbalance", 1)[0]
    assert not detector.judge(monitor.read(sound).features).is_anomaly
    alarms = [watched.take("press-4", payload) for payload in (broken, sound, broken, broken, broken, sound, broken)]
    assert [alarm is not None for alarm in alarms] == [False, False, False, True, False, False, False]
    assert watched.take("press-3", broken) is None
    assert alarms[3] is not None
    assert (alarms[3].machine, alarms[3].feature, alarms[3].source) == ("press-4", "turning speed", "edge")
    assert len(asked) == 1


# The explanation.

QUESTION = "explain why on press-4 the share of impacts is 2.5 times usual"
CANNED = "press-4: there are impacts, 2.5 times usual."


@pytest.fixture
def bundle() -> Iterator[tuple[FakeTier, httpx.Client]]:
    edge = FakeTier(card("edge"), says="a bearing is worn")
    with ExitStack() as stack:
        urls = [stack.enter_context(served(tier_app(tier))) for tier in (FakeTier(card("device")), edge)]
        yield edge, stack.enter_context(http_client(stack.enter_context(served(dispatcher_app(*urls)))))


def test_explanations_are_canned_while_models_are_slow_and_come_back_by_themselves(
    bundle: tuple[FakeTier, httpx.Client],
) -> None:
    """The clock is the test's: the model takes as long as it says."""
    edge, client = bundle
    now, took_s = [0.0], [2.0]

    def before_token(index: int) -> None:
        now[0] += took_s[0] if index == 0 else 0.0

    edge.before_token = before_token
    explainer = monitor.Explainer(client, BOOK, LatencyWatch(LIMITS, lambda: now[0]))
    sources = [explainer.explain(QUESTION)[1] for _ in range(5)]
    assert sources == ["edge"] * 5
    assert [explainer.explain(QUESTION)[1] for _ in range(8)] == [*["canned"] * 3, "edge"] * 2
    assert explainer.explain(QUESTION)[0].startswith(CANNED)
    took_s[0] = 0.7  # under the ceiling, but not well below it
    assert "canned" in [explainer.explain(QUESTION)[1] for _ in range(40)][-4:]
    took_s[0] = 0.1
    for _ in range(4 * LIMITS.least_samples):
        explainer.explain(QUESTION)
    assert [explainer.explain(QUESTION) for _ in range(8)] == [("a bearing is worn", "edge")] * 8


def test_without_an_edge_or_a_bundle_explanations_are_canned() -> None:
    with served(tier_app(FakeTier(card("device")))) as device, ExitStack() as stack:
        gateway = stack.enter_context(served(dispatcher_app(device, f"http://127.0.0.1:{free_port()}")))
        for url in (gateway, f"http://127.0.0.1:{free_port()}"):
            explainer = monitor.Explainer(stack.enter_context(http_client(url)), BOOK, LatencyWatch(LIMITS))
            text, source = explainer.explain(QUESTION)
            assert (text.startswith(CANNED), source) == (True, "canned")


# Over MQTT.


@contextmanager
def broker(folder: Path) -> Iterator[str]:
    """A mosquitto of our own; gives its host:port."""
    if shutil.which("mosquitto") is None:
        pytest.skip("mosquitto is not installed (apt install mosquitto); nothing was sent over MQTT")
    port = free_port()
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
    process = subprocess.Popen(["mosquitto", "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def test_readings_go_in_and_an_alarm_comes_out_over_mqtt(
    bundle: tuple[FakeTier, httpx.Client],
    detector: monitor.Detector,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mqtt = pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed: pip install -e '.[mqtt]'")
    with broker(tmp_path) as address:
        host, _, port = address.partition(":")
        alarms: list[dict[str, object]] = []
        listener = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        subscribed = threading.Event()
        listener.on_subscribe = lambda *_: subscribed.set()
        listener.on_connect = lambda client, *_: client.subscribe("plant/+/#", qos=1)
        listener.on_message = lambda _c, _u, m: m.topic.endswith("/alarm") and alarms.append(json.loads(m.payload))
        wait_until(lambda: _connects(listener, host, int(port)))
        listener.loop_start()
        assert subscribed.wait(20)
        explainer = monitor.Explainer(bundle[1], BOOK, LatencyWatch(LIMITS))
        watched = monitor.Monitor(detector, explainer.explain)
        ready = threading.Event()
        serving = threading.Thread(target=monitor.watch, args=(watched, host, int(port), 1, ready.set), daemon=True)
        serving.start()
        assert ready.wait(20)
        listener.publish("plant/press-4/reading", b"rubbish", qos=1).wait_for_publish(20)
        sent = ["--broker", address, "--fault", "bearing", "--readings", "6", "--every-s", "0"]
        assert simulate.main(sent) == 0
        serving.join(20)
        wait_until(lambda: bool(alarms))
        listener.loop_stop()
        listener.disconnect()
    assert [(alarm["machine"], alarm["explanation"], alarm["source"]) for alarm in alarms] == [
        ("press-4", "a bearing is worn", "edge")
    ]
    assert "press-4: the payload: invalid JSON" in capsys.readouterr().err


def _connects(client: object, host: str, port: int) -> bool:
    try:
        client.connect(host, port)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True


def test_without_a_broker_both_programs_say_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed: pip install -e '.[mqtt]'")
    nowhere = ["--broker", f"127.0.0.1:{free_port()}"]
    assert monitor.main([*nowhere, "--detector", str(model)]) == 1
    assert simulate.main(nowhere) == 1
    assert capsys.readouterr().err.count("no broker at") == 2
    assert monitor.main([*nowhere, "--detector", "none.onnx"]) == 1
    assert monitor.main([*nowhere, "--back-below-ms", "5000"]) == 1


@pytest.mark.slow
def test_the_trainer_runs_as_the_readme_says(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.manufacturing.train", "--out", str(tmp_path / "d.onnx")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "bearing: 500 of 500 readings over the threshold" in said
