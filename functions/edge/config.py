"""The settings of a shard; the rest is as in every function that holds a tier."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from functions.edge.wire import Encoding
from functions.serving.settings import ConfigError, Environment

_LAYERS = re.compile(r"(\d{1,4})-(\d{1,4})")
_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_TLS = ("SHARD_TLS_CERT", "SHARD_TLS_KEY", "SHARD_TLS_CA")


@dataclass(frozen=True)
class TlsSettings:
    """Files in PEM, read anew when they change; and who may be at the other end, by SPIFFE id."""

    certificate: Path
    key: Path
    authority: Path
    peers: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """What a shard and a rank have in common.

    `listen` is the port for who calls, on loopback only without `tls`. `kv_bytes` bounds what keys and values may take;
    a session that is silent for `idle_s` is ended. With `spin` the engine's threads wait busily in a pass. `line` is
    the port for lines beside sessions' streams, 0: a free one, None: there are none.
    """

    listen: int = 5051
    spin: bool = False
    kv_bytes: int = 512 << 20
    idle_s: float = 60.0
    line: int | None = 0
    tls: TlsSettings | None = None

    @classmethod
    def read(cls, environment: Environment) -> LinkConfig:
        """Read the settings; raises `ConfigError`."""
        tls = _tls(environment)
        return LinkConfig(
            listen=environment.integer("SHARD_LISTEN", cls.listen, 0, 65535),
            spin=bool(environment.integer("SHARD_SPIN", cls.spin, 0, 1)),
            kv_bytes=environment.integer("SHARD_KV_MB", cls.kv_bytes >> 20, 1, 1 << 20) << 20,
            idle_s=environment.number("SHARD_IDLE_MS", cls.idle_s * 1e3, 100, 3_600_000) / 1e3,
            line=_line(environment, tls),
            tls=tls,
        )


@dataclass(frozen=True)
class ShardConfig(LinkConfig):
    """One shard: its layers, and where replicas of those that come after listen, `host:port` each.

    Sessions share passes in so many `groups`; 0: one for each shard of the model.
    """

    layers: range
    next: tuple[str, ...] = ()
    states: Encoding = Encoding.FP32
    groups: int = 0

    @property
    def is_head(self) -> bool:
        """Whether it embeds, and so talks HTTP."""
        return self.layers.start == 0

    @classmethod
    def from_environment(cls, values: Mapping[str, str]) -> Self | None:
        """Read `values`; None where SHARD_LAYERS is not set: then the tier is whole. Raises `ConfigError`."""
        environment = Environment(values)
        text = environment.text("SHARD_LAYERS", "")
        if not text:
            return None
        link, after = LinkConfig.read(environment), environment.text("SHARD_NEXT", "")
        return cls(
            layers=_layers(text),
            next=tuple(address("SHARD_NEXT", part.strip(), link.tls) for part in after.split(",") if part),
            states=Encoding[
                environment.choices("SHARD_STATES", ("fp32",), [e.name.lower() for e in Encoding])[0].upper()
            ],
            groups=environment.integer("SHARD_GROUPS", cls.groups, 0, 64),
            **vars(link),
        )


def _line(environment: Environment, tls: TlsSettings | None) -> int | None:
    """Between machines a port must be let through, so it must be named there."""
    if environment.text("SHARD_LINE", "off" if tls else "0") == "off":
        return None
    return environment.integer("SHARD_LINE", 0, 0, 65535)


def _layers(text: str) -> range:
    found = _LAYERS.fullmatch(text)
    if not found or int(found[1]) > int(found[2]):
        raise ConfigError(f"SHARD_LAYERS is '{text}'; it must be the first and the last layer, such as 0-7")
    return range(int(found[1]), int(found[2]) + 1)


def address(key: str, text: str, tls: TlsSettings | None) -> str:
    """Check an address, `host:port`; raises `ConfigError`, which names the `key`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{key} must list addresses like host:port, separated by commas")
    if tls is None and not is_loopback(host):
        raise ConfigError(f"{key} names another machine, and plain links stay on loopback; set SHARD_TLS_CERT")
    return text


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _tls(environment: Environment) -> TlsSettings | None:
    paths = {key: environment.text(key, "") for key in _TLS}
    peers = [peer.strip() for peer in environment.text("SHARD_PEERS", "").split(",") if peer.strip()]
    if not any(paths.values()) and not peers:
        return None
    missing = next((key for key, path in paths.items() if not path), None)
    if missing:
        raise ConfigError(f"{missing} is not set; links with TLS need {', '.join(_TLS)} and SHARD_PEERS")
    for name, path in paths.items():
        if not Path(path).is_file():
            raise ConfigError(f"{name} names a file that is not there")
    if not peers or not all(_SPIFFE_ID.fullmatch(peer) for peer in peers):
        raise ConfigError("SHARD_PEERS must list the SPIFFE ids of the other shards, such as spiffe://site/edge")
    certificate, key, authority = (Path(path) for path in paths.values())
    return TlsSettings(certificate, key, authority, frozenset(peers))
