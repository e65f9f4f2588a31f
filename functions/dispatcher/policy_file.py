"""The policy out of a YAML file and the environment: checked as a whole, read again when the file changes."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from functions.serving.settings import ConfigError, Environment
from routing.policy import Policy

_LOG = logging.getLogger(__name__)
PREFIX = "POLICY_"
FILE_KEY = "POLICY_FILE"
THRESHOLD_KEY = "CONFIDENCE_THRESHOLD"
_LOOK_EVERY_S = 1.0
_FILE_BYTES = 1 << 20


def keys(kind: Any = Policy, above: str = "") -> Iterator[str]:
    """Every key as the file nests them, joined by dots: `battery.downscale_below`."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        inner = hints[one.name]
        if is_dataclass(inner):
            yield from keys(inner, f"{above}{one.name}.")
        else:
            yield above + one.name


def variable(key: str) -> str:
    """The environment's name of a key: `POLICY_BATTERY_DOWNSCALE_BELOW`."""
    return PREFIX + key.replace(".", "_").upper()


@dataclass(frozen=True)
class PolicySource:
    """Where the policy comes from: a file or none, and single keys that outrank it."""

    path: Path | None = None
    overrides: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def read(cls, values: Mapping[str, str]) -> PolicySource:
        """Read the environment; raises `ConfigError` for a variable that names no key."""
        known = {variable(key): key for key in keys()}
        path, overrides = values.get(FILE_KEY, "").strip(), []
        for name, value in sorted(values.items()):
            if not name.startswith(PREFIX) or name == FILE_KEY or not value.strip():
                continue
            if name not in known:
                raise ConfigError(f"{name} is no key of the policy; known are {', '.join([FILE_KEY, *sorted(known)])}")
            overrides.append((known[name], _yaml(value, name)))
        if values.get(THRESHOLD_KEY, "").strip():
            threshold = Environment(values).number(THRESHOLD_KEY, 1, 0, 1)
            overrides.append(("confidence_threshold", threshold))
        return cls(Path(path) if path else None, tuple(overrides))

    def load(self) -> Policy:
        """Read and check everything; raises `ConfigError` naming the key."""
        tree = self._file()
        for key, value in self.overrides:
            *above, name = key.split(".")
            here = tree
            for part in above:
                here = here.setdefault(part, {})
                if not isinstance(here, dict):
                    raise ConfigError(f"the policy's {part} must be a mapping of keys to values")
            here[name] = value
        return parse(tree)

    def _file(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            with self.path.open("rb") as file:
                content = file.read(_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{FILE_KEY}: {self.path} cannot be read: {error.strerror}") from None
        if len(content) > _FILE_BYTES:
            raise ConfigError(f"{FILE_KEY}: {self.path} is larger than {_FILE_BYTES} bytes; that is no policy")
        tree = _yaml(content, FILE_KEY)
        if not isinstance(tree, dict | None):
            raise ConfigError(f"{FILE_KEY}: {self.path} must hold keys and values, as docs/policy.md shows them")
        return tree or {}


def parse(tree: Mapping[str, Any]) -> Policy:
    """A policy from nested keys and values; raises `ConfigError` naming the key."""
    try:
        # As JSON, because there strictness still takes a list for a set and a word for an enum.
        return _adapter().validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(_blame(error)) from None
    except (TypeError, ValueError):
        raise ConfigError("the policy may hold only words, numbers, yes and no, lists and mappings") from None


class PolicyWatch:
    """The policy as it stands. A file that changed is read again; one that is bad changes nothing, and is told of."""

    def __init__(self, source: PolicySource, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._policy = source.load()
        self._next_look = clock() + _LOOK_EVERY_S
        self.reloads = 0
        self.refused = 0

    def policy(self) -> Policy:
        """The current one. Looks at the file's stamp at most once a second; nobody waits while another one reads."""
        if self._source.path is not None and self._clock() >= self._next_look and self._lock.acquire(blocking=False):
            try:
                self._next_look = self._clock() + _LOOK_EVERY_S
                self._reload()
            finally:
                self._lock.release()
        return self._policy

    def _reload(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._policy = self._source.load()
        except ConfigError as error:
            self.refused += 1
            _LOG.error("the policy stays as it was: %s", error)
        else:
            self.reloads += 1
            _LOG.info("the policy was read again")

    def _look(self) -> tuple[int, int, int] | None:
        """What changes when the file does; a Kubernetes ConfigMap changes the inode behind its link."""
        try:
            found = self._source.path.stat() if self._source.path else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None


@cache
def _adapter() -> TypeAdapter[Policy]:
    return TypeAdapter(Policy)


def _yaml(content: bytes | str, key: str) -> Any:
    try:
        return yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}, column {place.column + 1}" if place else ""
        raise ConfigError(f"{key} is no YAML{where}") from None


def _blame(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return f"{key} is no key of the policy; known are {', '.join(sorted(keys()))}"
    said = first["msg"].removeprefix("Value error, ")
    # What a part refuses names the field itself; its place is the part.
    return f"{key}.{said}" if key and first["type"] == "value_error" else f"{key}: {said}" if key else said
