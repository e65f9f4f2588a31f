"""The environment, read once into frozen values. A bad value or a misspelt key stops the start with its reason."""

from __future__ import annotations

import math
import re
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from functions.serving.api_keys import ApiKeys
from functions.serving.secrets import SecretError
from models.runtime.providers import CPU, PROVIDERS
from models.runtime.tier import NO_EXIT, TUNED_EXITS

COMMON_KEYS = (
    "NODE_ID",
    "SHARD_ID",
    "MAX_BODY_BYTES",
    "MAX_INFLIGHT",
    "QUEUE_LIMIT",
    "DEADLINE_MS",
    "DEFAULT_SKILL",
    "API_KEY_FILE",
    "LINGER_S",
)
TIER_KEYS = (
    "MODEL_PATH",
    "MODEL_KEY_FILE",
    "MODEL_KEY",
    "MODEL_KMS_KEY_ID",
    "MODEL_PUBLIC_KEY",
    "TIER_NAME",
    "THREADS",
    "PREFIX_CACHE_MB",
    "LOOKUP_TOKENS",
    "EXACT_DRAFTS",
    "EXECUTION_PROVIDERS",
    "EXIT_THRESHOLD",
    "SLOWDOWN",
    "SLOWDOWN_FILE",
)
DISPATCHER_KEYS = (
    "DEVICE_URL",
    "EDGE_URL",
    "EDGE_TIMEOUT_MS",
    "CONFIDENCE_THRESHOLD",
    "RULES_FILE",
    "MESSAGES_FILE",
    "CACHE_ENTRIES",
    "CACHE_PATH",
    "CACHE_RETENTION_S",
    "CACHE_ALIKE_ABOVE",
)
CALLER_KEYS = ("CA_FILE",)
POWER_KEYS = (
    "POWER_SOURCES",
    "POWER_INTERVAL_MS",
    "POWER_SYSFS",
    "POWER_THERMAL_ZONES",
    "POWER_FILE",
    "POWER_TOPIC",
    "POWER_ENERGY_FILE",
    "POWER_INA219_CURVE",
    "POWER_INA219_CAPACITY_MAH",
    "POWER_INA219_START_LEVEL",
    "POWER_INA219_CHARGING_CURRENT",
    "POWER_INA219_BUS",
    "POWER_INA219_ADDRESS",
    "POWER_INA219_SHUNT_OHMS",
)
FEDERATION_KEYS = (
    "FEDERATION_NODES",
    "FEDERATION_QUORUM",
    "FEDERATION_STATE_PATH",
    "FEDERATION_REDIS_URL",
    "FEDERATION_MQTT_URL",
    "FEDERATION_MAX_EVENTS",
    "FEDERATION_RETENTION_S",
    "FEDERATION_DEFERRED_LIMIT",
)
SHARD_KEYS = (
    "SHARD_LAYERS",
    "SHARD_NEXT",
    "SHARD_LINE",
    "SHARD_LISTEN",
    "SHARD_STATES",
    "SHARD_SPIN",
    "SHARD_GROUPS",
    "SHARD_KV_MB",
    "SHARD_IDLE_MS",
    "SHARD_TLS_CERT",
    "SHARD_TLS_KEY",
    "SHARD_TLS_CA",
    "SHARD_PEERS",
    "TENSOR_RANK",
    "TENSOR_PEERS",
)
# Read by other parts of the bundle that run in the same environment.
FOREIGN_KEYS = (
    "DEVICE_KEY_FILE",
    "DEVICE_PUBLIC_KEY",
    "EDGECASCADE_HOME",
    "EDGE_EXACT_DRAFTS",
    "EDGE_EXECUTION_PROVIDERS",
    "EDGE_EXIT_THRESHOLD",
    "EDGE_KEY_FILE",
    "EDGE_LOOKUP_TOKENS",
    "EDGE_PREFIX_CACHE_MB",
    "EDGE_PUBLIC_KEY",
    "EDGE_THREADS",
)

