"""The dispatcher: the first step of every request."""

from __future__ import annotations

import os

import httpx
from flask import Flask

from functions.dispatcher.config import DispatcherConfig
from functions.dispatcher.dispatch import Dispatcher
from functions.dispatcher.tier_client import Target, TierClient
from functions.serving.answering import add_routes
from functions.serving.signals import drain_on_sigterm
from functions.serving.web import EXTENSION, Site, create_base
from routing import Policy

_NAME = "dispatcher"
_KEEP_ALIVE_S = 30.0


def create_app(config: DispatcherConfig | None = None) -> Flask:
    """Wire the dispatcher; without a config it is a server's process and reads the environment."""
    if config is None:
        app = create_app(DispatcherConfig.from_environment(os.environ))
        drain_on_sigterm(app.extensions[EXTENSION].drain)
        return app
    site = Site.create(_NAME, config.common)
    http = _http(config.common.max_inflight)
    dispatcher = Dispatcher(
        policy=Policy(threshold=config.confidence_threshold),
        device=TierClient(Target("device", config.device_url, config.common.deadline_s), http),
        edge=TierClient(Target("edge", config.edge_url, config.edge_timeout_s), http),
        node_id=config.common.node_id,
    )
    app = create_base(site, site.drain)
    add_routes(app, site, dispatcher)
    return app


def _http(max_inflight: int) -> httpx.Client:
    """One pool for both tiers. One retry, of the connection alone: no byte of a request is sent twice."""
    limits = httpx.Limits(
        max_connections=2 * max_inflight, max_keepalive_connections=max_inflight, keepalive_expiry=_KEEP_ALIVE_S
    )
    transport = httpx.HTTPTransport(retries=1, limits=limits)
    return httpx.Client(transport=transport, trust_env=False)
