"""What the scaler says of itself, for Prometheus; functions are bounded by the triggers that may be watched."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from scaler.gatherer import Answer
from scaler.trigger import Trigger

_FUNCTION = ("function", "namespace")


class Metrics:
    """The series of one scaler."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "edgecascade_scaler_calls", "Calls, by method and gRPC code.", ("method", "code"), registry=self.registry
        )
        self._looks = Counter(
            "edgecascade_scaler_looks", "Looks at signals.", (*_FUNCTION, "outcome"), registry=self.registry
        )
        self._wanted = self._gauge("wanted_replicas", "Replicas that hold the target.")
        self._asked = self._gauge("asked_replicas", "What is asked of the HPA, its tolerance accounted for.")
        self._newest = self._gauge("last_success_timestamp_seconds", "When signals were last read.")
        self._triggers = Gauge("edgecascade_scaler_triggers", "Triggers watched.", registry=self.registry)

    def call(self, method: str, code: str) -> None:
        """Count one call."""
        self._calls.labels(method, code).inc()

    def looked(self, trigger: Trigger, answer: Answer | None) -> None:
        """Count one look, and show what it said."""
        labels = trigger.function, trigger.namespace
        self._looks.labels(*labels, "answered" if answer else "failed").inc()
        if answer:
            self._wanted.labels(*labels).set(answer.decision.replicas)
            self._asked.labels(*labels).set(answer.value)
            self._newest.labels(*labels).set_to_current_time()

    def forgot(self, trigger: Trigger) -> None:
        """Show a function no more."""
        labels = trigger.function, trigger.namespace
        for outcome in ("answered", "failed"):
            self._looks.remove(*labels, outcome)
        for gauge in (self._wanted, self._asked, self._newest):
            gauge.remove(*labels)

    def watching(self, triggers: int) -> None:
        """So many triggers are watched."""
        self._triggers.set(triggers)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"edgecascade_scaler_{name}", text, _FUNCTION, registry=self.registry)
