"""Signals mean the same from Prometheus and from pages; what is missing or old is an error, never a zero."""

import math
import random
from dataclasses import replace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from scaler.errors import SourceError
from scaler.replicas import Found, ListedReplicas, Replica
from scaler.signals.pages import PageSource
from scaler.signals.prometheus import PrometheusSource
from scaler.signals.series import Buckets, Series, Window
from scaler.signals.source import FUNCTION, GATEWAY
from scaler.signals.summary import summarise
from scaler.trigger import parse
from tests.scaler_rigs import Page, StandInPrometheus

REPLICA = "http://10.0.0.1:8080"
READY = Found([Replica(REPLICA, ready=True)])
NONE = Found([])


class PagesRig:
    """Pages that the source reads itself."""

    metadata = {"metricsAddress": "replicas", "gatewayAddress": "http://gateway:8082"}

    def __init__(self, trigger):
        self.page, self.up = Page(), True
        self.source = PageSource(httpx.Client(transport=httpx.MockTransport(self.answer)), trigger)

    def answer(self, request):
        if not self.up:
            raise httpx.ConnectError("refused", request=request)
        gateway = request.url.host == "gateway"
        return httpx.Response(200, text=replace(self.page, gateway=gateway, own=not gateway).text())

    def look(self, now_s, found):
        return self.source.read(found.replicas, now_s)


class PrometheusRig:
    """A stand-in that scrapes at each look, on a clock that differs from ours."""

    metadata = {"prometheusAddress": "http://prometheus:9090"}

    def __init__(self, trigger):
        self.page, self.up, self.scrapes = Page(), True, True
        self.prometheus = StandInPrometheus()
        self.source = PrometheusSource(httpx.Client(transport=httpx.MockTransport(self.answer)), trigger)

    def answer(self, request):
        if not self.up:
            raise httpx.ConnectError("refused", request=request)
        status, body = self.prometheus.answer(str(request.url))
        return httpx.Response(status, text=body)

    def look(self, now_s, found):
        self.prometheus.clock_s = now_s + 1e9
        if self.scrapes:
            self.prometheus.scrape(replace(self.page, own=bool(found.ready)).text(), faas_function="edge", instance="a")
        return self.source.read(found.replicas, now_s)


@pytest.fixture(params=[PagesRig, PrometheusRig])
def rig(request):
    metadata = {"function": "edge", "sloSeconds": "2", "windowSeconds": "60", "staleSeconds": "20"}
    trigger = parse({**metadata, **request.param.metadata}, "openfaas-fn")
    made = request.param(trigger)
    made.trigger = trigger
    return made


def reading(rig, now_s, found=READY):
    return summarise(rig.look(now_s, found), found, rig.trigger, now_s)


def steady(rig, until_s=60.0, per_s=2, found=READY):
    """Two requests a second, looked at every five seconds; gives the last reading."""
    for now_s in range(0, int(until_s) + 1, 5):
        rig.page = replace(rig.page, started=now_s * per_s + 3, answered=now_s * per_s, inflight=2, waiting=1)
        window = rig.look(float(now_s), found)
    return summarise(window, found, rig.trigger, until_s)


def test_a_steady_load_is_read_as_it_is(rig):
    found = steady(rig)
    assert found.arrivals_per_s == pytest.approx(2.0, rel=0.1)
    assert (found.in_flight, found.queued) == (3.0, 1.0)
    assert found.service_s == pytest.approx(0.2)
    assert found.queue_wait_s == pytest.approx(0.09)
    assert found.tokens_per_request == pytest.approx(8.0)
    assert 0.2 < found.latency_s <= 0.3, "the bucket that 0.29 s lies in"
    assert found.service_scv >= 0
    assert found.arrivals_scv == pytest.approx(0.0, abs=0.05), "steps are all alike"
    assert (found.ready, found.starting, found.at_s) == (1, 0, 60.0)


def test_what_the_gate_refuses_for_load_is_demand_too_and_what_was_malformed_is_not(rig):
    for step in range(3):
        rig.page = replace(rig.page, answered=10 * step, refused=20 * step)
        window = rig.look(5.0 * step, READY)
    assert summarise(window, READY, rig.trigger, 10.0).arrivals_per_s == pytest.approx(6.0)


def test_a_restart_does_not_make_arrivals_negative(rig):
    for now_s, answered in [(0, 100), (5, 110), (10, 4), (15, 8)]:
        rig.page = replace(rig.page, started=answered, answered=answered)
        window = rig.look(float(now_s), READY)
    assert summarise(window, READY, rig.trigger, 15.0).arrivals_per_s == pytest.approx((10 + 4 + 4) / 15)


