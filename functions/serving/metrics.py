"""What a function measures, for Prometheus. Every series carries `node_id`, `shard_id` and `model_version`.

Each app owns its registry, so several apps live in one process. Nothing is labelled by request, prompt or answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from functions.serving.events import Report, Usage
from models.runtime.tier import TierStats

NO_VERSION = "none"
# The target is 80 ms: the default buckets jump from 75 to 100.
SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.15, 0.2, 0.3),
    *(0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0),
)
CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)
_LABELS = ("node_id", "shard_id", "model_version")


@dataclass(frozen=True)
class _Series:
    """What every answer of one model version counts in; `seconds` by the names of `Timing`."""

    prompt: Counter
    completion: Counter
    seconds: Mapping[str, Histogram]
    confidence: Histogram


class Metrics:
    """The series of one function."""

    def __init__(self, node_id: str, shard_id: str) -> None:
        self._registry = CollectorRegistry()
        self._site = {"node_id": node_id, "shard_id": shard_id}
        self._by_version: dict[str, _Series] = {}
        self._requests = self._counter("requests", "Answered requests.", "route", "reason")
        self._rejections = self._counter("rejections", "Requests refused or broken off, by error code.", "code")
        self._deadlines = self._counter(
            "deadlines", "What became of the deadlines of requests that named a class.", "deadline_class", "outcome"
        )
        self._escalations = self._counter("escalations", "Answers that the edge gave after the device.", "reason")
        self._tokens = self._counter("tokens", "Tokens read and written.", "kind")
        self._total = self._seconds("request", "From the request's arrival to its last token.")
        self._parts = {
            "queue": self._seconds("queue", "Waiting for admission."),
            "network": self._seconds("network", "Between device site and edge site."),
            "prefill": self._seconds("prefill", "From the prompt to its first token."),
            "decode": self._seconds("decode", "From the first token to the last."),
        }
        self._first_token = self._seconds("time_to_first_token", "From the request's arrival to its first token.")
        self._confidence = Histogram(
            "edgecascade_confidence", "Calibrated P(right).", _LABELS, buckets=CONFIDENCE, registry=self._registry
        )
        self._inflight = self._gauge("inflight_requests", "Requests being answered.")
        self._waiting = self._gauge("waiting_requests", "Requests waiting for admission.")
        self._limit = self._gauge("inflight_limit", "Requests that may be answered at once; adapts to lateness.")
        self._ready = self._gauge("ready", "1 when requests are taken.")
        self._version = NO_VERSION
        self.expect(NO_VERSION)

    def expect(self, model_version: str) -> None:
        """Show the series of a model before its first request; from now on gauges and rejections are its own."""
        self._version = model_version
        for series in (self._total, *self._parts.values(), self._first_token, self._confidence):
            series.labels(**self._labels(model_version))

    def watch(self, read: Callable[[], TierStats], provider: str) -> None:
        """Show what a tier counts itself, as it stands when it is asked for, and the execution provider it runs on."""
        self._registry.register(_TierCollector(read, self._labels(self._version), provider))

    def add(self, collect: Callable[[dict[str, str]], Iterable[Metric]]) -> None:
        """Show series that a function keeps itself; `collect` gets the labels that every series carries."""
        self._registry.register(_Collector(collect, self._labels(self._version)))

    def answered(self, report: Report, usage: Usage) -> None:
        """Count one answer."""
        version = report.model_version or NO_VERSION
        series = self._by_version.get(version) or self._series_of(version)
        labels = (*self._site.values(), version)
        self._requests.labels(*labels, report.route, report.reason).inc()
        if report.route == "escalated" or (report.route, report.reason) == ("chat", "out_of_scope"):
            self._escalations.labels(*labels, report.reason).inc()
        series.prompt.inc(usage.prompt_tokens)
        series.completion.inc(usage.completion_tokens)
        for part, histogram in series.seconds.items():
            histogram.observe(getattr(report.timing_ms, part) / 1e3)
        if report.confidence is not None:
            series.confidence.observe(report.confidence)

    def _series_of(self, version: str) -> _Series:
        """Looked up once: finding a series by its labels takes longer than counting. Versions are few."""
        labels = (*self._site.values(), version)
        histograms = {"total": self._total, **self._parts, "first_token": self._first_token}
        found = self._by_version[version] = _Series(
            prompt=self._tokens.labels(*labels, "prompt"),
            completion=self._tokens.labels(*labels, "completion"),
            seconds={part: histogram.labels(*labels) for part, histogram in histograms.items()},
            confidence=self._confidence.labels(*labels),
        )
        return found

    def deadline(self, deadline_class: str, outcome: str) -> None:
        """Count one deadline of a class: `kept`, `late`, or `failed`, where an error came in place of an answer."""
        self._deadlines.labels(**self._labels(self._version), deadline_class=deadline_class, outcome=outcome).inc()

    def rejected(self, code: str) -> None:
        """Count one request that got an error."""
        self._rejections.labels(**self._labels(self._version), code=code).inc()

    def exposition(self, *, inflight: int, waiting: int, limit: int, ready: bool) -> bytes:
        """The text that Prometheus reads."""
        labels = self._labels(self._version)
        values = {self._inflight: inflight, self._waiting: waiting, self._limit: limit, self._ready: int(ready)}
        for gauge, value in values.items():
            gauge.clear()
            gauge.labels(**labels).set(value)
        return generate_latest(self._registry)

    def _labels(self, model_version: str) -> dict[str, str]:
        return {**self._site, "model_version": model_version}

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return Counter(f"edgecascade_{name}", text, (*_LABELS, *more), registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"edgecascade_{name}", text, _LABELS, registry=self._registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        options: dict[str, Any] = {"buckets": SECONDS, "registry": self._registry}
        return Histogram(f"edgecascade_{name}_seconds", text, _LABELS, **options)


@dataclass(frozen=True, eq=False)
class _Collector(Collector):
    """Series that are read when they are asked for."""

    read: Callable[[dict[str, str]], Iterable[Metric]]
    labels: dict[str, str]

    def collect(self) -> Iterable[Metric]:
        """Read them now."""
        return self.read(self.labels)


@dataclass(frozen=True, eq=False)
class _TierCollector(Collector):
    """Turns a tier's own counts into series."""

    read: Callable[[], TierStats]
    labels: dict[str, str]
    provider: str

    def collect(self) -> Iterator[Metric]:
        """Read the tier now."""
        stats = self.read()
        yield self._counter(
            "prefix_asked_tokens", "Prompt tokens looked up in the prefix cache.", stats.prefix_asked_tokens
        )
        yield self._counter("prefix_reused_tokens", "Prompt tokens found there.", stats.prefix_reused_tokens)
        yield self._counter("prefix_evicted_blocks", "Blocks it threw out.", stats.prefix_evicted_blocks)
        yield self._gauge("prefix_held_bytes", "What it holds.", stats.prefix_held_bytes)
        yield self._counter("passes", "Forward passes of single tokens.", stats.passes)
        yield self._counter("pass_tokens", "Tokens in them; more than one each where answers share.", stats.pass_tokens)
        yield self._counter("pass_seconds", "What those passes lasted.", stats.pass_s)
        for source in ("draft", "lookup"):
            proposed, accepted = (getattr(stats, f"{source}_{what}_tokens") for what in ("proposed", "accepted"))
            yield self._counter(f"{source}_proposed_tokens", f"Tokens that a {source} proposed.", proposed)
            yield self._counter(f"{source}_accepted_tokens", "Those that the model said too.", accepted)
        for depth, text in (("frames", "Frames read"), ("tokens", "Tokens read for frames")):
            family = CounterMetricFamily(
                f"edgecascade_exit_{depth}", f"{text}, by the layers passed.", labels=[*self.labels, "layers"]
            )
            for passed, count in sorted(stats.depths.items()):
                family.add_metric([*self.labels.values(), str(passed)], getattr(count, depth))
            yield family
        yield self._gauge("execution_provider", "1 for the one in use.", 1, provider=self.provider)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"edgecascade_{name}", text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _gauge(self, name: str, text: str, value: float, **more: str) -> Metric:
        labels = {**self.labels, **more}
        family = GaugeMetricFamily(f"edgecascade_{name}", text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family
