"""The dispatcher's settings."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from functions.dispatcher.cache.config import CacheConfig
from functions.dispatcher.policy_file import PolicySource
from functions.dispatcher.power import PowerConfig
from functions.serving.settings import Common, Environment


@dataclass(frozen=True)
class DispatcherConfig:
    """Where the tiers are, where the policy comes from, and where power is read.

    `edge_timeout_s`: the longest the edge is waited for, whatever the deadline. `rules_file` and `messages_file` say
    what is answered without a model; None: no rules, and the messages that we ship. `cache`: answers given before.
    `trusted`: whose certificates the tiers may have; None: the system's authorities.
    """

    device_url: str
    edge_url: str
    policy: PolicySource = field(default_factory=PolicySource)
    power: PowerConfig = field(default_factory=PowerConfig)
    edge_timeout_s: float = 30.0
    rules_file: Path | None = None
    messages_file: Path | None = None
    cache: CacheConfig = field(default_factory=CacheConfig)
    trusted: ssl.SSLContext | None = None
    common: Common = field(default_factory=Common)

    @classmethod
    def from_environment(cls, values: Mapping[str, str]) -> Self:
        """Read `values`; raises `ConfigError` naming the key."""
        environment = Environment(values)
        environment.check_names()
        return cls(
            device_url=environment.address("DEVICE_URL"),
            edge_url=environment.address("EDGE_URL"),
            policy=PolicySource.read(values),
            power=PowerConfig.from_environment(values),
            edge_timeout_s=environment.number("EDGE_TIMEOUT_MS", cls.edge_timeout_s * 1e3, 1, 600_000) / 1e3,
            rules_file=_path(environment, "RULES_FILE"),
            messages_file=_path(environment, "MESSAGES_FILE"),
            cache=CacheConfig.read(environment),
            trusted=environment.trusted(),
            common=Common.read(environment, max_inflight=64),
        )


def _path(environment: Environment, key: str) -> Path | None:
    text = environment.text(key, "")
    return Path(text) if text else None
