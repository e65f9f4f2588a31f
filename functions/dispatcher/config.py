"""The dispatcher's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from functions.serving.settings import Common, Environment


@dataclass(frozen=True)
class DispatcherConfig:
    """Where the tiers are and when to trust the first one.

    `confidence_threshold` None: the device's calibrated one. `edge_timeout_s`: the longest the edge is waited for,
    whatever the deadline.
    """

    device_url: str
    edge_url: str
    confidence_threshold: float | None = None
    edge_timeout_s: float = 30.0
    common: Common = field(default_factory=Common)

    @classmethod
    def from_environment(cls, values: Mapping[str, str]) -> Self:
        """Read `values`; raises `ConfigError` naming the key."""
        environment = Environment(values)
        environment.check_names()
        given = bool(values.get("CONFIDENCE_THRESHOLD", "").strip())
        return cls(
            device_url=environment.address("DEVICE_URL"),
            edge_url=environment.address("EDGE_URL"),
            confidence_threshold=environment.number("CONFIDENCE_THRESHOLD", 0, 0, 1) if given else None,
            edge_timeout_s=environment.number("EDGE_TIMEOUT_MS", cls.edge_timeout_s * 1e3, 1, 600_000) / 1e3,
            common=Common.read(environment, max_inflight=64),
        )