def test_idle_is_zero_and_unmeasured_is_none(rig):
    for now_s in (0.0, 5.0):
        found = rig.look(now_s, READY)
    idle = summarise(found, READY, rig.trigger, 5.0)
    assert (idle.arrivals_per_s, idle.in_flight, idle.queued) == (0.0, 0.0, 0.0)
    assert (idle.service_s, idle.latency_s, idle.queue_wait_s, idle.tokens_per_request, idle.arrivals_scv) == (
        None,
    ) * 5


def test_a_request_that_the_gateway_holds_is_seen_without_any_replica(rig):
    rig.page = Page(started=5, answered=5, own=False)
    rig.look(0.0, NONE)
    rig.page = Page(started=6, answered=5, own=False)
    held = reading(rig, 5.0, NONE)
    assert (held.in_flight, held.queued, held.ready) == (1.0, 1.0, 0)


def test_nobody_there_is_an_error_and_so_is_one_look(rig):
    if isinstance(rig, PagesRig):
        with pytest.raises(SourceError, match="rates need two looks"):
            reading(rig, 0.0)
    else:
        rig.scrapes = False
        with pytest.raises(SourceError, match="no metrics of 'edge'"):
            reading(rig, 0.0)
    rig.up = False
    with pytest.raises(SourceError, match="did not answer"):
        reading(rig, 5.0)


def test_garbage_is_an_error(rig):
    rig.answer = None
    for body in ("<html>hello", '{"status": "error", "errorType": "bad_data"}', '{"a": 1}', "[]", "\x00{", "a{b"):
        client = httpx.Client(transport=httpx.MockTransport(lambda _, body=body: httpx.Response(200, text=body)))
        source = type(rig.source)(client, rig.trigger)
        with pytest.raises(SourceError):
            summarise(source.read(READY.replicas, 0.0), READY, rig.trigger, 0.0)


def test_a_500_is_an_error(rig):
    client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(500)))
    with pytest.raises(SourceError, match="answered 500"):
        type(rig.source)(client, rig.trigger).read(READY.replicas, 0.0)


def test_old_samples_are_an_error():
    metadata = {"function": "edge", "sloSeconds": "2", "staleSeconds": "20", **PrometheusRig.metadata}
    rig = PrometheusRig(parse(metadata, "openfaas-fn"))
    rig.trigger = rig.source.trigger
    assert steady(rig).arrivals_per_s > 0
    rig.scrapes = False
    assert reading(rig, 80.0).arrivals_per_s > 0
    with pytest.raises(SourceError, match="newest metrics of 'edge' are 25 s old; 20 s are allowed"):
        reading(rig, 85.0)


def test_of_several_replicas_those_that_are_gone_hold_no_requests():
    trigger = parse({"function": "edge", "sloSeconds": "2", "metricsAddress": "replicas"}, "openfaas-fn")
    pages = {"a": Page(inflight=4, gateway=False), "b": Page(inflight=3, gateway=False)}

    def answer(request):
        page = pages.get(request.url.host)
        return httpx.Response(200, text=page.text()) if page else httpx.Response(502)

    source = PageSource(httpx.Client(transport=httpx.MockTransport(answer)), trigger)
    both = Found([Replica("http://a:1", ready=True), Replica("http://b:1", ready=True)])
    for now_s in (0.0, 5.0):
        pages = {name: replace(page, answered=int(now_s)) for name, page in pages.items()}
        window = source.read(both.replicas, now_s)
    assert summarise(window, both, trigger, 5.0).in_flight == 7.0
    assert summarise(window, both, trigger, 5.0).arrivals_per_s == 2.0
    del pages["b"]
    window = source.read(both.replicas, 10.0)
    assert summarise(window, both, trigger, 10.0).in_flight == 4.0, "one page failed, and the other counts"
    pages.clear()
    with pytest.raises(SourceError, match="answered 502"):
        source.read(both.replicas, 15.0)
    with pytest.raises(SourceError, match="no replica of 'edge' is ready"):
        source.read([], 15.0)


