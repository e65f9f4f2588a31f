"""KEDA's contract over real gRPC, by a client made from the .proto alone."""

import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scaler import externalscaler_pb2
from scaler.errors import CrowdedError, SettingsError, SourceError
from scaler.gatherer import Bounds, Gatherer
from scaler.metrics import Metrics
from scaler.replicas import Found, Replica
from scaler.settings import Settings, Tls
from scaler.trigger import parse
from scaler.values import Decision, Reading
from tests.fakes import free_port, wait_until
from tests.scaler_rigs import (
    ROOT, FixedReplicas, LittlesLaw, Page, ProtoClient, StandInPrometheus, compiled, http_server, reference, running,
)  # fmt: skip

SETTINGS = Settings(host="127.0.0.1", port=0, metrics_port=0, poll_s=0.2, drain_s=2.0)
METRIC = "edgecascade-edge-replicas"
Code = grpc.StatusCode


class World:
    """A Prometheus, the replicas, and how many requests are in flight; it scrapes whenever it is asked."""

    def __init__(self):
        self.prometheus, self.replicas = StandInPrometheus(), FixedReplicas()
        self.page, self.up = Page(), True
        self.replicas.found = ready(1)

    def answer(self, path):
        if not self.up:
            return 503, "down"
        if path.endswith("query=time%28%29"):
            self.prometheus.scrape(self.page.text(), faas_function="edge")
        return self.prometheus.answer(path)

    def in_flight(self, count):
        self.page = replace(self.page, inflight=count)


def ready(count, starting=0):
    return Found([*[Replica("", ready=True)] * count, *[Replica("", ready=False)] * starting])


@pytest.fixture(scope="module")
def served():
    """One scaler for the tests that leave it as it was."""
    world = World()
    with http_server(world.answer) as url, running(SETTINGS, replicas=world.replicas, capacity=LittlesLaw) as scaler:
        world.url, world.scaler = url, scaler
        with grpc.insecure_channel(f"127.0.0.1:{scaler.port}") as channel:
            world.client = ProtoClient(channel)
            yield world


@contextmanager
def fails(code, says=""):
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() == code, caught.value
    assert says in caught.value.details()


def until_answered(client, ref):
    """Ask until there is an answer; before that every answer is UNAVAILABLE."""

    def answered():
        try:
            client("IsActive", ref)
        except grpc.RpcError as error:
            assert error.code() == Code.UNAVAILABLE
            return False
        return True

    wait_until(answered)


def value(client, ref):
    (metric,) = client("GetMetrics", {"scaledObjectRef": ref, "metricName": METRIC}).metricValues
    assert metric.metricName == METRIC
    assert metric.metricValue == metric.metricValueFloat
    return metric.metricValueFloat


def test_the_stubs_are_those_of_the_proto():
    """`make proto` after each change: what is committed says what the file says."""
    committed, now = descriptor_pb2.FileDescriptorProto(), descriptor_pb2.FileDescriptorProto()
    externalscaler_pb2.DESCRIPTOR.CopyToProto(committed)
    now.CopyFrom(compiled())
    for file in (committed, now):
        for message in file.message_type:
            for field in [*message.field, *(f for nested in message.nested_type for f in nested.field)]:
                field.ClearField("json_name")  # not written into the stubs
    assert committed == now
    assert now.package == "externalscaler"


def test_the_proto_is_kedas_on_the_wire():
    """Numbers and types as in KEDA's source; names do not travel."""
    fields = {m.name: {f.name: (f.number, f.type, f.label) for f in m.field} for m in compiled().message_type}
    one, many = 1, 3
    text, integer, double, message, boolean = 9, 3, 1, 11, 8
    assert fields == {
        "ScaledObjectRef": {
            "name": (1, text, one), "namespace": (2, text, one), "scalerMetadata": (3, message, many),
        },
        "IsActiveResponse": {"result": (1, boolean, one)},
        "GetMetricSpecResponse": {"metricSpecs": (1, message, many)},
        "MetricSpec": {
            "metricName": (1, text, one), "targetSize": (2, integer, one), "targetSizeFloat": (3, double, one),
        },
        "GetMetricsRequest": {"scaledObjectRef": (1, message, one), "metricName": (2, text, one)},
        "GetMetricsResponse": {"metricValues": (1, message, many)},
        "MetricValue": {
            "metricName": (1, text, one), "metricValue": (2, integer, one), "metricValueFloat": (3, double, one),
        },
    }  # fmt: skip
    methods = {m.name: m.server_streaming for m in compiled().service[0].method}
    assert methods == {"IsActive": False, "StreamIsActive": True, "GetMetricSpec": False, "GetMetrics": False}


