"""The federation's settings."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from functions.federation.state.log import Bounds
from functions.serving.settings import Common, ConfigError, Environment

MAX_NODES = 64
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


@dataclass(frozen=True)
class FederationConfig:
    """Whom to ask, when a vote counts, and where what is shared is kept.

    `quorum` None: more than half of the nodes. `state_path` None: in memory, where a restart loses it. `redis_url`
    empty: the shared log is an SQLite file, this node's alone. `edge_url` empty: nothing can be deferred. `trusted`:
    whose certificates nodes and edge may have; None: the system's authorities.
    """

    nodes: Mapping[str, str]
    quorum: int | None = None
    edge_url: str = ""
    state_path: Path | None = None
    redis_url: str = field(default="", repr=False)
    mqtt_url: str = field(default="", repr=False)
    bounds: Bounds = field(default_factory=Bounds)
    deferred_limit: int = 1000
    trusted: ssl.SSLContext | None = None
    common: Common = field(default_factory=Common)

    @property
    def votes_needed(self) -> int:
        """The quorum in votes."""
        return self.quorum or len(self.nodes) // 2 + 1

    @classmethod
    def from_environment(cls, values: Mapping[str, str]) -> Self:
        """Read `values`; raises `ConfigError` naming the key."""
        environment = Environment(values)
        environment.check_names()
        nodes = _nodes(environment)
        path = environment.text("FEDERATION_STATE_PATH", "")
        bounds = Bounds()
        given = bool(values.get("FEDERATION_QUORUM", "").strip())
        return cls(
            nodes=nodes,
            quorum=environment.integer("FEDERATION_QUORUM", 1, 1, len(nodes)) if given else None,
            edge_url=environment.address("EDGE_URL") if values.get("EDGE_URL", "").strip() else "",
            state_path=Path(path) if path else None,
            redis_url=_server(environment, "FEDERATION_REDIS_URL", "redis", "rediss"),
            mqtt_url=_server(environment, "FEDERATION_MQTT_URL", "mqtt", "mqtts"),
            bounds=Bounds(
                max_events=environment.integer("FEDERATION_MAX_EVENTS", bounds.max_events, 1, 1_000_000),
                retention_s=environment.number("FEDERATION_RETENTION_S", bounds.retention_s, 1, 31_536_000),
            ),
            deferred_limit=environment.integer("FEDERATION_DEFERRED_LIMIT", cls.deferred_limit, 1, 1_000_000),
            trusted=environment.trusted(),
            common=Common.read(environment, max_inflight=16),
        )


def _nodes(environment: Environment) -> dict[str, str]:
    """`name=url` pairs, separated by commas."""
    key = "FEDERATION_NODES"
    nodes: dict[str, str] = {}
    for pair in environment.text(key).split(","):
        name, _, url = (part.strip() for part in pair.partition("="))
        if not _NAME.match(name) or not url:
            raise ConfigError(f"{key} must look like name=http://host:port,name=…; names are letters, digits, . _ -")
        if name in nodes:
            raise ConfigError(f"{key} names '{name}' twice; each node has one vote")
        nodes[name] = Environment({key: url}).address(key)
    if len(nodes) > MAX_NODES:
        raise ConfigError(f"{key} names {len(nodes)} nodes; at most {MAX_NODES} can be asked at once")
    return nodes


def _server(environment: Environment, key: str, plain: str, secure: str) -> str:
    """The address of a server, empty if there is none; errors do not repeat it, it may hold a password."""
    value = environment.text(key, "")
    try:
        parts = urlsplit(value)
        usable = parts.scheme in {plain, secure} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if value and not usable:
        raise ConfigError(f"{key} must look like {plain}://host:port or {secure}://user:password@host:port")
    return value
