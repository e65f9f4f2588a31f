"""Settings of the scaler's process, read once; a bad value or a misspelt key stops the start with its reason."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from scaler.errors import SettingsError

KUBERNETES = "kubernetes"
KEYS = (
    *("SCALER_HOST", "SCALER_PORT", "SCALER_METRICS_PORT", "SCALER_REPLICAS", "SCALER_POLL_MS", "SCALER_FORGET_MS"),
    *("SCALER_MAX_TRIGGERS", "SCALER_MAX_STREAMS", "SCALER_DRAIN_MS", "SCALER_POWER_NODES"),
    *("SCALER_TLS_CERT_FILE", "SCALER_TLS_KEY_FILE", "SCALER_TLS_CLIENT_CA_FILE"),
)
# Kubernetes announces a Service named `scaler` as SCALER_PORT=tcp://10.1.2.3:6000, SCALER_SERVICE_HOST, …
_SERVICE_LINK = re.compile(r"SCALER_(.*_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_SERVICE_PORT = re.compile(r"(tcp|udp|sctp)://\S+")


@dataclass(frozen=True)
class Tls:
    """PEM files; they may be replaced while the scaler runs. With `client_ca`, clients must show a certificate."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class Settings:
    """`replicas` is `kubernetes`, or a file or address that says which replicas there are (see `replicas`).

    `power_nodes`: label selector of the nodes whose power bounds the replicas; empty: none are asked.
    Port 0 takes a free one. A trigger is forgotten when nobody asked for it for `forget_s`.
    """

    host: str = "[::]"
    port: int = 6000
    metrics_port: int = 6001
    replicas: str = KUBERNETES
    power_nodes: str = ""
    poll_s: float = 5.0
    forget_s: float = 600.0
    max_triggers: int = 64
    max_streams: int = 64
    drain_s: float = 10.0
    tls: Tls | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the settings; raises `SettingsError` with the key."""
        values = _Values(environment)
        values.check_names()
        return cls(
            host=values.text("SCALER_HOST", cls.host),
            port=values.integer("SCALER_PORT", cls.port, 0, 65535),
            metrics_port=values.integer("SCALER_METRICS_PORT", cls.metrics_port, 0, 65535),
            replicas=values.text("SCALER_REPLICAS", cls.replicas),
            power_nodes=values.text("SCALER_POWER_NODES", cls.power_nodes),
            poll_s=values.integer("SCALER_POLL_MS", int(cls.poll_s * 1000), 50, 600_000) / 1000,
            forget_s=values.integer("SCALER_FORGET_MS", int(cls.forget_s * 1000), 1000, 86_400_000) / 1000,
            max_triggers=values.integer("SCALER_MAX_TRIGGERS", cls.max_triggers, 1, 1024),
            max_streams=values.integer("SCALER_MAX_STREAMS", cls.max_streams, 1, 1024),
            drain_s=values.integer("SCALER_DRAIN_MS", int(cls.drain_s * 1000), 0, 600_000) / 1000,
            tls=values.tls(),
        )


@dataclass(frozen=True)
class _Values:
    """An empty value counts as absent."""

    values: Mapping[str, str]

    def check_names(self) -> None:
        for key in sorted(self.values):
            if key.startswith("SCALER_") and key not in KEYS and not _SERVICE_LINK.fullmatch(key):
                raise SettingsError(f"{key} is not a setting of the scaler; known are {', '.join(KEYS)}")

    def text(self, key: str, default: str) -> str:
        return self.values.get(key, "").strip() or default

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        text = self.text(key, "")
        if not text or (key.endswith("PORT") and _SERVICE_PORT.fullmatch(text)):
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or not value.is_integer():
            raise SettingsError(f"{key} is '{text}'; it must be a whole number from {low} to {high}")
        return int(value)

    def tls(self) -> Tls | None:
        certificate, key = self._file("SCALER_TLS_CERT_FILE"), self._file("SCALER_TLS_KEY_FILE")
        client_ca = self._file("SCALER_TLS_CLIENT_CA_FILE")
        if certificate and key:
            return Tls(certificate, key, client_ca)
        if certificate or key or client_ca:
            raise SettingsError("SCALER_TLS_CERT_FILE and SCALER_TLS_KEY_FILE must be set together")
        return None

    def _file(self, key: str) -> Path | None:
        text = self.text(key, "")
        if not text:
            return None
        path = Path(text)
        if not path.is_file():
            raise SettingsError(f"{key} is '{text}', and there is no such file")
        return path