def test_the_specification_needs_no_source(served):
    said = served.client("GetMetricSpec", reference(prometheusAddress="http://127.0.0.1:1"))
    (spec,) = said.metricSpecs
    assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == (METRIC, 1, 1.0)


def test_metrics_are_the_replicas_that_are_wanted(served):
    ref = reference(prometheusAddress=served.url, sloSeconds="3")
    served.in_flight(7)
    until_answered(served.client, ref)
    wait_until(lambda: value(served.client, ref) == 7)
    assert served.client("IsActive", ref).result is True


def test_the_tolerance_is_accounted_for_with_what_starts(served):
    ref = reference(prometheusAddress=served.url, sloSeconds="4")
    served.replicas.found = ready(9, starting=3)
    served.in_flight(13)
    until_answered(served.client, ref)
    wait_until(lambda: value(served.client, ref) == 14)
    served.replicas.found = ready(1)
    wait_until(lambda: value(served.client, ref) == 13)


def test_active_follows_the_metric_and_the_stream_pushes_each_change(served):
    ref = reference(prometheusAddress=served.url, minReplicas="0")
    served.in_flight(0)
    stream = served.client("StreamIsActive", ref, timeout=30)
    assert next(stream).result is False
    assert value(served.client, ref) == 0
    served.in_flight(2)
    assert next(stream).result is True
    served.in_flight(0)
    assert next(stream).result is False
    stream.cancel()
    served.in_flight(1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sloSeconds": "soon"}, "sloSeconds must be a number"),
        ({"sloSecond": "1"}, "did you mean sloSeconds?"),
        ({"function": "No Such"}, "function must be a name"),
        ({"prometheusAddress": ""}, "prometheusAddress or metricsAddress"),
    ],
)
def test_bad_metadata_is_an_invalid_argument_that_names_the_key(served, changes, says):
    ref = reference(**{"prometheusAddress": served.url, **changes})
    for method in ("IsActive", "GetMetricSpec"):
        with fails(Code.INVALID_ARGUMENT, says):
            served.client(method, ref)
    with fails(Code.INVALID_ARGUMENT, says):
        next(served.client("StreamIsActive", ref))
    with fails(Code.INVALID_ARGUMENT, says):
        served.client("GetMetrics", {"scaledObjectRef": ref, "metricName": METRIC})


def test_an_unknown_metric_is_an_invalid_argument(served):
    ref = reference(prometheusAddress=served.url)
    with fails(Code.INVALID_ARGUMENT, f"metricName is not known; this trigger has {METRIC}"):
        served.client("GetMetrics", {"scaledObjectRef": ref, "metricName": "s0-other"})


