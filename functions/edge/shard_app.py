"""The apps of a sharded edge tier: the head, which talks HTTP as a whole tier does, and the other shards."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flask import Flask
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from functions.edge.client import Directory, GrpcLink, Hello
from functions.edge.config import LinkConfig, ShardConfig
from functions.edge.server import SessionService, ShardServer, ShardService
from functions.edge.tls import Identity
from functions.edge.wire import message_limit, model_digest
from functions.serving.lifecycle import Drain, Loading
from functions.serving.settings import ConfigError, TierConfig
from functions.serving.tier_app import create_tier_app, read_keys
from functions.serving.web import EXTENSION, Site, create_base
from models.artifact.manifest import Manifest
from models.artifact.names import FRAMES, PLAIN
from models.artifact.store import Artifact
from models.errors import LinkLostError, ShardsLostError
from models.runtime.engine import CHUNK
from models.runtime.links import Opening
from models.runtime.pipeline import Replicas, open_head
from models.runtime.sessions import EngineOptions
from models.runtime.stage import Stage, session_bytes
from models.runtime.tier import Tier

_LOG = logging.getLogger(__name__)
_PROBE_S, _AGAIN_S = 2.0, 0.25
_GRACE_S = 55.0
"""How long sessions may take to move or to end once the process is told to stop; the server ends it after 60 s."""


def engine_options(config: TierConfig, shard: ShardConfig, manifest: Manifest) -> EngineOptions:
    """How a shard's engine runs; raises `ConfigError` if not even one session's keys and values may be held."""
    each = session_bytes(manifest.architecture, shard.layers, EngineOptions().context)
    n_lanes = 2 if manifest.skills and manifest.lm_head else 1
    return replace(
        bounded_options(config, shard, each * n_lanes),
        groups=shard.groups,
        prefix_cache_bytes=config.prefix_cache_bytes,
        exact_drafts=config.exact_drafts,
    )


def bounded_options(config: TierConfig, link: LinkConfig, session_bytes: int) -> EngineOptions:
    """What shards and ranks have in common: as many sessions as may be held; raises `ConfigError` if that is none."""
    sequences = min(config.common.max_inflight, link.kv_bytes // session_bytes)
    if not sequences:
        raise ConfigError(f"SHARD_KV_MB is too little: one session may take {-(-session_bytes >> 20)} MB")
    return EngineOptions(
        config.threads,
        spin=link.spin,
        rests=True,
        sequences=sequences,
        providers=config.providers,
        slowdown=config.slowdown,
        slowdown_file=config.slowdown_file,
    )


def check_layers(shard: ShardConfig, manifest: Manifest) -> None:
    """Raise `ConfigError` if these layers and where they lead do not fit the model."""
    n_layers = manifest.architecture.n_layers
    if shard.layers.stop > n_layers:
        raise ConfigError(f"SHARD_LAYERS ends with {shard.layers.stop - 1}; the model's last layer is {n_layers - 1}")
    if shard.layers.stop == n_layers and shard.next:
        raise ConfigError("SHARD_NEXT is set, and SHARD_LAYERS already ends with the model's last layer")
    if shard.layers.stop < n_layers and not shard.next:
        raise ConfigError(f"SHARD_NEXT is not set; it must say who serves the layers from {shard.layers.stop} on")


@dataclass(frozen=True)
class Next:
    """The shards that come after, as this one sees them."""

    directory: Directory
    replicas: Replicas

    @classmethod
    def of(cls, shard: ShardConfig, manifest: Manifest, identity: Identity | None) -> Next | None:
        """Make the links; nobody is asked yet."""
        if not shard.next:
            return None
        shape = manifest.architecture
        hello = Hello(model_digest(manifest), shard.layers.stop, shape.width, shape.vocab_size, CHUNK)
        limit = message_limit(shape.width, shape.vocab_size, CHUNK)
        directory = Directory(shard.next, lambda address: GrpcLink(address, hello, shard.states, limit, identity))
        return cls(directory, Replicas(directory.links))

    def fault(self, variant: str) -> str | None:
        """Why no session can be opened, None if one could be."""
        reason = "no address leads anywhere"
        for link in self.replicas.in_order():
            try:
                link.open(Opening(variant, time.monotonic() + _PROBE_S)).close()
            except (LinkLostError, ShardsLostError) as error:
                reason = str(error)
            else:
                return None
        return reason

    def wait(self, variant: str, stopped: Callable[[], bool]) -> None:
        """Return once a session can be opened, or when it is of no use any more."""
        wait_for("the next shard", lambda: self.fault(variant), stopped)

    def metrics(self, labels: dict[str, str]) -> Iterator[Metric]:
        """What came of links, for Prometheus."""
        return link_metrics([self.replicas], labels)


def wait_for(whom: str, fault: Callable[[], str | None], stopped: Callable[[], bool]) -> None:
    """Return once there is no fault, or when that is of no use any more."""
    said = ""
    while not stopped():
        found = fault()
        if found is None:
            return
        if found != said:
            _LOG.info("waiting for %s: %s", whom, found)
            said = found
        time.sleep(_AGAIN_S)


def link_metrics(replicas: Sequence[Replicas], labels: dict[str, str]) -> Iterator[Metric]:
    """What came of links, for Prometheus."""
    stats, waits = [each.stats for each in replicas], [each.waits.spent for each in replicas]
    for name, text, value in (
        ("links_lost", "Sessions that lost a shard that was called.", sum(s.lost for s in stats)),
        ("links_resumed", "Those that went on with another replica.", sum(s.resumed for s in stats)),
        ("links_moved", "Sessions that left a shard before it stopped.", sum(s.moved for s in stats)),
        ("links_ended", "Sessions that ended because no shard was left.", sum(s.ended for s in stats)),
        ("link_steps", "Single tokens handed on.", sum(w.times for w in waits)),
        ("link_seconds", "What the answers to them took.", sum(w.seconds for w in waits)),
    ):
        yield _counter(name, text, value, labels)


# ---- the head ----


@dataclass
class HeadDrain(Drain):
    """A head is not ready either while nobody serves what comes after; that is asked only once it was lost."""

    probe: Callable[[], str | None] = lambda: None
    ended: Callable[[], int] = lambda: 0
    _seen: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reason_not_ready(self) -> str | None:
        """Why no requests are taken, or None."""
        reason = super().reason_not_ready()
        if reason or self.ended() == self._seen:
            return reason
        with self._lock:
            ended = self.ended()
            fault = self.probe()
            if fault is None:
                self._seen = ended
            return fault


def create_head(config: TierConfig, shard: ShardConfig) -> Flask:
    """Wire the function of the head shard; raises `ConfigError`, `ArtifactError`."""
    manifest, identity = _known(config, shard)
    options = engine_options(config, shard, manifest)
    wrapper, signer = read_keys(config.keys)
    further = Next.of(shard, manifest, identity)
    if further is None:
        raise ConfigError("SHARD_LAYERS holds the whole model; leave it out")
    variant = _variant(manifest)
    drain = HeadDrain(probe=lambda: further.fault(variant), ended=lambda: further.replicas.stats.ended)

    def load(config: TierConfig) -> Tier:
        tier = open_head(
            Path(config.model_path),
            config.name,
            shard.layers.stop,
            further.replicas,
            options,
            lookup_tokens=config.lookup_tokens,
            exit_threshold=config.exit_threshold,
            keys=wrapper,
            signer=signer,
        )
        further.wait(variant, lambda: drain.draining)
        return tier

    app = create_tier_app(config, load, drain)
    site: Site = app.extensions[EXTENSION]
    site.metrics.expect(manifest.model_version)
    site.metrics.add(further.metrics)
    return app


# ---- the others ----


@dataclass
class ShardDrain(Drain):
    """Told to stop, a shard takes no more sessions and lets those at work move or end, and the process live so long."""

    server: ShardServer | None = None

    def start(self) -> None:
        """Say so in every answer from now on."""
        if not self.draining and self.server is not None:
            threading.Thread(target=self.server.stop, args=(_GRACE_S,), name="drain").start()
        super().start()


def create_shard(config: TierConfig, shard: ShardConfig) -> Flask:
    """Wire the function of a shard that is no head: sessions by gRPC, how it is by HTTP. Raises `ConfigError`."""
    manifest, identity = _known(config, shard)
    options = engine_options(config, shard, manifest)
    wrapper, signer = read_keys(config.keys)
    further = Next.of(shard, manifest, identity)
    drain = ShardDrain()
    site = replace(Site.create(config.name, config.common), drain=drain)

    def open_stage() -> ShardServer:
        stage = Stage.open(Path(config.model_path), shard.layers, options, wrapper, signer)
        if further is not None:
            further.wait(_variant(manifest), lambda: drain.draining)
        replicas = further.replicas if further is not None else None
        service = ShardService(stage, replicas, shard, identity, lambda: drain.draining)
        server = ShardServer(service, stage, shard, identity, options.sequences)
        site.metrics.expect(manifest.model_version)
        site.metrics.add(lambda labels: held_metrics(service, stage.held_bytes, labels))
        site.metrics.add(lambda labels: prefix_metrics(stage, labels))
        site.metrics.add(lambda labels: pass_metrics(stage, labels))
        if further is not None:
            site.metrics.add(further.metrics)
        server.start()
        return server

    def opened(server: ShardServer) -> None:
        drain.server = server
        _LOG.info("layers %d to %d listen on port %d", shard.layers.start, shard.layers.stop - 1, server.port)

    loading = Loading(open_stage, drain, opened)
    app = create_base(site, loading)
    loading.start()
    return app


def _known(config: TierConfig, shard: ShardConfig) -> tuple[Manifest, Identity | None]:
    """The manifest, which the settings are checked by before anything is loaded, and this shard's certificate."""
    manifest = Artifact.open(Path(config.model_path)).manifest
    check_layers(shard, manifest)
    return manifest, Identity(shard.tls) if shard.tls else None


