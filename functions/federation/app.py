"""The federation: several device tiers vote; what they share and what waits for the edge is kept here."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flask import Flask

from functions.federation.announce import DEFERRED_TOPIC, Announce, MqttAnnouncer, Silence
from functions.federation.config import FederationConfig
from functions.federation.deferred import routes as deferred_routes
from functions.federation.deferred.edge import HttpEdge
from functions.federation.deferred.forward import Forwarder
from functions.federation.deferred.store import DeferredStore, Record
from functions.federation.errors import StoreError
from functions.federation.federate import NAME, Federation
from functions.federation.kept import Door
from functions.federation.loop import Loop
from functions.federation.nodes import HttpTier
from functions.federation.series import Series
from functions.federation.state import routes as state_routes
from functions.federation.state.follow import Follower
from functions.federation.state.log import StateLog
from functions.federation.state.sqlite import SqliteLog
from functions.serving.answering import add_routes
from functions.serving.garbage import collect_seldom
from functions.serving.openapi import Extra
from functions.serving.settings import ConfigError
from functions.serving.signals import drain_on_sigterm
from functions.serving.web import EXTENSION, Site, create_base

PARTS = "edgecascade.federation"
_KEEP_ALIVE_S = 30.0


def create_app(config: FederationConfig | None = None) -> Flask:
    """Wire the federation; without a config it is a server's process and reads the environment."""
    if config is None:
        app = create_app(FederationConfig.from_environment(os.environ))
        site = app.extensions[EXTENSION]
        collect_seldom()
        drain_on_sigterm(site.drain, site.common.linger_s)
        return app
    site = Site.create(NAME, config.common)
    parts = Parts.create(config)
    state, deferred = state_routes.extra(), deferred_routes.extra()
    extra = Extra(
        {**state.paths, **deferred.paths}, state.requests + deferred.requests, state.replies + deferred.replies
    )
    app = create_base(site, site.drain, extra)
    app.extensions[PARTS] = parts
    add_routes(app, site, parts.federation)
    door = Door()
    state_desk = parts.state_desk(config.common.node_id)
    state_routes.add_state_routes(app, site, state_desk, door)
    deferred_routes.add_deferred_routes(app, site, parts.deferred_desk(), door)
    site.metrics.add(parts.series(state_desk).collect)
    parts.start()
    return app


@dataclass(frozen=True)
class Parts:
    """What lives as long as the function, under `app.extensions[PARTS]` for whoever has to end it."""

    loop: Loop
    nodes: httpx.AsyncClient
    federation: Federation
    log: StateLog
    store: DeferredStore
    announce: Announce
    edge: httpx.Client | None
    forwarder: Forwarder | None
    follower: Follower | None

    @classmethod
    def create(cls, config: FederationConfig) -> Parts:
        """Make the parts; nothing runs yet."""
        announce = _announcer(config)
        try:
            log = _log(config)
            store = DeferredStore(_file(config, "deferred.sqlite"), config.deferred_limit, config.bounds.retention_s)
        except StoreError as error:
            raise ConfigError(f"FEDERATION_STATE_PATH: {error}") from error
        loop = Loop()
        trusted, key = config.trusted or ssl.create_default_context(), config.common.api_keys.headers
        nodes = _client(config.common.max_inflight * len(config.nodes), trusted, key)
        tiers = tuple(HttpTier(name, url, nodes) for name, url in config.nodes.items())
        edge = httpx.Client(trust_env=False, verify=trusted, headers=key) if config.edge_url else None
        forwarder = None
        if edge is not None:
            asked = HttpEdge(config.edge_url, edge, config.common.deadline_s)

            def told(record: Record) -> None:
                announce.tell(DEFERRED_TOPIC, {"id": record.question.id, "status": record.status})

            forwarder = Forwarder(store, asked, told)
        return cls(
            loop=loop,
            nodes=nodes,
            federation=Federation(tiers, config.votes_needed, config.common.node_id, loop),
            log=log,
            store=store,
            announce=announce,
            edge=edge,
            forwarder=forwarder,
            # An SQLite log is this node's alone: what is deleted in it is deleted here.
            follower=Follower(log, store.delete) if config.redis_url else None,
        )

    def state_desk(self, node_id: str) -> state_routes.StateDesk:
        """What the routes of the shared log need."""
        return state_routes.StateDesk(self.log, self.announce, self.store.delete, node_id)

    def deferred_desk(self) -> deferred_routes.DeferredDesk:
        """What the routes of store and forward need."""
        wake = self.forwarder.wake if self.forwarder else lambda: None
        return deferred_routes.DeferredDesk(self.store, self.log, self.forwarder is not None, wake)

    def series(self, desk: state_routes.StateDesk) -> Series:
        """What is measured beside what every function measures."""
        return Series(self.federation.standings, self.announce, self.store, self.forwarder, desk.waiters)

    def start(self) -> None:
        """Begin what runs beside the requests."""
        self.loop.start()
        for thread in (self.forwarder, self.follower):
            if thread is not None:
                thread.start()

    def stop(self) -> None:
        """End it all; what is kept in files or in Redis stays."""
        for thread in (self.forwarder, self.follower):
            if thread is not None:
                thread.stop()
        self.loop.stop(self.nodes.aclose)
        if self.edge is not None:
            self.edge.close()
        self.announce.close()
        self.store.close()
        self.log.close()


def _client(connections: int, trusted: ssl.SSLContext, headers: Mapping[str, str]) -> httpx.AsyncClient:
    """One pool for all nodes. One retry, of the connection alone: no byte of a request is sent twice."""
    limits = httpx.Limits(
        max_connections=2 * connections, max_keepalive_connections=connections, keepalive_expiry=_KEEP_ALIVE_S
    )
    transport = httpx.AsyncHTTPTransport(retries=1, limits=limits, verify=trusted)
    return httpx.AsyncClient(transport=transport, trust_env=False, headers=headers)


def _file(config: FederationConfig, name: str) -> Path | None:
    return None if config.state_path is None else config.state_path / name


def _log(config: FederationConfig) -> StateLog:
    """The shared log: Redis where one is named, else a file of this node's own."""
    if config.redis_url:
        # Only now: the client is an extra, and most federations have no server.
        with _installed("FEDERATION_REDIS_URL", "redis"):
            from functions.federation.state.redis import RedisLog
        return RedisLog(config.redis_url, config.bounds)
    return SqliteLog(_file(config, "state.sqlite"), config.bounds)


def _announcer(config: FederationConfig) -> Announce:
    if not config.mqtt_url:
        return Silence()
    with _installed("FEDERATION_MQTT_URL", "mqtt"):
        return MqttAnnouncer(config.mqtt_url, f"edgecascade/{config.common.node_id}")


@contextmanager
def _installed(key: str, extra: str) -> Iterator[None]:
    """A setting that needs a library which is not there stops the start."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{key} is set, but its library is missing: pip install 'edgecascade[{extra}]'") from error
