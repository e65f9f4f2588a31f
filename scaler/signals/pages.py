"""Signals straight from `/metrics` pages, where there is no Prometheus; the window's samples are kept here."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence

import httpx
from prometheus_client.parser import text_string_to_metric_families

from scaler import fetch
from scaler.errors import SourceError
from scaler.replicas import Replica
from scaler.signals.series import Sample, Series, Window
from scaler.signals.source import FUNCTION, GATEWAY, gateway_name
from scaler.trigger import REPLICAS, Trigger

MOST_SERIES = 20_000
_PATH = "/metrics"

Key = tuple[str, str, tuple[tuple[str, str], ...]]
"""Page, name, labels."""


class PageSource:
    """Reads a trigger's pages at each look, and remembers what it saw for as long as the window.

    Pages of replicas may fail: what is left counts, for a replica that just ended, or is too busy to say how busy it
    is, is no reason to know nothing. If nothing is left, or a page that is not a replica's fails, that is an error.
    `names` are the series of a function that are kept.
    """

    def __init__(self, client: httpx.Client, trigger: Trigger, names: Collection[str] = FUNCTION) -> None:
        self._client, self._names = client, frozenset(names)
        self._trigger = trigger
        self._gateway_name = gateway_name(trigger.function, trigger.namespace)
        self._kept: dict[Key, deque[Sample]] = {}
        self._previous_s: float | None = None

    def read(self, replicas: Sequence[Replica], now_s: float) -> Window:
        """Read every page once; raises `SourceError`."""
        own = [r.address for r in replicas if r.ready and r.address] if REPLICAS in self._trigger.pages else []
        others = [page for page in self._trigger.pages if page != REPLICAS]
        if not own and not others:
            raise SourceError(f"no replica of '{self._trigger.function}' is ready, and no other page is named")
        for page in others:
            self._look(page, now_s)
        failures = [failure for page in own if (failure := self._try(page, now_s))]
        if failures and len(failures) == len(own) and not others:
            raise failures[0]
        self._forget(now_s - self._trigger.window_s)
        series = [Series(name, dict(labels), tuple(kept)) for (_, name, labels), kept in self._kept.items()]
        previous_s, self._previous_s = self._previous_s, now_s
        return Window(series, missed=0.0, previous_s=previous_s)

    def _try(self, page: str, now_s: float) -> SourceError | None:
        try:
            self._look(page, now_s)
        except SourceError as error:
            return error
        return None

    def _look(self, page: str, now_s: float) -> None:
        url = page if page.endswith(_PATH) else page + _PATH
        for name, labels, value in _parsed(fetch.text(self._client, url, "a page of metrics"), self._names):
            if name in GATEWAY and labels.get("function_name") != self._gateway_name:
                continue
            key = page, name, tuple(sorted(labels.items()))
            if key not in self._kept and len(self._kept) >= MOST_SERIES:
                raise SourceError(f"the pages have more than {MOST_SERIES} series of ours")
            self._kept.setdefault(key, deque()).append((now_s, value))

    def _forget(self, before_s: float) -> None:
        """Keep one sample from before the window, so that all of it is spanned; drop series that ended before it."""
        for key, kept in list(self._kept.items()):
            while len(kept) > 1 and kept[1][0] <= before_s:
                kept.popleft()
            if kept[-1][0] < before_s:
                del self._kept[key]


def _parsed(text: str, names: Collection[str]) -> Iterator[tuple[str, dict[str, str], float]]:
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                # The parser puts `_total` to the gateway's counter that has none.
                name = family.name if family.name in GATEWAY else sample.name
                if (name in names or name in GATEWAY) and math.isfinite(sample.value):
                    yield name, dict(sample.labels), float(sample.value)
    except (ValueError, IndexError, KeyError) as error:
        raise SourceError("a page of metrics is not in Prometheus' text format; is that its address?") from error
