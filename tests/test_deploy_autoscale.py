"""Local autoscaling: the HPA's arithmetic, replicas as processes, the loop that asks the scaler as KEDA does."""

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.errors import StackError
from deploy.local.autoscale import Autoscale, Autoscaler, Look, Out, Scaled, Timing, autoscaled
from deploy.local.balance import Balance
from deploy.local.bundle import Bundle, Settings, site
from deploy.local.hpa import Behaviour, Hpa
from deploy.local.plan import function_command
from deploy.local.process import Process, listen
from deploy.local.replicas import ReplicaSet, write_list
from deploy.stack import Stack, parse
from scaler import externalscaler_pb2 as wire
from scaler.tolerance import asked
from tests.fakes import free_port
from tests.scaler_rigs import http_server

TESTS = Path(__file__).parent
CALLERS = 4
ROOT = TESTS.parent
STACK = parse(
    "functions: {tier: {image: i, handler: h, fprocess: 'gunicorn --bind x --worker-class gthread --threads 8"
    f" --no-control-socket --graceful-timeout 20 --chdir {TESTS} standin_app:app', environment: {{NAME: standin}}}}}}",
    {},
)


# ---- the HPA ----


def at_once(**changes):
    return Hpa(1, 50, Behaviour(down_window_s=0, up_pods=1000, **changes))


@given(st.integers(1, 40), st.floats(0, 60, allow_nan=False))
def test_the_formula(current, value):
    desired = at_once().desired(0.0, current, value)
    if 0.9 <= value / current <= 1.1:
        assert desired == current
    else:
        assert desired == min(50, max(1, math.ceil(value)))