def _variant(manifest: Manifest) -> str:
    return PLAIN if manifest.lm_head else FRAMES


def prefix_metrics(stage: Stage, labels: dict[str, str]) -> Iterable[Metric]:
    """What the prefix cache does, for Prometheus."""
    prefix = stage.prefix_stats
    for name, text, value in (
        ("prefix_asked_tokens", "Prompt tokens looked up in the prefix cache.", prefix.asked_tokens),
        ("prefix_reused_tokens", "Prompt tokens found in it, which were not read again.", prefix.reused_tokens),
        ("prefix_evicted_blocks", "Blocks thrown out of it.", prefix.evicted_blocks),
    ):
        yield _counter(name, text, value, labels)
    held = GaugeMetricFamily("edgecascade_prefix_held_bytes", "Held by the prefix cache.", labels=list(labels))
    held.add_metric(list(labels.values()), prefix.held_bytes)
    yield held


def held_metrics(service: SessionService, held_bytes: int, labels: dict[str, str]) -> Iterable[Metric]:
    """What the sessions of this end take, for Prometheus."""
    for name, text, value in (
        ("shard_sessions", "Sessions at work.", service.open_sessions),
        ("shard_held_bytes", "Set aside for keys and values.", held_bytes),
    ):
        family = GaugeMetricFamily(f"edgecascade_{name}", text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        yield family


def pass_metrics(stage: Stage, labels: dict[str, str]) -> Iterable[Metric]:
    """What single tokens take here, for Prometheus and for who places layers."""
    passes, steps = stage.passes, stage.steps.spent
    yield _counter("passes", "Forward passes of single tokens.", passes.shared_runs, labels)
    yield _counter("pass_tokens", "Tokens in them; more where answers share.", passes.shared_turns, labels)
    yield _counter("pass_seconds", "What those passes lasted.", passes.shared_s, labels)
    yield _counter("shard_steps", "Single tokens answered.", steps.times, labels)
    yield _counter("shard_step_seconds", "What that took, shards beyond included.", steps.seconds, labels)


def _counter(name: str, text: str, value: float, labels: dict[str, str]) -> Metric:
    family = CounterMetricFamily(f"edgecascade_{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
