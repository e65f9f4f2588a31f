"""Ranks for tests: threads of this process, or reached through gRPC on loopback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from functions.edge.client import Directory, GrpcLink, Hello
from functions.edge.rank_config import RankConfig
from functions.edge.rank_server import RankService
from functions.edge.server import ShardServer
from functions.edge.tls import Identity
from functions.edge.wire import Encoding, message_limit, model_digest
from models.artifact.store import Artifact
from models.runtime.engine import CHUNK
from models.runtime.local import LocalTier
from models.runtime.pipeline import Replicas
from models.runtime.rank_links import LinkedGroup
from models.runtime.ranked import RankLayers, ranks_of
from models.runtime.sessions import EngineOptions
from models.runtime.tensor import ThreadGroup, open_tier

OPTIONS = EngineOptions(threads=1, spin=False, sequences=3)


@contextmanager
def in_threads(path: Path, count: int, options: EngineOptions = OPTIONS) -> Iterator[LocalTier]:
    """The tier in ranks that are threads."""
    artifact = Artifact.open(path).keeping()
    group = ThreadGroup.open(artifact, count, options)
    try:
        yield open_tier(artifact, "edge", group)
    finally:
        group.close()


@dataclass
class Served:
    """One rank that listens; `leaving` is what it says of itself."""

    service: RankService
    server: ShardServer
    leaving: bool = False

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@dataclass
class Rig:
    """Rank 0, and the ranks that it reaches through gRPC, by number and replica."""

    tier: LocalTier
    group: LinkedGroup
    ranks: dict[tuple[int, int], Served] = field(default_factory=dict)


def layers_of(path: Path, number: int, count: int, options: EngineOptions = OPTIONS) -> RankLayers:
    artifact = Artifact.open(path).keeping()
    return RankLayers(artifact, ranks_of(artifact, count)[number], options)


def serve(layers: RankLayers, identity: Identity | None = None, **config: Any) -> Served:
    """Let a rank listen on a free port."""
    settings = RankConfig(number=layers.rank.number, count=layers.rank.count, listen=0, **config)
    found: list[Served] = []
    service = RankService(layers, settings, identity, lambda: bool(found) and found[0].leaving)
    found.append(Served(service, ShardServer(service, layers, settings, identity, layers.places.count)))
    found[0].server.start()
    return found[0]


def directory(
    path: Path, number: int, count: int, addresses: Sequence[str], head: str = "head", identity: Any = None
) -> Directory:
    """Links to the replicas of a rank."""
    manifest = Artifact.open(path).manifest
    shape = manifest.architecture
    hello = Hello(model_digest(manifest), 0, shape.width, shape.vocab_size, CHUNK, number, count, head)
    limit = message_limit(shape.width, shape.vocab_size, CHUNK)
    return Directory(addresses, lambda address: GrpcLink(address, hello, Encoding.FP32, limit, identity))


@contextmanager
def linked(path: Path, count: int, replicas: int = 1, options: EngineOptions = OPTIONS) -> Iterator[Rig]:
    """The tier in ranks that talk gRPC, `replicas` of each but rank 0."""
    with ExitStack() as stack:
        ranks, found = {}, []
        for number in range(1, count):
            layers = [layers_of(path, number, count, options) for _ in range(replicas)]
            for replica, each in enumerate(layers):
                served = ranks[number, replica] = serve(each)
                stack.callback(served.server.stop, 0.0)
            links = directory(path, number, count, [ranks[number, r].address for r in range(replicas)])
            stack.callback(links.close)
            found.append(Replicas(links.links))
        group = LinkedGroup(layers_of(path, 0, count, options), found)
        yield Rig(open_tier(Artifact.open(path).keeping(), "edge", group), group, ranks)
