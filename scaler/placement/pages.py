"""Shards' metrics by the node they run on: straight from their pages, or out of Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import httpx

from scaler.errors import SourceError
from scaler.placement.watch import NAMES, Placed
from scaler.signals.pages import PageSource
from scaler.signals.prometheus import PrometheusSource
from scaler.signals.series import Window
from scaler.trigger import Trigger, parse

_AT_ONCE = 16


def trigger(function: str, namespace: str, window_s: float, prometheus: str = "") -> Trigger:
    """What the signals are read for; raises `MetadataError`."""
    place = {"prometheusAddress": prometheus} if prometheus else {"metricsAddress": "replicas"}
    return parse({"function": function, "sloSeconds": "1", "windowSeconds": f"{window_s:g}", **place}, namespace)


@dataclass
class ShardPages:
    """Asks each shard itself, all at the same time; one that does not answer is not heard of."""

    client: httpx.Client
    trigger: Trigger
    _sources: dict[str, PageSource] = field(default_factory=dict)

    def read(self, shards: Sequence[Placed], now_s: float) -> Mapping[str, Window]:
        """Read every page once."""
        known = [shard for shard in shards if shard.address]
        self._sources = {s.address: self._sources.get(s.address) or self._source(s.address) for s in known}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            windows = list(pool.map(lambda shard: self._read(shard.address, now_s), known))
        return {shard.node: window for shard, window in zip(known, windows, strict=True) if window is not None}

    def _source(self, address: str) -> PageSource:
        return PageSource(self.client, replace(self.trigger, pages=(address,)), NAMES)

    def _read(self, address: str, now_s: float) -> Window | None:
        try:
            return self._sources[address].read([], now_s)
        except SourceError:
            return None


@dataclass(frozen=True)
class PrometheusPages:
    """One query for all shards, told apart by `node_id`; a node not scraped for `stale_s` is not heard of."""

    source: PrometheusSource
    stale_s: float

    @classmethod
    def of(cls, client: httpx.Client, wanted: Trigger, names: Sequence[str]) -> PrometheusPages:
        """Of the functions of these names."""
        selector = f'faas_function=~"{"|".join(names)}"'
        return cls(PrometheusSource(client, replace(wanted, selector=selector), NAMES), wanted.stale_s)

    def read(self, shards: Sequence[Placed], now_s: float) -> Mapping[str, Window]:
        """Ask once; raises `SourceError`, for a Prometheus that is away says nothing of the shards."""
        whole = self.source.read([], now_s)
        nodes = {shard.node for shard in shards}
        windows = {node: Window([s for s in whole.series if s.labels.get("node_id") == node]) for node in nodes}
        return {node: w for node, w in windows.items() if w.newest_s is not None and now_s - w.newest_s <= self.stale_s}