_OURS = re.compile(
    r"^(API_KEY|CACHE_|CA_FILE|CONFIDENCE_|DEADLINE_|DEFAULT_SKILL|DEVICE_|EDGE_|EXACT_|EXECUTION_|EXIT_|FEDERATION_|LINGER_"
    r"|LOOKUP_|MAX_BODY|MAX_INFLIGHT|MESSAGES_|MODEL_(KEY|KMS|PATH|PUBLIC)|NODE_ID|POWER_|PREFIX_CACHE|QUEUE_LIMIT"
    r"|RULES_|SHARD_|SLOWDOWN|TENSOR_|THREADS|TIER_)"
)
_EXIT_WORDS = {"off": NO_EXIT, "tuned": TUNED_EXITS}
# Kubernetes announces each Service in the environment: one named `edge` gives EDGE_PORT, EDGE_SERVICE_HOST, …
_SERVICE_LINK = re.compile(r"^[A-Z0-9_]+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)$")


class ConfigError(Exception):
    """A setting is missing, misspelt or out of range; the message names its key."""


@dataclass(frozen=True)
class Environment:
    """Reads values out of a mapping such as `os.environ`; an empty value counts as absent."""

    values: Mapping[str, str]

    def check_names(self) -> None:
        """Raise `ConfigError` for a key that looks like ours and is not."""
        known = frozenset().union(
            *(
                COMMON_KEYS,
                TIER_KEYS,
                DISPATCHER_KEYS,
                CALLER_KEYS,
                FEDERATION_KEYS,
                POWER_KEYS,
                SHARD_KEYS,
                FOREIGN_KEYS,
            )
        )
        for key in sorted(self.values):
            if key not in known and _OURS.match(key) and not _SERVICE_LINK.match(key):
                raise ConfigError(f"{key} is not a setting of edgecascade; known are {', '.join(sorted(known))}")

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default it must be there."""
        value = self.values.get(key, "").strip() or default
        if value is None:
            raise ConfigError(f"{key} is not set; this function needs it")
        return value

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number between two bounds."""
        return int(self.number(key, default, low, high, whole=True))

    def number(self, key: str, default: float, low: float, high: float, *, whole: bool = False) -> float:
        """A number between two bounds."""
        text = self.values.get(key, "").strip()
        kind = "a whole number" if whole else "a number"
        try:
            value = (int(text) if whole else float(text)) if text else default
        except ValueError:
            raise ConfigError(f"{key} is '{text}'; it must be {kind} from {low} to {high}") from None
        if math.isnan(value) or not low <= value <= high:
            raise ConfigError(f"{key} is {value}; it must be {kind} from {low} to {high}")
        return value

    def choices(self, key: str, default: tuple[str, ...], known: Collection[str]) -> tuple[str, ...]:
        """Names out of `known`, separated by commas, in the order given."""
        names = tuple(name.strip() for name in self.text(key, ",".join(default)).split(","))
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise ConfigError(f"{key} names '{unknown}'; known are {', '.join(known)}, separated by commas")
        return names

    def api_keys(self) -> ApiKeys:
        """The keys that callers must bear, from the secret that `API_KEY_FILE` names; none if it is empty."""
        try:
            return ApiKeys.read(self.text("API_KEY_FILE", ""))
        except SecretError as error:
            raise ConfigError(str(error)) from None

    def trusted(self) -> ssl.SSLContext | None:
        """Whom our https calls trust: the authorities in `CA_FILE` alone; None if it is empty: the system's."""
        path = self.text("CA_FILE", "")
        try:
            return ssl.create_default_context(cafile=path) if path else None
        except (OSError, ValueError) as error:
            raise ConfigError(f"CA_FILE: '{path}' cannot be read, or holds no certificate in PEM form") from error

    def address(self, key: str) -> str:
        """An http(s) address without user, query or closing slash; errors do not repeat it."""
        value = self.text(key)
        try:
            parts = urlsplit(value)
            usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.query or parts.fragment or parts.username:
            raise ConfigError(f"{key} must look like http://host:port or http://host:port/path")
        return value.rstrip("/")


