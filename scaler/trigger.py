"""A KEDA trigger's metadata, read once into a frozen value; what is wrong is said with its key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from scaler.errors import MetadataError
from scaler.values import Target

REPLICAS = "replicas"
"""As `metricsAddress`: the pages of the function's own replicas."""

_OWN = (
    *("function", "namespace", "sloSeconds", "percentile", "minReplicas", "maxReplicas", "coldStartSeconds", "slots"),
    *("prometheusAddress", "metricsAddress", "gatewayAddress", "selector", "windowSeconds", "staleSeconds"),
    "tolerance",
)
# KEDA's own keys of this trigger: they reach us along with ours.
_KEDAS = frozenset({"scalerAddress", "enableTLS", "unsafeSsl", "caCert", "tlsClientCert", "tlsClientKey", "metricType"})
_MOST_KEYS, _LONGEST_VALUE = 64, 2048
_MOST_PAGES = 32
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_MATCHER = r'[a-zA-Z_][a-zA-Z0-9_]*(=|!=|=~|!~)"[^"\\{}]*"'
_SELECTOR = re.compile(rf"{_MATCHER}(,{_MATCHER})*")


@dataclass(frozen=True)
class Trigger:
    """What one ScaledObject wants: a function, its target, and where its signals are.

    Either `prometheus` is an address, or `pages` are those of `/metrics` (with `REPLICAS` among them: each replica's).
    """

    function: str
    namespace: str
    target: Target
    prometheus: str
    pages: tuple[str, ...]
    selector: str
    window_s: float
    stale_s: float
    tolerance: float

    @property
    def metric_name(self) -> str:
        """The one name of the metric, for its specification and its values alike."""
        return f"edgecascade-{self.function}-replicas"


def parse(metadata: Mapping[str, str], namespace: str) -> Trigger:
    """Read `scalerMetadata`; `namespace` is the ScaledObject's own. Raises `MetadataError`."""
    keys = _Keys(metadata)
    keys.check()
    function = keys.name("function", "")
    minimum = keys.integer("minReplicas", 1, 0, 1000)
    maximum = keys.integer("maxReplicas", 5, 1, 1000)
    if minimum > maximum:
        raise MetadataError("minReplicas", f"is {minimum}, above maxReplicas, which is {maximum}")
    prometheus, pages = _sources(keys)
    window_s = keys.number("windowSeconds", 60, 2, 3600)
    return Trigger(
        function=function,
        namespace=keys.name("namespace", namespace),
        target=Target(
            slo_s=keys.number("sloSeconds", None, 0.001, 3600),
            percentile=keys.percentile("percentile", 0.95),
            minimum=minimum,
            maximum=maximum,
            cold_start_s=keys.number("coldStartSeconds", Target.cold_start_s, 0, 3600),
            slots=keys.integer("slots", Target.slots, 1, 1024),
        ),
        prometheus=prometheus,
        pages=pages,
        selector=keys.matched("selector", f'faas_function="{function}"', _SELECTOR, 'labels like app="edge",zone="a"'),
        window_s=window_s,
        stale_s=keys.number("staleSeconds", 30, 0.1, 600),
        tolerance=keys.number("tolerance", 0.1, 0, 1),
    )


def _sources(keys: _Keys) -> tuple[str, tuple[str, ...]]:
    """(Prometheus' address, pages): exactly one of both is there."""
    prometheus = keys.address("prometheusAddress")
    named = [part.strip() for part in keys.text("metricsAddress", "").split(",") if part.strip()]
    if bool(prometheus) == bool(named):
        raise MetadataError("prometheusAddress", "or metricsAddress must be there, and not both")
    if prometheus:
        return prometheus, ()
    if len(named) > _MOST_PAGES:
        raise MetadataError("metricsAddress", f"has {len(named)} addresses; at most {_MOST_PAGES}")
    pages = [page if page == REPLICAS else address("metricsAddress", page) for page in named]
    gateway = keys.address("gatewayAddress")
    return "", (*pages, *([gateway] if gateway else []))


def address(key: str, value: str) -> str:
    """An http(s) address without user, query or closing slash; errors do not repeat it."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username or not value.isprintable() or " " in value:
        raise MetadataError(key, "must look like http://host:port or http://host:port/path")
    return value.rstrip("/")


@dataclass(frozen=True)
class _Keys:
    """Reads bounded values; an empty one counts as absent."""

    values: Mapping[str, str]

    def check(self) -> None:
        """Refuse too many keys, unknown ones and values that are too long."""
        if len(self.values) > _MOST_KEYS:
            raise MetadataError("metadata", f"has {len(self.values)} keys; at most {_MOST_KEYS}")
        for key, value in self.values.items():
            shown = key if len(key) <= 63 and key.isprintable() else "a key"  # noqa: PLR2004 - as long as a label
            if key not in _OWN and key not in _KEDAS:
                near = difflib.get_close_matches(shown, _OWN, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_OWN)}"
                raise MetadataError(shown, f"is not known; {hint}")
            if len(value) > _LONGEST_VALUE:
                raise MetadataError(key, f"is longer than {_LONGEST_VALUE} characters")

    def text(self, key: str, default: str) -> str:
        return self.values.get(key, "").strip() or default

    def name(self, key: str, default: str) -> str:
        """A name of Kubernetes: a DNS label (RFC 1123)."""
        return self.matched(key, default, _LABEL, "a name of small letters, digits and '-', at most 63 of them")

    def matched(self, key: str, default: str, pattern: re.Pattern[str], wanted: str) -> str:
        value = self.text(key, default)
        if not pattern.fullmatch(value):
            raise MetadataError(key, f"must be {wanted}" if value else "is not set")
        return value

    def address(self, key: str) -> str:
        value = self.text(key, "")
        return address(key, value) if value else ""

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        text = self.text(key, str(default))
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise MetadataError(key, f"must be a whole number from {low} to {high}")
        return int(text)

    def number(self, key: str, default: float | None, low: float, high: float) -> float:
        text = self.text(key, "" if default is None else str(default))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise MetadataError(key, f"must be a number from {low:g} to {high:g}" if text else "is not set")
        return value

    def percentile(self, key: str, default: float) -> float:
        """From 0 to 1, or per cent."""
        value = self.number(key, default, 0.01, 99.99)
        value = value / 100 if value >= 1 else value
        if not 0.01 <= value <= 0.9999:  # noqa: PLR2004 - the bounds that the message names
            raise MetadataError(key, "must lie from 0.01 to 0.9999, or from 1 to 99.99 as per cent")
        return value
