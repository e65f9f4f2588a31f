"""What a request cost so far: time by part, bytes between the sites, joules; over all tiers that were asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from functions.dispatcher.exchange import Traffic
from functions.serving.ask import Clocked
from functions.serving.events import Joules, NetworkBytes, Report, Timing


@dataclass
class Entry:
    """One call of a tier. `began` on the dispatcher's clock; `report` as soon as the tier has sent it."""

    tier: str
    began: float
    traffic: Traffic = field(default_factory=Traffic)
    report: Report | None = None


class Ledger:
    """The exchanges of one request, and their sums."""

    def __init__(self, clocked: Clocked, clock: Callable[[], float]) -> None:
        self._clocked = clocked
        self._clock = clock
        self._entries: list[Entry] = []
        self._first_token: float | None = None
        self._last: Entry | None = None

    def open(self, tier: str) -> Entry:
        """Begin an exchange; its client counts into its traffic."""
        self._entries.append(Entry(tier, self._clock()))
        return self._entries[-1]

    def first_token(self) -> None:
        """The first token of a stream is here."""
        self._first_token = self._clock()

    def close(self, entry: Entry, report: Report) -> None:
        """An exchange has its report; the one closed last gave the answer."""
        entry.report = report
        self._last = entry

    def totals(self) -> dict[str, Any]:
        """The sums as fields of a `Report`."""
        reports = [entry.report for entry in self._entries if entry.report is not None]
        timing = Timing(
            total=1e3 * (self._clock() - self._clocked.started),
            queue=1e3 * self._clocked.queued_s + sum(report.timing_ms.queue for report in reports),
            network=sum(self._network_ms(entry) for entry in self._entries),
            prefill=sum(report.timing_ms.prefill for report in reports),
            decode=sum(report.timing_ms.decode for report in reports),
            first_token=self._first_token_ms(),
        )
        return {"timing_ms": timing, "network_bytes": self._bytes(), "joules": _joules(reports)}

    def _network_ms(self, entry: Entry) -> float:
        """Time on the way to the edge and back: what it took, less what the edge says it needed."""
        if entry.tier != "edge":
            return 0.0
        ended = entry.traffic.seconds or self._clock() - entry.began
        worked_ms = entry.report.timing_ms.total if entry.report else 0.0
        return max(0.0, 1e3 * ended - worked_ms)

    def _first_token_ms(self) -> float:
        """When the first token of the answer was there: seen in a stream, else as its tier tells."""
        if self._first_token is not None:
            return 1e3 * (self._first_token - self._clocked.started)
        if self._last is None or self._last.report is None:
            return 0.0
        return 1e3 * (self._last.began - self._clocked.started) + self._last.report.timing_ms.first_token

    def _bytes(self) -> NetworkBytes:
        edge = [entry.traffic for entry in self._entries if entry.tier == "edge"]
        return NetworkBytes(sent=sum(t.sent for t in edge), received=sum(t.received for t in edge))


def _joules(reports: list[Report]) -> Joules | None:
    spent = [report.joules for report in reports if report.joules is not None]
    if not spent:
        return None
    names = dict.fromkeys(one.source for one in spent)
    return Joules(value=sum(one.value for one in spent), kind=spent[0].kind, source="; ".join(names))
