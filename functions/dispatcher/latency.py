"""The latency ceiling in front of a service: while models are too slow, a fallback answers, but for probes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

from functions.dispatcher.fallbacks import Fallback, events_of, report_of
from functions.serving.answering import Service
from functions.serving.ask import Ask, Clocked
from functions.serving.errors import ClientLeftError, RefusedError
from functions.serving.events import End, Event, Events, Report
from functions.serving.replies import ModelEntry
from routing.latency import LatencyGate, LatencyLimits

REASON = "latency"
_MODELS = frozenset({"device", "edge"})
_SLOW = "deadline"


class LatencyWatch:
    """A `LatencyGate` that several threads share."""

    def __init__(self, limits: LatencyLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._gate = LatencyGate(limits)
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def gate(self) -> LatencyGate:
        """The state as it is now."""
        return self._gate

    def admits(self) -> bool:
        """Whether the next request may go to the models."""
        with self._lock:
            self._gate, admitted = self._gate.admit(self._clock())
        return admitted

    def observe(self, began_s: float) -> None:
        """A request that began then, on the watch's clock, has its answer, or was given up."""
        with self._lock:
            now_s = self._clock()
            self._gate = self._gate.observe(now_s, 1e3 * (now_s - began_s))

    def now(self) -> float:
        """The watch's clock, in seconds."""
        return self._clock()


@dataclass(frozen=True)
class LatencyGuard:
    """Lets `inner` answer while it is fast enough, and `fallback` while it is not, as far as that has an answer."""

    inner: Service
    watch: LatencyWatch
    fallback: Fallback
    node_id: str

    def check(self, ask: Ask) -> None:
        """Refuse what the inner service refuses."""
        self.inner.check(ask)

    def models(self) -> list[ModelEntry]:
        """Those of the inner service."""
        return self.inner.models()

    def events(self, ask: Ask, clocked: Clocked) -> Events:
        """An answer of the inner service, or at once one of the fallback."""
        if not self.watch.admits():
            answer = self.fallback.answer(ask, REASON)
            if answer is not None:
                return events_of(ask, answer, report_of(answer, REASON, self.node_id))
        return self._watched(ask, clocked)

    def _watched(self, ask: Ask, clocked: Clocked) -> Iterator[Event]:
        """Time the answer. Who hangs up, or is refused, tells nothing about the models."""
        began_s = self.watch.now()
        try:
            with closing(cast("Any", self.inner.events(ask, clocked))) as events:
                for event in events:
                    if isinstance(event, End) and _is_told(event.report):
                        self.watch.observe(began_s)
                    yield event
        except (ClientLeftError, RefusedError):
            raise
        except Exception:
            self.watch.observe(began_s)
            raise


def _is_told(report: Report) -> bool:
    """Whether a model's time is in it: a fallback for want of a tier is quick, one for want of time is not."""
    return report.source in _MODELS or report.reason == _SLOW
