"""What the federation measures beside what every function does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from functions.federation.announce import Announce
from functions.federation.deferred.forward import Forwarder
from functions.federation.deferred.store import DeferredStore
from functions.federation.errors import StoreError
from functions.federation.federate import Standings
from functions.serving.admission import Gate


@dataclass(frozen=True)
class Series:
    """Reads the parts when Prometheus asks."""

    standings: Standings
    announce: Announce
    store: DeferredStore
    forwarder: Forwarder | None
    waiters: Gate

    def collect(self, labels: Mapping[str, str]) -> Iterator[Metric]:
        """The series, each with `labels` and its own."""
        names, values = list(labels), list(labels.values())
        votes = CounterMetricFamily(
            "edgecascade_votes", "What became of each node's vote.", labels=[*names, "peer", "outcome"]
        )
        for (peer, outcome), count in self.standings.votes.items():
            votes.add_metric([*values, peer, outcome], count)
        yield votes
        reliable = GaugeMetricFamily(
            "edgecascade_vote_reliability", "How far a node's votes are trusted, 0 to 1.", labels=[*names, "peer"]
        )
        for peer, value in self.standings.reliability.items():
            reliable.add_metric([*values, peer], value)
        yield reliable
        told = CounterMetricFamily("edgecascade_announcements", "Announcements.", labels=[*names, "outcome"])
        for outcome, count in self.announce.outcomes.items():
            told.add_metric([*values, outcome], count)
        yield told
        waiting = GaugeMetricFamily(
            "edgecascade_waiting_readers", "Readers of the shared log that wait for an event.", labels=names
        )
        waiting.add_metric(values, self.waiters.inflight)
        yield waiting
        kept = GaugeMetricFamily("edgecascade_deferred_questions", "Kept questions.", labels=[*names, "status"])
        for status, count in self._kept().items():
            kept.add_metric([*values, status], count)
        yield kept
        forwarded = CounterMetricFamily(
            "edgecascade_forwards", "Times a kept question was put to the edge.", labels=[*names, "outcome"]
        )
        for outcome, count in (self.forwarder.outcomes if self.forwarder else {}).items():
            forwarded.add_metric([*values, outcome], count)
        yield forwarded

    def _kept(self) -> Mapping[str, int]:
        try:
            return self.store.counts()
        except StoreError:
            return {}
