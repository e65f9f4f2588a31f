"""The apps of a tier whose heads and columns are split among ranks: rank 0, which talks HTTP, and the other ranks."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

from flask import Flask

from functions.edge.client import Directory, GrpcLink, Hello
from functions.edge.rank_config import RankConfig
from functions.edge.rank_server import RankService
from functions.edge.server import ShardServer
from functions.edge.shard_app import HeadDrain, ShardDrain, bounded_options, held_metrics, link_metrics, wait_for
from functions.edge.tls import Identity
from functions.edge.wire import Encoding, message_limit, model_digest
from functions.serving.lifecycle import Loading
from functions.serving.settings import TierConfig
from functions.serving.tier_app import create_tier_app, read_keys
from functions.serving.web import EXTENSION, Site, create_base
from models.artifact.manifest import Manifest
from models.artifact.names import PLAIN
from models.artifact.store import Artifact
from models.runtime.engine import CHUNK
from models.runtime.pipeline import Replicas
from models.runtime.rank_links import LinkedGroup, fault
from models.runtime.ranked import RankLayers, ranks_of, session_bytes
from models.runtime.ranks import split
from models.runtime.sessions import EngineOptions
from models.runtime.tensor import open_tier
from models.runtime.tier import Tier

_LOG = logging.getLogger(__name__)
_PROBE_S = 2.0


@dataclass(frozen=True)
class Ranks:
    """The other ranks, as rank 0 sees them."""

    replicas: tuple[Replicas, ...]

    @classmethod
    def of(cls, config: RankConfig, manifest: Manifest, identity: Identity | None) -> Self:
        """Make the links; nobody is asked yet."""
        shape, head = manifest.architecture, uuid.uuid4().hex
        limit = message_limit(shape.width, shape.vocab_size, CHUNK)
        found = []
        for number, addresses in enumerate(config.peers, 1):
            hello = Hello(model_digest(manifest), 0, shape.width, shape.vocab_size, CHUNK, number, config.count, head)
            links = Directory(addresses, partial(_link, hello, limit, identity))
            found.append(Replicas(links.links))
        return cls(tuple(found))

    def fault(self) -> str | None:
        """Why no session can be opened, None if one could be."""
        return fault(self.replicas, PLAIN, _PROBE_S)

    @property
    def ended(self) -> int:
        """Sessions that ended because a rank was lost for good."""
        return sum(each.stats.ended for each in self.replicas)


def _link(hello: Hello, limit: int, identity: Identity | None, address: str) -> GrpcLink:
    return GrpcLink(address, hello, Encoding.FP32, limit, identity)


def create_head(config: TierConfig, rank: RankConfig) -> Flask:
    """Wire the function of rank 0; raises `ConfigError`, `ArtifactError`."""
    manifest, identity = _known(config, rank)
    options = engine_options(config, rank, manifest)
    wrapper, signer = read_keys(config.keys)
    others = Ranks.of(rank, manifest, identity)
    drain = HeadDrain(probe=others.fault, ended=lambda: others.ended)

    def load(config: TierConfig) -> Tier:
        artifact = Artifact.open(Path(config.model_path), None, wrapper, signer)
        tier = open_tier(artifact, config.name, LinkedGroup(_layers(artifact, rank, options), others.replicas))
        wait_for("the other ranks", others.fault, lambda: drain.draining)
        return tier

    app = create_tier_app(config, load, drain)
    site: Site = app.extensions[EXTENSION]
    site.metrics.expect(manifest.model_version)
    site.metrics.add(lambda labels: link_metrics(others.replicas, labels))
    return app


def create_rank(config: TierConfig, rank: RankConfig) -> Flask:
    """Wire the function of another rank: passes by gRPC, how it is by HTTP. Raises `ConfigError`, `ArtifactError`."""
    manifest, identity = _known(config, rank)
    options = engine_options(config, rank, manifest)
    wrapper, signer = read_keys(config.keys)
    drain = ShardDrain()
    site = replace(Site.create(config.name, config.common), drain=drain)

    def open_rank() -> ShardServer:
        artifact = Artifact.open(Path(config.model_path), None, wrapper, signer)
        layers = _layers(artifact, rank, options)
        service = RankService(layers, rank, identity, lambda: drain.draining)
        server = ShardServer(service, layers, rank, identity, layers.places.count)
        site.metrics.expect(manifest.model_version)
        site.metrics.add(lambda labels: held_metrics(service, layers.held_bytes, labels))
        server.start()
        return server

    def opened(server: ShardServer) -> None:
        drain.server = server
        _LOG.info("rank %d of %d listens on port %d", rank.number, rank.count, server.port)

    loading = Loading(open_rank, drain, opened)
    app = create_base(site, loading)
    loading.start()
    return app


def _known(config: TierConfig, rank: RankConfig) -> tuple[Manifest, Identity | None]:
    """The manifest, and this rank's certificate."""
    return Artifact.open(Path(config.model_path)).manifest, Identity(rank.tls) if rank.tls else None


def _layers(artifact: Artifact, rank: RankConfig, options: EngineOptions) -> RankLayers:
    """Load this rank's part; raises `ArtifactError` where the model cannot be split, with the reason."""
    return RankLayers(artifact, ranks_of(artifact, rank.count)[rank.number], options)


def engine_options(config: TierConfig, rank: RankConfig, manifest: Manifest) -> EngineOptions:
    """How a rank's engine runs; raises `ConfigError` if not even one session's keys and values may be held.

    Ranks that are set up alike hold as many sessions, whichever has more heads. Raises `ArtifactError` where heads
    cannot be split.
    """
    ranks = split(manifest.architecture, rank.count)
    return bounded_options(config, rank, session_bytes(ranks, manifest.architecture, EngineOptions().context))
