"""A store in this process's memory; it ends with the process."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from functions.dispatcher.cache.store import Bounds, Entry, Held

Postings = dict[int, dict[str, float]]


@dataclass
class _Tenant:
    """One tenant's answers by key, the longest unused first, and where each feature occurs, by scope."""

    entries: dict[str, Entry] = field(default_factory=dict)
    postings: dict[str, Postings] = field(default_factory=dict)
    bytes: int = 0


class MemoryStore:
    """An `AnswerStore` of dictionaries; each tenant has its own."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._tenants: dict[str, _Tenant] = {}
        self._lock = threading.Lock()

    def put(self, entry: Entry) -> bool:
        """Keep an answer."""
        if entry.size_bytes > self._bounds.bytes or not self._bounds.entries:
            return False
        with self._lock:
            self._remove(entry.tenant, entry.key)
            while self._held().entries >= self._bounds.entries:
                self._evict(lambda tenant: len(tenant.entries))
            while self._held().bytes + entry.size_bytes > self._bounds.bytes:
                self._evict(lambda tenant: tenant.bytes)
            tenant = self._tenants.setdefault(entry.tenant, _Tenant())
            tenant.entries[entry.key] = entry
            tenant.bytes += entry.size_bytes
            for feature, weight in entry.features.items():
                tenant.postings.setdefault(entry.scope, {}).setdefault(feature, {})[entry.key] = weight
        return True

    def get(self, tenant: str, key: str, now_s: float) -> Entry | None:
        """The answer to a request."""
        with self._lock:
            return self._used(tenant, key, now_s)

    def nearest(
        self, tenant: str, scope: str, features: Mapping[int, float], now_s: float
    ) -> tuple[Entry, float] | None:
        """The answer to the question most like one."""
        with self._lock:
            own = self._tenants.get(tenant, _Tenant())
            alike: defaultdict[str, float] = defaultdict(float)
            for feature, weight in features.items():
                for key, other in own.postings.get(scope, {}).get(feature, {}).items():
                    if now_s < own.entries[key].expires_s:
                        alike[key] += weight * other
            if not alike:
                return None
            best = max(sorted(alike), key=alike.__getitem__)
            entry = self._used(tenant, best, now_s)
            return (entry, alike[best]) if entry else None

    def forget(self, tenant: str, conversation: str) -> int:
        """Delete what came of a conversation."""
        with self._lock:
            entries = self._tenants.get(tenant, _Tenant()).entries.values()
            keys = [entry.key for entry in entries if conversation and entry.conversation == conversation]
            for key in keys:
                self._remove(tenant, key)
            return len(keys)

    def purge(self, now_s: float) -> int:
        """Delete what has expired."""
        with self._lock:
            entries = (entry for tenant in self._tenants.values() for entry in tenant.entries.values())
            expired = [(entry.tenant, entry.key) for entry in entries if entry.expires_s <= now_s]
            for tenant, key in expired:
                self._remove(tenant, key)
            return len(expired)

    def held(self) -> Held:
        """How much there is."""
        with self._lock:
            return self._held()

    def _held(self) -> Held:
        tenants = self._tenants.values()
        return Held(sum(len(tenant.entries) for tenant in tenants), sum(tenant.bytes for tenant in tenants))

    def _used(self, tenant: str, key: str, now_s: float) -> Entry | None:
        own = self._tenants.get(tenant)
        entry = own.entries.get(key) if own else None
        if own is None or entry is None or entry.expires_s <= now_s:
            return None
        own.entries[key] = own.entries.pop(key)  # to the end: used last
        return entry

    def _evict(self, size: Callable[[_Tenant], int]) -> None:
        largest = max(self._tenants, key=lambda name: (size(self._tenants[name]), name))
        self._remove(largest, next(iter(self._tenants[largest].entries)))

    def _remove(self, tenant: str, key: str) -> None:
        own = self._tenants.get(tenant)
        entry = own.entries.pop(key, None) if own else None
        if own is None or entry is None:
            return
        own.bytes -= entry.size_bytes
        postings = own.postings.get(entry.scope, {})
        for feature in entry.features:
            del postings[feature][key]
            if not postings[feature]:
                del postings[feature]
        if not postings:
            own.postings.pop(entry.scope, None)
        if not own.entries:
            del self._tenants[tenant]
