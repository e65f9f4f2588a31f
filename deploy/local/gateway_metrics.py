"""What the gateway counts, under the names that OpenFaaS' gateway uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

NAMESPACE = "openfaas-fn"
REPLICA_INFLIGHT = "edgecascade_gateway_replica_inflight"
# The real one's end at 10 s and are wider; all of its bounds are among these.
SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5),
    *(3.0, 4.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0),
)
_NAME = ("function_name",)


class GatewayMetrics:
    """The series of one gateway. `inflight` gives the requests at each replica's address."""

    def __init__(self, inflight: Callable[[], Mapping[str, int]]) -> None:
        self.registry = CollectorRegistry()
        self._started = Gauge(
            # A counter in all but the suffix, which the real one lacks.
            "gateway_function_invocation_started", "Requests begun.", _NAME, registry=self.registry
        )  # fmt: skip
        self._ended = Counter(
            "gateway_function_invocation", "Requests ended.", (*_NAME, "code"), registry=self.registry
        )
        self._seconds = Histogram(
            "gateway_functions_seconds", "From a request's arrival to its end.", _NAME, buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._services = Gauge("gateway_service_count", "1 for each function there is.", _NAME, registry=self.registry)
        self.registry.register(_Inflight(inflight))

    def exist(self, names: list[str]) -> None:
        """Show the functions before their first request."""
        for name in names:
            self._services.labels(_full(name)).set(1)
            self._started.labels(_full(name))

    def started(self, name: str) -> None:
        """A request came."""
        self._started.labels(_full(name)).inc()

    def ended(self, name: str, code: int, seconds: float) -> None:
        """It is over."""
        self._ended.labels(_full(name), str(code)).inc()
        self._seconds.labels(_full(name)).observe(seconds)


@dataclass(frozen=True, eq=False)
class _Inflight(Collector):
    read: Callable[[], Mapping[str, int]]

    def collect(self) -> Iterator[Metric]:
        """Read it now."""
        family = GaugeMetricFamily(REPLICA_INFLIGHT, "Requests at a replica.", labels=["address"])
        for address, count in self.read().items():
            family.add_metric([address], count)
        yield family


def _full(name: str) -> str:
    return f"{name}.{NAMESPACE}"
