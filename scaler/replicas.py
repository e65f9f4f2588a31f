"""Which replicas of a function there are: from Kubernetes' API, or from a file or address for local runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from scaler import fetch
from scaler.errors import SourceError


@dataclass(frozen=True)
class Replica:
    """One that runs or starts; `address` is where it answers (http://host:port), '' if that is not known yet."""

    address: str
    ready: bool


@dataclass(frozen=True)
class Found:
    """The replicas now, and how many at most the nodes' power allows, if they say so."""

    replicas: Sequence[Replica]
    power_ceiling: int | None = None

    @property
    def ready(self) -> int:
        """How many take requests."""
        return sum(replica.ready for replica in self.replicas)

    @property
    def starting(self) -> int:
        """How many do not yet."""
        return len(self.replicas) - self.ready


class Replicas(Protocol):
    """Knows the replicas of every function."""

    def of(self, function: str, namespace: str) -> Found:
        """Look once; raises `SourceError`."""
        ...


@dataclass(frozen=True)
class ListedReplicas:
    """A JSON document, by path or http address, written by whoever starts the replicas.

    It looks like `{"edge": {"replicas": [{"address": "http://127.0.0.1:4001", "state": "ready"}]}}`, where beside
    `replicas` there may be a `power_ceiling`.
    States are `starting`, `ready` and `draining`; one that drains counts no more. A function that is not named is
    an error, an empty list of replicas is none. Namespaces are not told apart.
    """

    place: str
    client: httpx.Client

    def of(self, function: str, namespace: str) -> Found:  # noqa: ARG002 - part of the seam
        """Read the document now."""
        try:
            return _found(json.loads(self._text())[function])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(f"the list of replicas does not say which '{function}' has") from error

    def _text(self) -> str:
        if self.place.startswith(("http://", "https://")):
            return fetch.text(self.client, self.place, "the list of replicas")
        try:
            return Path(self.place).read_text("utf-8")
        except OSError as error:
            raise SourceError(f"the list of replicas cannot be read ({error.strerror})") from error


def _found(entry: dict[str, Any]) -> Found:
    replicas = [
        Replica(str(one["address"]), one["state"] == "ready")
        for one in entry["replicas"]
        if one["state"] in {"ready", "starting"}
    ]
    ceiling = entry.get("power_ceiling")
    return Found(replicas, None if ceiling is None else int(ceiling))