def test_a_strangers_function_is_read_by_its_watchdog():
    lines = "\n".join(
        f'http_request_duration_seconds_bucket{{{{code="200",method="POST",le="{bound}"}}}} {{n}}'
        for bound in (0.5, 1, "+Inf")
    )
    text = (
        lines + '\nhttp_requests_total{{code="200",method="POST"}} {n}\nhttp_requests_in_flight 2\n'
        'http_request_duration_seconds_sum{{code="200",method="POST"}} {s}\n'
        'http_request_duration_seconds_count{{code="200",method="POST"}} {n}\n'
    )
    trigger = parse({"function": "edge", "sloSeconds": "2", "metricsAddress": "http://x:8081"}, "openfaas-fn")
    counts = iter([0, 10])

    def answer(_request):
        n = next(counts)
        return httpx.Response(200, text=text.format(n=n, s=0.4 * n))

    source = PageSource(httpx.Client(transport=httpx.MockTransport(answer)), trigger)
    source.read([], 0.0)
    found = summarise(source.read([], 5.0), READY, trigger, 5.0)
    assert (found.arrivals_per_s, found.in_flight, found.service_s) == (2.0, 2.0, pytest.approx(0.4))
    assert found.queue_wait_s is None


def test_every_series_of_ours_that_is_read_is_one_that_a_function_shows():
    """A renamed series would silently read as nothing."""
    from functions.serving.metrics import Metrics

    shown = Metrics("n", "s").exposition(inflight=0, waiting=0, limit=1, ready=True).decode()
    for name in (name for name in FUNCTION if name.startswith("edgecascade_")):
        assert name.removesuffix("_total").removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") in shown


def test_the_lists_of_series_have_no_name_twice():
    assert len({*FUNCTION, *GATEWAY}) == len(FUNCTION) + len(GATEWAY)


# ---- arithmetic, against independent sources ----


@given(st.lists(st.floats(0.001, 30), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values, q):
    bounds = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)
    registry = CollectorRegistry()
    histogram = Histogram("h", "h", buckets=bounds, registry=registry)
    for value in values:
        histogram.observe(value)
    assert generate_latest(registry)
    cumulative = [(b, float(sum(v <= b for v in values))) for b in (*bounds, math.inf)]
    true = sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
    low = max((b for b in (0.0, *bounds) if b < true), default=0.0)
    high = min(b for b in bounds if b >= true)
    assert low <= Buckets(cumulative).quantile(q) <= high


def test_a_variance_out_of_buckets_is_near_the_true_one():
    rng = random.Random(1)
    values = [rng.uniform(1, 5) for _ in range(5000)]
    bounds = [i / 4 for i in range(1, 25)]
    cumulative = [(b, float(sum(v <= b for v in values))) for b in (*bounds, math.inf)]
    assert Buckets(cumulative).variance() == pytest.approx(16 / 12, rel=0.05)


@pytest.mark.parametrize(("size", "wanted"), [(1, 1.0), (5, 5.0)])
def test_dispersion_tells_lone_arrivals_from_clumps(size, wanted):
    """Clumps of five have five times the variance of the count: a compound Poisson process."""
    rng = random.Random(2)
    total, samples = 0.0, [(0.0, 0.0)]
    for step in range(1, 2001):
        total += size * sum(rng.random() < 0.002 for _ in range(1000))
        samples.append((5.0 * step, total))
    window = Window([Series("gateway_function_invocation_started", {}, samples)])
    assert window.dispersion("gateway_function_invocation_started") == pytest.approx(wanted, rel=0.15)


# ---- replicas from a list ----


def test_a_list_of_replicas_is_read_by_path_and_by_address(tmp_path):
    text = (
        '{"edge": {"replicas": [{"address": "http://a", "state": "ready"}, {"address": "http://b", "state": "starting"},'
        ' {"address": "http://c", "state": "draining"}], "power_ceiling": 3}}'
    )
    client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, text=text)))
    file = tmp_path / "replicas.json"
    file.write_text(text)
    for place in (str(file), "http://somewhere/replicas"):
        listed = ListedReplicas(place, client)
        found = listed.of("edge", "any")
        assert (found.ready, found.starting, found.power_ceiling) == (1, 1, 3)
        with pytest.raises(SourceError, match="does not say which 'other' has"):
            listed.of("other", "any")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"edge": 3}', '{"edge": {"replicas": [{}]}}', '{"edge": {"replicas": 1}}']
)
def test_a_list_that_is_none_is_an_error(tmp_path, text):
    file = tmp_path / "replicas.json"
    file.write_text(text)
    with pytest.raises(SourceError):
        ListedReplicas(str(file), httpx.Client()).of("edge", "any")
    with pytest.raises(SourceError, match="cannot be read"):
        ListedReplicas(str(tmp_path / "none"), httpx.Client()).of("edge", "any")