@given(st.integers(1, 40), st.integers(0, 50))
def test_what_the_scaler_asks_for_is_what_it_gets_or_a_little_more(current, wanted):
    desired = at_once().desired(0.0, current, asked(wanted, current, 0.1))
    assert desired >= min(50, wanted)
    assert desired <= max(wanted, current + current // 10 + 1)


def test_fewer_only_when_fewer_were_wanted_all_along():
    hpa = Hpa(1, 50, Behaviour(down_window_s=30))
    assert hpa.desired(0.0, 4, 8) == 8
    assert hpa.desired(10.0, 8, 2) == 8
    assert hpa.desired(25.0, 8, 5) == 8
    assert hpa.desired(31.0, 8, 2) == 5, "five were wanted within the last 30 s"
    assert hpa.desired(56.0, 5, 2) == 2


def test_more_at_most_four_or_twice_in_fifteen_seconds():
    hpa = Hpa(1, 50)
    assert hpa.desired(0.0, 1, 40) == 5
    assert hpa.desired(5.0, 5, 40) == 5
    assert hpa.desired(16.0, 5, 40) == 10
    assert hpa.desired(32.0, 10, 40) == 20


def test_bounds_hold_whatever_is_asked():
    assert Hpa(2, 5).desired(0.0, 3, 0) == 3, "not before the window has passed"
    assert at_once().desired(0.0, 3, 0) == 1
    assert at_once().desired(0.0, 3, 1e9) == 50


# ---- the gateway's choice ----


def listed(path, **functions):
    sets = []
    for name, replicas in functions.items():

        @dataclass
        class Listed:
            name: str
            rows: list

            def listed(self):
                return [{"address": address, "state": state} for address, state in self.rows]

        sets.append(Listed(name, replicas))
    write_list(path, sets)


def test_the_least_busy_ready_replica_is_chosen(tmp_path):
    path = tmp_path / "replicas.json"
    listed(path, tier=[("a", "ready"), ("b", "ready"), ("c", "starting"), ("d", "draining")])
    balance = Balance({"fixed": "http://f"}, path)
    places = [balance.place("tier", 0) for _ in range(4)]
    assert sorted(p.address for p in places) == ["a", "a", "b", "b"]
    assert balance.inflight() == {"a": 2, "b": 2}
    next(p for p in places if p.address == "b").free()
    assert balance.place("tier", 0).address == "b"
    assert balance.place("fixed", 0).address == "http://f"
    assert balance.names() == ["fixed", "tier"]
    for place in places:
        place.free()
        place.free()
    assert balance.inflight() == {"b": 1, "http://f": 1}, "freed twice counts once"


def test_a_request_waits_for_a_replica_and_not_for_ever(tmp_path):
    path = tmp_path / "replicas.json"
    listed(path, tier=[("a", "starting")])
    now, pauses = [0.0], []

    def pause(seconds):
        now[0] += seconds
        pauses.append(now[0])
        if now[0] > 1.0:
            listed(path, tier=[("a", "ready")])

    balance = Balance({}, path, clock=lambda: now[0], pause=pause)
    assert balance.place("tier", 0.5) is None
    assert balance.place("tier", 5.0).address == "a"
    assert balance.place("tier", 5.0, frozenset({"a"})) is None, "it took no connection, and there is no other"


def test_a_list_that_cannot_be_read_changes_nothing(tmp_path):
    path = tmp_path / "replicas.json"
    listed(path, tier=[("a", "ready")])
    balance = Balance({}, path)
    assert balance.place("tier", 0).address == "a"
    path.unlink()
    assert balance.place("tier", 0).address == "a"
    path.write_text("{")
    assert balance.place("tier", 0).address == "a"


# ---- replicas ----


class FakeProcess:
    def __init__(self, name):
        self.name, self.exit_code, self.asked, self.pid = name, None, 0, 0

    def ask_to_stop(self):
        self.asked += 1

    def wait(self, timeout_s):
        self.exit_code = 0 if self.exit_code is None else self.exit_code


@pytest.fixture
def fakes():
    """A set whose processes do nothing; all of them answer at one address each, when told to."""
    with http_server(lambda _path: (200, "ok")) as url:
        made, said = [], []

        def spawn(name):
            made.append(FakeProcess(name))
            return made[-1], url

        replicas = ReplicaSet("tier", spawn, 5.0, said.append)
        replicas.made, replicas.said, replicas.url = made, said, url
        yield replicas
        replicas.kill()


def settle(replicas, now_s):
    """Step until all that start are ready; the limit only bounds a failing run."""
    ends = time.monotonic() + 10
    while replicas.ready < replicas.wanted:
        assert time.monotonic() < ends
        replicas.step(now_s, {})
        time.sleep(0.01)


def test_replicas_start_and_drain_before_they_are_told_to_stop(fakes):
    fakes.wanted = 2
    fakes.step(0.0, {})
    assert (fakes.current, fakes.ready) == (2, 0)
    assert [row["state"] for row in fakes.listed()] == ["starting", "starting"]
    settle(fakes, 1.0)
    fakes.wanted = 1
    fakes.step(2.0, {fakes.url: 1})
    assert sorted(row["state"] for row in fakes.listed()) == ["draining", "ready"]
    fakes.step(9.0, {fakes.url: 1})
    assert sum(p.asked for p in fakes.made) == 0, "it has a request"
    fakes.step(9.1, {})
    assert sum(p.asked for p in fakes.made) == 1
    assert [row["state"] for row in fakes.listed()] == ["ready"]
    fakes.step(15.0, {})
    fakes.step(15.1, {})
    assert len(fakes.listed()) == fakes.current == 1


def test_one_that_ends_is_replaced_and_one_that_cannot_start_not_at_once(fakes):
    fakes.wanted = 1
    fakes.step(0.0, {})
    fakes.made[0].exit_code = 3
    fakes.step(1.0, {})
    assert fakes.said == ["tier-1 ended with status 3; another takes its place"]
    assert len(fakes.made) == 1
    fakes.step(7.0, {})
    assert [p.name for p in fakes.made] == ["tier-1", "tier-2"]
    settle(fakes, 8.0)
    fakes.made[1].exit_code = 9
    fakes.step(9.0, {})
    assert [p.name for p in fakes.made] == ["tier-1", "tier-2", "tier-3"], "one that had served, at once"


# ---- the loop ----


class Rejected(grpc.RpcError):
    def code(self):
        return grpc.StatusCode.UNAVAILABLE

    def details(self):
        return "no metrics"


@dataclass
class FakeScaler:
    """The stub, as far as the loop uses it."""

    value: float = 1.0
    active: bool = True
    failing: bool = False
    calls: list = field(default_factory=list)

    def IsActive(self, request, timeout):  # noqa: N802
        self.calls.append("IsActive")
        if self.failing:
            raise Rejected
        return wire.IsActiveResponse(result=self.active)

    def GetMetrics(self, request, timeout):  # noqa: N802
        self.calls.append("GetMetrics")
        return wire.GetMetricsResponse(metricValues=[wire.MetricValue(metricName="m", metricValueFloat=self.value)])


class FakeLook:
    def __init__(self, listing):
        self.listing = listing

    def inflight(self):
        return {}

    def gauges(self, function, now_s):
        return {"in_flight": 1.0, "latency_ms": None}


class Loop:
    def __init__(self, fakes, tmp_path, **options):
        self.scaler, self.replicas, self.said, self.lines = FakeScaler(), fakes, [], []
        timing = Timing(poll_s=2.0, sync_s=4.0, down_window_s=10.0, cooldown_s=20.0)
        self.options = Autoscale(("tier",), timing=timing, **options)
        fakes.wanted = self.options.minimum
        hpa = Hpa(max(1, self.options.minimum), self.options.maximum, Behaviour(down_window_s=10.0))
        self.scaled = Scaled(fakes, hpa, wire.ScaledObjectRef(name="tier"), "m")
        self.listing = tmp_path / "replicas.json"
        out = Out(lambda _name, text: self.said.append(text))
        self.autoscaler = Autoscaler([self.scaled], self.options, self.scaler, FakeLook(self.listing), out)

    def until(self, now_s, until_s):
        while now_s <= until_s:
            self.autoscaler.step(now_s)
            now_s += 1.0


def test_it_asks_each_poll_and_scales_each_sync(fakes, tmp_path):
    loop = Loop(fakes, tmp_path)
    loop.scaler.value = 3
    loop.autoscaler.step(0.0)
    assert loop.scaler.calls == ["IsActive", "GetMetrics"]
    assert fakes.wanted == 3
    loop.scaler.value = 5
    loop.autoscaler.step(1.0)
    assert len(loop.scaler.calls) == 2
    loop.autoscaler.step(2.0)
    assert len(loop.scaler.calls) == 4
    assert fakes.wanted == 3, "the HPA looks at four"
    loop.autoscaler.step(4.0)
    assert fakes.wanted == 5
    assert json.loads(loop.listing.read_text())["tier"]["replicas"][0]["state"] in {"starting", "ready"}


def test_an_error_changes_nothing(fakes, tmp_path):
    loop = Loop(fakes, tmp_path)
    loop.scaler.value = 3
    loop.autoscaler.step(0.0)
    loop.scaler.failing = True
    loop.until(1.0, 100.0)
    assert fakes.wanted == 3
    assert [text for text in loop.said if "UNAVAILABLE" in text] == [
        "tier: the scaler says UNAVAILABLE, no metrics; its replicas stay"
    ]


def test_from_zero_when_active_and_to_zero_after_the_cool_down(fakes, tmp_path):
    loop = Loop(fakes, tmp_path, minimum=0)
    loop.scaler.active, loop.scaler.value = False, 0
    loop.until(0.0, 10.0)
    assert fakes.wanted == 0
    loop.scaler.active, loop.scaler.value = True, 1
    loop.scaled.pushed.set()
    loop.autoscaler.step(10.5)
    assert fakes.wanted == 1, "pushed, not polled"
    loop.until(11.0, 20.0)
    loop.scaler.active, loop.scaler.value = False, 0
    loop.until(21.0, 38.0)
    assert fakes.wanted == 1, "the HPA goes to one, KEDA waits to go to none"
    loop.until(39.0, 43.0)
    assert fakes.wanted == 0


# ---- real processes ----


def settings():
    return Settings(site(ROOT, {}), port=0, stop_timeout_s=20.0)


def test_no_request_fails_while_replicas_come_and_go(tmp_path):
    """Processes behind the gateway, from none to three and back to none, under callers that never pause."""
    listing = tmp_path / "replicas.json"
    listed(listing, tier=[])
    port = free_port()
    gateway = {"GATEWAY_REPLICAS": str(listing), "GATEWAY_METRICS_PORT": str(port)}
    look = Look(listing, f"http://127.0.0.1:{port}/metrics", Autoscale(("tier",)))
    run = Settings(site(ROOT, {}), port=0, stop_timeout_s=20.0, gateway_environment=gateway)
    with Bundle(Stack({}, ()), run, lambda *_: None) as bundle:

        def spawn(name):
            listener = listen()
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            command = function_command(STACK.functions["tier"], {}, bundle.port, run.site, run.inherited)
            return Process(command, listener, ROOT, lambda *_: None), address

        replicas, stop, statuses, pids = ReplicaSet("tier", spawn, 20.0, lambda _: None), threading.Event(), [], set()

        def call():
            with httpx.Client(base_url=bundle.url, trust_env=False, timeout=60) as client:
                while not stop.is_set():
                    said = client.post("/function/tier/slow", content=b"x", headers={"X-Mark": str(tmp_path / "mark")})
                    statuses.append(said.status_code)
                    pids.add(said.json()["master"])

        def until(count):
            replicas.wanted = count
            ends = time.monotonic() + 60
            more = len(statuses) + (2 * CALLERS if count else 0)
            while not (replicas.ready == len(replicas._replicas) == count and len(statuses) >= more):
                assert time.monotonic() < ends
                replicas.step(time.monotonic(), look.inflight())
                write_list(listing, [replicas])
                time.sleep(0.02)

        with ThreadPoolExecutor(CALLERS) as pool:
            calls = [pool.submit(call) for _ in range(CALLERS)]
            try:
                for count in (1, 3, 1, 2):
                    until(count)
                stop.set()
            finally:
                stop.set()
                for one in calls:
                    one.result()
            until(0)
        replicas.kill()
    assert set(statuses) == {200}
    assert len(pids) >= 3, "several served"


def test_the_whole_of_it_wakes_a_function_that_sleeps_and_keeps_the_request(tmp_path):
    record = tmp_path / "record.jsonl"
    timing = Timing(scaler_poll_s=0.1, poll_s=0.3, sync_s=0.3, record_s=0.1)
    options = Autoscale(("tier",), minimum=0, maximum=2, timing=timing, record=record)
    said = []
    with autoscaled(STACK, settings(), options, lambda name, line: said.append((name, line))) as (bundle, running):
        answer = httpx.get(f"{bundle.url}/function/tier/", trust_env=False, timeout=60)
        assert (answer.status_code, answer.json()["name"]) == (200, "standin")
        assert httpx.get(f"{bundle.url}/function/other/", trust_env=False).status_code == 404
    assert running.failure is None
    assert any("0 → 1 replicas (woken" in line for name, line in said if name == "autoscale"), said
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert {"time_s", "function", "wanted", "replicas", "ready", "value", "in_flight", "latency_ms"} <= set(lines[0])
    assert lines[0]["ready"] == 0
    assert max(line["ready"] for line in lines) == 1


def test_a_function_that_is_not_there_is_one_sentence():
    with pytest.raises(StackError, match="no function 'other'"), autoscaled(
        STACK, settings(), Autoscale(("other",)), lambda *_: None
    ):  # fmt: skip
        pass
