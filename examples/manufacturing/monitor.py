"""Watch machines over MQTT: readings in, an anomaly score each, and for an anomaly an explanation out.

The explanation is a model's, asked of the bundle; a canned one of explanations.toml while answers take longer than the
ceiling, and where there is no answer. It goes back to the model by itself: now and then a request goes through as a
probe, and once those are well below the ceiling all do.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import httpx
import numpy as np
import onnxruntime
from pydantic import Field, ValidationError

from examples.manufacturing.signals import FEATURES, SAMPLES, Floats, features
from functions.dispatcher.latency import LatencyWatch
from functions.dispatcher.rules import RuleBook, read_rules
from functions.serving.settings import ConfigError
from functions.serving.strict import Strict
from routing.latency import LatencyLimits

HERE = Path(__file__).parent
DETECTOR = Path("var/manufacturing/detector.onnx")
READINGS, ALARMS = "plant/+/reading", "plant/{machine}/alarm"
_MAX_PAYLOAD_BYTES = 65_536
_IN_A_ROW = 2
_DEADLINE_MS = 5000
_MAX_TOKENS = 64
_QUEUED = 100

Finite = Annotated[float, Field(allow_inf_nan=False)]
Speed = Annotated[Finite, Field(ge=-1000, le=1000)]


class Reading(Strict):
    """What a sensor sends."""

    vibration_mm_s: Annotated[list[Speed], Field(min_length=SAMPLES, max_length=SAMPLES)]
    temperature_c: Annotated[Finite, Field(ge=-60, le=400)]
    speed_rpm: Annotated[Finite, Field(ge=60, le=30_000)]
    load: Annotated[Finite, Field(ge=0, le=2)]

    @property
    def features(self) -> Floats:
        """As the detector takes it: (6,)."""
        return features(np.array(self.vibration_mm_s), self.temperature_c, self.speed_rpm, self.load)


@dataclass(frozen=True)
class Judged:
    """A reading's score, and the feature that fits least with how far it is off, in its own unit."""

    score: float
    is_anomaly: bool
    feature: str
    off: float


class Detector:
    """The trained model, run by onnxruntime."""

    def __init__(self, session: Any, threshold: float) -> None:
        self._session = session
        self._threshold = threshold

    @classmethod
    def open(cls, path: Path) -> Self:
        """Load what train.py wrote; raises `ConfigError`."""
        if not path.is_file():
            raise ConfigError(f"{path} is not there; train it: python -m examples.manufacturing.train")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        told = session.get_modelmeta().custom_metadata_map
        if told.get("features") != ",".join(FEATURES):
            raise ConfigError(f"{path} was trained on other features; train it again")
        return cls(session, float(told["threshold"]))

    def judge(self, x: Floats) -> Judged:
        """Score the features (6,) of one reading."""
        wanted = ["score", "missed", "residual"]
        score, missed, residual = self._session.run(wanted, {"features": np.asarray(x[None], np.float32)})
        worst = int(np.abs(missed[0]).argmax())
        return Judged(float(score[0]), float(score[0]) > self._threshold, FEATURES[worst], float(residual[0][worst]))


@dataclass(frozen=True)
class Alarm:
    """What is said of a machine; `source` is the tier that explained, or `canned`."""

    machine: str
    score: float
    feature: str
    explanation: str
    source: str


class Explainer:
    """Asks the bundle why; says what the rules have while that takes too long, or where no model answers."""

    def __init__(self, client: httpx.Client, book: RuleBook, watch: LatencyWatch) -> None:
        self._client, self._book, self._watch = client, book, watch

    def explain(self, question: str) -> tuple[str, str]:
        """The explanation, and whose it is."""
        if self._watch.admits():
            began_s = self._watch.now()
            try:
                found = self._asked(question)
            except (httpx.HTTPError, ValueError, LookupError, TypeError):
                found = None
            self._watch.observe(began_s)
            if found is not None:
                return found
        plan = self._book.plan(question)
        return (plan.text if plan else "The readings are unusual."), "canned"

    def _asked(self, question: str) -> tuple[str, str] | None:
        """A model's answer; None where the bundle itself had none."""
        messages = [{"role": "user", "content": f"You advise a technician. In one sentence, {question}."}]
        body = {"model": "auto", "messages": messages, "max_tokens": _MAX_TOKENS, "deadline_ms": _DEADLINE_MS}
        response = self._client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        said = response.json()
        source, text = said["edgecascade"]["source"], said["choices"][0]["message"]["content"]
        return (text, source) if source in {"device", "edge"} and text else None