def test_health_is_the_standard_one(served):
    stub = health_pb2_grpc.HealthStub(served.client.channel)
    for service in ("", "externalscaler.ExternalScaler"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


# ---- sources that fail ----


def test_a_source_that_dies_is_unavailable_and_comes_back_without_a_restart():
    world, port = World(), free_port()
    world.in_flight(4)
    ref = reference(prometheusAddress=f"http://127.0.0.1:{port}", staleSeconds="1")
    with (
        running(SETTINGS, replicas=world.replicas, capacity=LittlesLaw) as scaler,
        grpc.insecure_channel(f"127.0.0.1:{scaler.port}") as channel,
    ):
        client = ProtoClient(channel)
        stream = client("StreamIsActive", ref, timeout=60)
        with fails(Code.UNAVAILABLE, "for the first time"):
            client("IsActive", ref)
        with http_server(world.answer, port):
            until_answered(client, ref)
            wait_until(lambda: value(client, ref) == 4)
            assert next(stream).result is True
        wait_until(lambda: code(client, ref) == Code.UNAVAILABLE)
        with fails(Code.UNAVAILABLE, "Prometheus did not answer"):
            client("GetMetrics", {"scaledObjectRef": ref, "metricName": METRIC})
        assert len(client("GetMetricSpec", ref).metricSpecs) == 1
        with http_server(world.answer, port):
            wait_until(lambda: code(client, ref) == Code.OK)
            assert value(client, ref) == 4
        stream.cancel()


def code(client, ref, method="IsActive"):
    try:
        client(method, ref)
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def test_the_real_prometheus_killed_and_started_again(tmp_path):
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: apt install prometheus")
    world, port = World(), free_port()
    world.in_flight(3)
    ref = reference(prometheusAddress=f"http://127.0.0.1:{port}", staleSeconds="3", windowSeconds="10")
    with (
        http_server(lambda _path: (200, world.page.text())) as target,
        running(SETTINGS, replicas=world.replicas, capacity=LittlesLaw) as scaler,
        grpc.insecure_channel(f"127.0.0.1:{scaler.port}") as channel,
    ):
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s}\nscrape_configs: [{job_name: f, static_configs: [{targets: "
            f"['{target.removeprefix('http://')}'], labels: {{faas_function: edge}}}}]}}]\n"
        )
        words = [
            program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        client = ProtoClient(channel)
        for _ in range(2):
            with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                wait_until(lambda: code(client, ref) == Code.OK, timeout_s=60)
                assert value(client, ref) == 3
                process.kill()
            wait_until(lambda: code(client, ref) == Code.UNAVAILABLE, timeout_s=60)


# ---- harm ----


def test_a_megabyte_of_metadata_and_garbage_do_no_harm(served):
    ref = reference(prometheusAddress=served.url, selector="x" * (1 << 20))
    with fails(Code.RESOURCE_EXHAUSTED):
        served.client("IsActive", ref)
    raw = served.client.channel.unary_unary("/externalscaler.ExternalScaler/IsActive")
    for data in (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", bytes(range(256))):
        with pytest.raises(grpc.RpcError):
            raw(data, timeout=5)
    with fails(Code.UNIMPLEMENTED):
        served.client.channel.unary_unary("/externalscaler.ExternalScaler/Nothing")(b"", timeout=5)
    with pytest.raises(grpc.RpcError):
        raw(b"", timeout=5, metadata=[("x", "y" * 100_000)])
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 512):
        with socket.create_connection(("127.0.0.1", served.scaler.port), timeout=5) as wire:
            wire.sendall(data)
    still_answers(served)


def still_answers(served):
    ref = reference(prometheusAddress=served.url)
    until_answered(served.client, ref)
    assert served.client("IsActive", ref).result is True


def test_thousands_of_calls_do_no_harm():
    """As fast as eight callers can: each is answered, or told that it is too much; afterwards all is as before."""
    world, looks = World(), []
    world.in_flight(1)
    settings = replace(SETTINGS, poll_s=0.5)
    with (
        http_server(lambda path: (looks.append(path), world.answer(path))[1]) as url,
        running(settings, replicas=world.replicas, capacity=LittlesLaw) as scaler,
        grpc.insecure_channel(f"127.0.0.1:{scaler.port}") as channel,
    ):
        client, ref = ProtoClient(channel), reference(prometheusAddress=url)
        until_answered(client, ref)

        def call(number):
            method, changes = ("IsActive", "GetMetricSpec", "IsActive")[number % 3], {"sloSeconds": "x"}
            return code(client, reference(**changes) if number % 3 == 2 else ref, method)

        looks.clear()
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            codes = set(pool.map(call, range(3000)))
        assert codes <= {Code.OK, Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED}
        rounds = (time.monotonic() - began) / settings.poll_s + 2
        assert len(looks) <= 3 * rounds, "calls only read: it looks no more often than before"
        assert client("IsActive", ref).result is True
        assert value(client, ref) == 1


def test_triggers_and_streams_are_bounded():
    settings = replace(SETTINGS, max_triggers=3, max_streams=2)
    world = World()
    with (
        http_server(world.answer) as url,
        running(settings, replicas=world.replicas, capacity=LittlesLaw) as scaler,
        grpc.insecure_channel(f"127.0.0.1:{scaler.port}") as channel,
    ):
        client = ProtoClient(channel)
        refs = [reference(prometheusAddress=url, sloSeconds=str(n)) for n in range(1, 5)]
        for ref in refs[:3]:
            until_answered(client, ref)
        with fails(Code.RESOURCE_EXHAUSTED, "3 triggers are watched already"):
            client("IsActive", refs[3])
        streams = [client("StreamIsActive", ref) for ref in refs[:2]]
        assert [next(stream).result for stream in streams] == [True, True]
        with fails(Code.RESOURCE_EXHAUSTED, "too many streams"):
            next(client("StreamIsActive", refs[2]))
        assert client("IsActive", refs[2]).result is True, "streams leave room for calls"
        streams[0].cancel()

        def freed():
            try:
                return next(client("StreamIsActive", refs[2])).result
            except grpc.RpcError:
                return False

        wait_until(freed)


# ---- the gatherer by itself, on a clock of ours ----


class Rig:
    def __init__(self, **bounds):
        self.now_s, self.failing, self.opened = 0.0, False, []
        self.gatherer = Gatherer(self.open, Metrics(), Bounds(**bounds), lambda: self.now_s)
        self.metadata = {"function": "edge", "sloSeconds": "1", "metricsAddress": "replicas", "staleSeconds": "10"}

    def open(self, trigger):
        self.opened.append(trigger)
        return self, self

    def look(self, now_s):
        if self.failing:
            raise SourceError("it is gone")
        return Reading(now_s, 0, None, 0, 0, None, None, None, None, None, 12, 0)

    def decide(self, reading):
        return Decision(13, "why")

    def trigger(self, **changes):
        return parse({**self.metadata, **changes}, "openfaas-fn")


def test_a_failed_look_leaves_the_answer_until_it_is_stale():
    rig = Rig()
    with pytest.raises(SourceError, match="first time"):
        rig.gatherer.answer(rig.trigger())
    rig.gatherer.look()
    assert rig.gatherer.answer(rig.trigger()).value == 14
    assert rig.gatherer.answer(rig.trigger()).decision.replicas == 13
    rig.failing, rig.now_s = True, 9.0
    rig.gatherer.look()
    assert rig.gatherer.answer(rig.trigger()).at_s == 0.0
    rig.now_s = 11.0
    with pytest.raises(SourceError, match="last answer for 'edge' is 11 s old: it is gone"):
        rig.gatherer.answer(rig.trigger())
    rig.failing = False
    rig.gatherer.look()
    assert rig.gatherer.answer(rig.trigger()).at_s == 11.0
    assert len(rig.opened) == 1, "what capacity remembers survives"


def test_what_nobody_asks_for_is_forgotten_and_makes_room():
    rig = Rig(max_triggers=1, forget_s=60.0)
    with pytest.raises(SourceError):
        rig.gatherer.answer(rig.trigger())
    with pytest.raises(CrowdedError):
        rig.gatherer.answer(rig.trigger(slots="2"))
    rig.now_s = 61.0
    rig.gatherer.look()
    with pytest.raises(SourceError):
        rig.gatherer.answer(rig.trigger(slots="2"))
    assert len(rig.opened) == 2


def test_a_fault_of_ours_is_no_answer_and_ends_nothing(caplog):
    rig = Rig()
    rig.decide = lambda _reading: 1 / 0
    with pytest.raises(SourceError):
        rig.gatherer.answer(rig.trigger())
    rig.gatherer.look()
    with pytest.raises(SourceError, match="something broke here"):
        rig.gatherer.answer(rig.trigger())
    assert "ZeroDivisionError" in caplog.text


def test_a_source_that_hangs_delays_its_own_trigger_only():
    release, looked = threading.Event(), threading.Event()

    class Hangs(Rig):
        def open(self, trigger):
            return (self, self) if trigger.target.slots == 1 else (Waits(), self)

    class Waits:
        def look(self, now_s):
            looked.set()
            release.wait(20)
            raise SourceError("too late")

    rig = Hangs(poll_s=0.02)
    rig.gatherer.start()
    try:
        with pytest.raises(SourceError):
            rig.gatherer.answer(rig.trigger(slots="2"))
        assert looked.wait(20)
        with pytest.raises(SourceError):
            rig.gatherer.answer(rig.trigger())
        assert rig.gatherer.await_change(rig.trigger(), None, 20.0) is True
    finally:
        release.set()
        rig.gatherer.stop()


# ---- TLS ----


class Authority:
    """A certificate authority for a test."""

    def __init__(self, folder, name):
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.pem"
        certificate = self._builder(self.name, self.key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.file.write_bytes(certificate.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, name):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._builder(subject, key).add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False
        )
        files = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        files[0].write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    def _builder(self, subject, key):
        import datetime

        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )


def channel_of(port, ca, pair=None):
    chain, key = (pair[0].read_bytes(), pair[1].read_bytes()) if pair else (None, None)
    return grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(ca.file.read_bytes(), key, chain))


def test_mutual_tls_by_files_that_may_change(tmp_path):
    ours, strangers = Authority(tmp_path, "ours"), Authority(tmp_path, "strangers")
    certificate, key = ours.issue("scaler")
    settings = replace(SETTINGS, host="localhost", tls=Tls(certificate, key, ours.file))
    ref = reference(prometheusAddress="http://127.0.0.1:1")
    with running(settings, replicas=FixedReplicas(), capacity=LittlesLaw) as scaler:

        def asks(channel):
            with channel:
                return len(ProtoClient(channel)("GetMetricSpec", ref, timeout=5).metricSpecs)

        assert asks(channel_of(scaler.port, ours, ours.issue("keda"))) == 1
        for channel in (
            channel_of(scaler.port, ours),  # shows no certificate
            channel_of(scaler.port, ours, strangers.issue("eve")),
            channel_of(scaler.port, strangers, ours.issue("keda2")),  # trusts another
            grpc.insecure_channel(f"localhost:{scaler.port}"),
        ):
            with pytest.raises(grpc.RpcError):
                asks(channel)
        renewed = strangers.issue("scaler")
        assert renewed == (certificate, key)
        assert asks(channel_of(scaler.port, strangers, ours.issue("keda3"))) == 1
        key.unlink()
        assert asks(channel_of(scaler.port, strangers, ours.issue("keda4"))) == 1, "the files before are used"


# ---- the process ----


def test_a_taken_port_stops_the_start(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for changes in ({"port": port}, {"metrics_port": port}):
            with pytest.raises(SettingsError, match="cannot be used"), running(
                replace(SETTINGS, **changes), replicas=FixedReplicas()
            ):  # fmt: skip
                pass


def test_the_command_answers_shows_its_metrics_and_drains_on_sigterm(tmp_path):
    port, metrics_port = free_port(), free_port()
    replicas = tmp_path / "replicas.json"
    world = World()
    environment = {
        "PATH": "/usr/bin:/bin", "SCALER_HOST": "127.0.0.1", "SCALER_PORT": str(port), "SCALER_POLL_MS": "100",
        "SCALER_METRICS_PORT": str(metrics_port), "SCALER_REPLICAS": str(replicas),
    }  # fmt: skip
    with http_server(lambda _path: (200, world.page.text())) as url:
        replicas.write_text('{"edge": {"replicas": [{"address": "%s", "state": "ready"}]}}' % url)
        ref = reference(metricsAddress="replicas")
        command = [sys.executable, "-m", "edgecascade", "scaler"]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            try:
                with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                    grpc.channel_ready_future(channel).result(timeout=60)
                    client = ProtoClient(channel)
                    until_answered(client, ref)
                    assert value(client, ref) == 1
                    page = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", trust_env=False).text
                    assert 'edgecascade_scaler_wanted_replicas{function="edge",namespace="openfaas-fn"} 1.0' in page
                    assert 'edgecascade_scaler_calls_total{code="OK",method="IsActive"}' in page
                    stream = client("StreamIsActive", ref, timeout=60)
                    assert next(stream).result is True
                    process.terminate()
                    assert list(stream) == [], "the stream ended as it should"
                    process.wait(30)
            finally:
                process.kill()
            log = process.stderr.read()
        assert process.returncode == 0, log
        assert "stopping" in log
        assert "Traceback" not in log


def test_a_bad_setting_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "edgecascade", "scaler"]
    said = subprocess.run(
        command, cwd=ROOT, env={"SCALER_PORTT": "1"}, capture_output=True, text=True, check=False, timeout=60
    )
    assert said.returncode == 1
    assert said.stderr.startswith("edgecascade: SCALER_PORTT is not a setting of the scaler")
    assert said.stderr.count("\n") == 1