@dataclass(frozen=True)
class Common:
    """What every function is told. `deadline_s` is the longest a request may take; a caller can only shorten it.

    `linger_s`: how long a function that is told to stop goes on answering, until nobody sends it anything any more.
    """

    node_id: str = "local"
    shard_id: str = "whole"
    max_body_bytes: int = 1 << 20
    max_inflight: int = 4
    queue_limit: int = 16
    deadline_s: float = 55.0
    default_skill: str = "assistant"
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    linger_s: float = 0.0

    @classmethod
    def read(cls, environment: Environment, max_inflight: int) -> Self:
        """Read the common settings; `max_inflight` is the function's own default."""
        return cls(
            node_id=environment.text("NODE_ID", cls.node_id),
            shard_id=environment.text("SHARD_ID", cls.shard_id),
            max_body_bytes=environment.integer("MAX_BODY_BYTES", cls.max_body_bytes, 1024, 1 << 28),
            max_inflight=environment.integer("MAX_INFLIGHT", max_inflight, 1, 1024),
            queue_limit=environment.integer("QUEUE_LIMIT", cls.queue_limit, 0, 4096),
            deadline_s=environment.number("DEADLINE_MS", cls.deadline_s * 1e3, 1, 3_600_000) / 1e3,
            default_skill=environment.text("DEFAULT_SKILL", cls.default_skill),
            api_keys=environment.api_keys(),
            linger_s=environment.number("LINGER_S", cls.linger_s, 0, 600),
        )


@dataclass(frozen=True)
class KeySettings:
    """Where the key of a sealed artifact comes from, at most one place; and whose signature it must bear.

    `key` is the key itself; `public_key` is a key or a file that holds one.
    """

    key_file: str = ""
    key: str = field(default="", repr=False)
    kms_key_id: str = ""
    public_key: str = ""

    @classmethod
    def read(cls, environment: Environment) -> Self:
        """Read the settings; raises `ConfigError` if the key is to come from two places."""
        places = {key: environment.text(key, "") for key in ("MODEL_KEY_FILE", "MODEL_KEY", "MODEL_KMS_KEY_ID")}
        named = [key for key, value in places.items() if value]
        if len(named) > 1:
            raise ConfigError(f"{named[0]} and {named[1]} are both set; the model's key comes from one place")
        return cls(
            key_file=places["MODEL_KEY_FILE"],
            key=places["MODEL_KEY"],
            kms_key_id=places["MODEL_KMS_KEY_ID"],
            public_key=environment.text("MODEL_PUBLIC_KEY", ""),
        )


@dataclass(frozen=True)
class TierConfig:
    """Settings of a function that holds a tier: threads of its engine; the first of `providers` that works is used.

    `lookup_tokens`, `exit_threshold` and `exact_drafts` are explained in `LocalTier.open` and `EngineOptions`.
    `slowdown`: each forward pass lasts so many times as long, for benches that stand for slower machines;
    `slowdown_file` holds another factor, which may change meanwhile.
    """

    name: str
    model_path: str
    threads: int = 2
    keys: KeySettings = KeySettings()
    prefix_cache_bytes: int = 32 << 20
    providers: tuple[str, ...] = (CPU,)
    lookup_tokens: int = 0
    exact_drafts: bool = False
    exit_threshold: float | None = NO_EXIT
    slowdown: float = 1.0
    slowdown_file: Path | None = None
    common: Common = field(default_factory=Common)

    @classmethod
    def from_environment(cls, values: Mapping[str, str], name: str) -> Self:
        """Read `values`; `name` is the tier's name unless TIER_NAME says otherwise."""
        environment = Environment(values)
        environment.check_names()
        return cls(
            name=environment.text("TIER_NAME", name),
            model_path=environment.text("MODEL_PATH"),
            threads=environment.integer("THREADS", cls.threads, 1, 256),
            keys=KeySettings.read(environment),
            prefix_cache_bytes=environment.integer("PREFIX_CACHE_MB", cls.prefix_cache_bytes >> 20, 0, 1 << 20) << 20,
            providers=environment.choices("EXECUTION_PROVIDERS", cls.providers, PROVIDERS),
            lookup_tokens=environment.integer("LOOKUP_TOKENS", cls.lookup_tokens, 0, 16),
            exact_drafts=bool(environment.integer("EXACT_DRAFTS", cls.exact_drafts, 0, 1)),
            exit_threshold=_exit_threshold(environment),
            slowdown=environment.number("SLOWDOWN", cls.slowdown, 1, 1000),
            slowdown_file=Path(file) if (file := environment.text("SLOWDOWN_FILE", "")) else None,
            common=Common.read(environment, max_inflight=2),
        )


def _exit_threshold(environment: Environment) -> float | None:
    text = environment.text("EXIT_THRESHOLD", "off")
    if text in _EXIT_WORDS:
        return _EXIT_WORDS[text]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ConfigError(f"EXIT_THRESHOLD is '{text}'; it must be off, tuned, or a number from 0 to 1")
    return value