@dataclass
class Monitor:
    """Judges readings; two anomalies in a row of one machine are an alarm, once until it is sound again."""

    detector: Detector
    explain: Callable[[str], tuple[str, str]]
    _in_a_row: dict[str, int] = field(default_factory=dict)

    def take(self, machine: str, payload: bytes) -> Alarm | None:
        """Judge one reading as it came; raises `ValueError` in one sentence if it is none."""
        judged = self.detector.judge(read(payload).features)
        count = self._in_a_row.get(machine, 0) + 1 if judged.is_anomaly else 0
        self._in_a_row[machine] = count
        if count != _IN_A_ROW:
            return None
        explanation, source = self.explain(question(machine, judged))
        return Alarm(machine, round(judged.score, 2), judged.feature, explanation, source)


def read(payload: bytes) -> Reading:
    """Parse a reading; raises `ValueError` naming the field."""
    if len(payload) > _MAX_PAYLOAD_BYTES:
        raise ValueError(f"a reading of {len(payload)} bytes; send at most {_MAX_PAYLOAD_BYTES}")
    try:
        return Reading.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = str(first["loc"][0]) if first["loc"] else "the payload"
        raise ValueError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def question(machine: str, judged: Judged) -> str:
    """What is asked of a model, and what the rules match."""
    begin, times = f"explain why on {machine} the", f"{np.exp(judged.off):.1f} times usual"
    if judged.off <= 0 or judged.feature == "load":
        return f"{begin} readings are unusual"
    if judged.feature == "temperature":
        return f"{begin} temperature is {judged.off:.0f} degrees above usual for its load"
    if judged.feature == "impacts":
        return f"{begin} share of impacts is {times}"
    return f"{begin} vibration at {judged.feature} is {times}"


def watch(monitor: Monitor, host: str, port: int, alarms: int = 0, ready: Callable[[], None] = lambda: None) -> None:
    """Serve a broker's readings until `alarms` were raised (0: for ever); raises `ConfigError` if there is no broker.

    `ready` is called once they are subscribed to. Readings that come faster than they can be judged are dropped, oldest
    first: late news are none.
    """
    try:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion
    except ModuleNotFoundError:
        raise ConfigError("the monitor needs paho-mqtt: pip install -e '.[mqtt]'") from None
    waiting: queue.Queue[tuple[str, bytes]] = queue.Queue(_QUEUED)

    def on_connect(client: Any, *_rest: Any) -> None:
        client.subscribe(READINGS, qos=1)

    def on_message(_client: Any, _userdata: Any, message: Any) -> None:
        if waiting.full():
            waiting.get_nowait()
        waiting.put_nowait((message.topic.split("/")[1], message.payload))

    client = Client(CallbackAPIVersion.VERSION2)
    client.on_connect, client.on_message = on_connect, on_message
    client.on_subscribe = lambda *_rest: ready()
    try:
        client.connect(host, port)
    except OSError as error:
        raise ConfigError(f"no broker at {host}:{port}: {error.strerror or error}") from error
    client.loop_start()
    raised = 0
    try:
        while not alarms or raised < alarms:
            machine, payload = waiting.get()
            try:
                alarm = monitor.take(machine, payload)
            except ValueError as error:
                print(f"monitor: {machine}: {error}", file=sys.stderr)
                continue
            if alarm:
                raised += 1
                said = json.dumps(asdict(alarm), ensure_ascii=False)
                client.publish(ALARMS.format(machine=machine), said, qos=1).wait_for_publish(timeout=5)
                print(said, flush=True)
    finally:
        client.loop_stop()
        client.disconnect()


def main(arguments: list[str] | None = None) -> int:
    """Watch until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Watch machines over MQTT.")
    parser.add_argument("--broker", default="127.0.0.1:1883", help="host:port")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the bundle's gateway")
    parser.add_argument("--detector", type=Path, default=DETECTOR)
    parser.add_argument("--explanations", type=Path, default=HERE / "explanations.toml")
    parser.add_argument("--canned-above-ms", type=float, default=1500.0, help="the ceiling")
    parser.add_argument("--back-below-ms", type=float, default=1000.0, help="models are asked again below this")
    parser.add_argument("--alarms", type=int, default=0, help="end after so many; 0: never")
    given = parser.parse_args(arguments)
    try:
        limits = LatencyLimits(given.canned_above_ms, given.back_below_ms)
        host, _, port = given.broker.rpartition(":")
        with httpx.Client(base_url=given.url, timeout=_DEADLINE_MS / 1e3 + 1, trust_env=False) as client:
            explainer = Explainer(client, read_rules(given.explanations), LatencyWatch(limits, time.monotonic))
            watch(Monitor(Detector.open(given.detector), explainer.explain), host, int(port), given.alarms)
    except (ConfigError, ValueError) as error:
        print(f"monitor: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
