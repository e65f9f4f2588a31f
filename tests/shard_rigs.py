"""Shards for tests: in this process, called directly or through gRPC on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from functions.edge.client import Directory, GrpcLink, Hello
from functions.edge.config import ShardConfig
from functions.edge.server import ShardServer, ShardService
from functions.edge.tls import Identity
from functions.edge.wire import Encoding, message_limit, model_digest
from models.artifact.store import Artifact
from models.errors import LinkLostError
from models.runtime.engine import CHUNK
from models.runtime.inprocess import InProcessLink
from models.runtime.links import Answer, Link, LinkSession, Opening, Piece
from models.runtime.local import LocalTier
from models.runtime.pipeline import Replicas, open_head
from models.runtime.sessions import EngineOptions
from models.runtime.stage import Stage
from models.runtime.tier import NO_EXIT

OPTIONS = EngineOptions(threads=1, spin=False, sequences=3)


def in_process(
    path: Path,
    cuts: Sequence[int],
    options: EngineOptions = OPTIONS,
    lookup_tokens: int = 0,
    exit_threshold: float | None = NO_EXIT,
    **keys: Any,
) -> LocalTier:
    """The tier in shards that call each other; `cuts` are where they begin, and where the last ends."""
    beyond: Replicas | None = None
    for start, stop in reversed(list(pairwise(cuts[1:]))):
        link = InProcessLink(Stage.open(path, range(start, stop), options, **keys), beyond)
        beyond = _only(link)
    assert beyond is not None
    more = {"lookup_tokens": lookup_tokens, "exit_threshold": exit_threshold, **keys}
    return open_head(path, "edge", cuts[1], beyond, options, **more)


def _only(*links: Link) -> Replicas:
    return Replicas(lambda: links)


@dataclass
class Served:
    """One shard that listens; `leaving` is what it says of itself."""

    service: ShardService
    server: ShardServer
    leaving: bool = False

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@dataclass
class Rig:
    """A head, and the shards that it reaches through gRPC, by part and replica."""

    tier: LocalTier
    replicas: Replicas
    shards: dict[tuple[int, int], Served] = field(default_factory=dict)


def serve(stage: Stage, beyond: Replicas | None = None, identity: Identity | None = None, **config: Any) -> Served:
    """Let a stage listen on a free port."""
    settings = ShardConfig(stage.layers, listen=0, **config)
    found: list[Served] = []
    service = ShardService(stage, beyond, settings, identity, lambda: bool(found) and found[0].leaving)
    server = ShardServer(service, stage, settings, identity, 3)
    found.append(Served(service, server))
    server.start()
    return found[0]


def directory(
    path: Path, first_layer: int, addresses: Sequence[str], encoding: Encoding = Encoding.FP32, identity: Any = None
) -> Directory:
    """Links to some addresses, for who holds the layers before."""
    manifest = Artifact.open(path).manifest
    shape = manifest.architecture
    hello = Hello(model_digest(manifest), first_layer, shape.width, shape.vocab_size, CHUNK)
    limit = message_limit(shape.width, shape.vocab_size, CHUNK)
    return Directory(addresses, lambda address: GrpcLink(address, hello, encoding, limit, identity))


@contextmanager
def linked(
    path: Path,
    cuts: Sequence[int],
    replicas: int = 1,
    encoding: Encoding = Encoding.FP32,
    options: EngineOptions = OPTIONS,
    lookup_tokens: int = 0,
) -> Iterator[Rig]:
    """The tier in shards that talk gRPC, `replicas` of each but the head."""
    with ExitStack() as stack:
        beyond: Replicas | None = None
        shards = {}
        parts = list(enumerate(pairwise(cuts)))
        for part, (start, stop) in reversed(parts[1:]):
            for replica in range(replicas):
                stage = Stage.open(path, range(start, stop), options)
                served = shards[part, replica] = serve(stage, beyond, states=encoding)
                stack.callback(served.server.stop, 0.0)
            addresses = [shards[part, replica].address for replica in range(replicas)]
            links = directory(path, start, addresses, encoding)
            stack.callback(links.close)
            beyond = Replicas(links.links)
        assert beyond is not None
        head = open_head(path, "edge", cuts[1], beyond, options, lookup_tokens=lookup_tokens)
        yield Rig(head, beyond, shards)


class FlakyLink:
    """A link that dies when `dies` says so of the pieces sent since the process began; dead for good, or for once."""

    def __init__(self, link: Link, dies: Callable[[int], bool], name: str, *, for_good: bool = False) -> None:
        self._link, self._dies, self.name, self._for_good = link, dies, name, for_good
        self.sent, self.opened, self.dead = 0, 0, False

    def open(self, opening: Opening) -> LinkSession:
        if self.dead:
            raise LinkLostError(f"{self.name} is dead")
        self.opened += 1
        return _FlakySession(self, self._link.open(opening))

    def strike(self) -> None:
        self.sent += 1
        if self._dies(self.sent):
            self.dead = self._for_good
            raise LinkLostError(f"{self.name} died")


class _FlakySession:
    def __init__(self, flaky: FlakyLink, session: LinkSession) -> None:
        self._flaky, self._session = flaky, session

    @property
    def held_tokens(self) -> int:
        return self._session.held_tokens

    @property
    def leaving(self) -> bool:
        return self._session.leaving

    def send(self, piece: Piece) -> None:
        self._flaky.strike()
        self._session.send(piece)

    def receive(self) -> Answer:
        return self._session.receive()

    def close(self) -> None:
        self._session.close()
