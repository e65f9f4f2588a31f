"""The cache's settings; without any nothing is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from functions.dispatcher.cache.answers import AnswerCache, CacheRules
from functions.dispatcher.cache.memory import MemoryStore
from functions.dispatcher.cache.sqlite import SqliteStore
from functions.dispatcher.cache.store import Bounds
from functions.serving.settings import Environment

_YEAR_S = 366 * 86_400


@dataclass(frozen=True)
class CacheConfig:
    """`entries`: how many answers are kept at most, 0: none. `path`: the file they are kept in, None: in memory."""

    entries: int = 0
    path: Path | None = None
    rules: CacheRules = field(default_factory=CacheRules)

    @classmethod
    def read(cls, environment: Environment) -> Self:
        """Read the environment; raises `ConfigError` naming the key."""
        path = environment.text("CACHE_PATH", "")
        alike_above = environment.number("CACHE_ALIKE_ABOVE", 0, 0, 1)
        return cls(
            entries=environment.integer("CACHE_ENTRIES", cls.entries, 0, 1_000_000),
            path=Path(path) if path else None,
            rules=CacheRules(
                retention_s=environment.number("CACHE_RETENTION_S", CacheRules.retention_s, 1, _YEAR_S),
                alike_above=alike_above or None,
            ),
        )

    def open(self) -> AnswerCache | None:
        """The cache, or None; raises `ConfigError` where the file cannot be made."""
        if not self.entries:
            return None
        bounds = Bounds(entries=self.entries)
        return AnswerCache(SqliteStore(self.path, bounds) if self.path else MemoryStore(bounds), self.rules)
