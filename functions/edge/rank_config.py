"""The settings of a rank; the rest is as in every function that holds a tier."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from functions.edge.config import LinkConfig, TlsSettings, address
from functions.serving.settings import ConfigError, Environment

_RANK = re.compile(r"(\d{1,3})/(\d{1,3})")
_MOST = 64


@dataclass(frozen=True)
class RankConfig(LinkConfig):
    """Rank `number` of `count`; `peers`, of rank 0 only: where replicas of each of the other ranks listen, in order."""

    number: int
    count: int
    peers: tuple[tuple[str, ...], ...] = ()

    @property
    def is_head(self) -> bool:
        """Whether it embeds and picks, and so talks HTTP."""
        return self.number == 0

    @classmethod
    def from_environment(cls, values: Mapping[str, str]) -> Self | None:
        """Read `values`; None where TENSOR_RANK is not set: then the tier is whole. Raises `ConfigError`."""
        environment = Environment(values)
        text = environment.text("TENSOR_RANK", "")
        if not text:
            return None
        if environment.text("SHARD_LAYERS", ""):
            raise ConfigError("TENSOR_RANK and SHARD_LAYERS are both set; a rank runs all layers, a shard some")
        number, count = _rank(text)
        link = LinkConfig.read(environment)
        peers = _peers(environment.text("TENSOR_PEERS", ""), number, count, link.tls)
        return cls(number=number, count=count, peers=peers, **vars(link))


def _rank(text: str) -> tuple[int, int]:
    found = _RANK.fullmatch(text)
    if not found or not int(found[1]) < int(found[2]) <= _MOST or int(found[2]) == 1:
        raise ConfigError(f"TENSOR_RANK is '{text}'; it must be a rank and how many there are, such as 0/2 or 1/2")
    return int(found[1]), int(found[2])


def _peers(text: str, number: int, count: int, tls: TlsSettings | None) -> tuple[tuple[str, ...], ...]:
    """Addresses rank by rank; those of replicas of one rank are separated by `|`."""
    if number:
        if text:
            raise ConfigError(f"TENSOR_PEERS is set for rank {number}; only rank 0 calls the others")
        return ()
    listed = [part.strip() for part in text.split(",") if part.strip()]
    if len(listed) != count - 1:
        raise ConfigError(
            f"TENSOR_PEERS lists {len(listed)} ranks; rank 0 of {count} needs the addresses of {count - 1}, in order, "
            "host:port each, separated by commas"
        )
    return tuple(tuple(address("TENSOR_PEERS", a.strip(), tls) for a in part.split("|")) for part in listed)
