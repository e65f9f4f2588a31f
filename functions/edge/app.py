"""The edge tier: the larger model, one hop away, whole or in shards."""

from __future__ import annotations

import os
from collections.abc import Mapping

from flask import Flask

from functions.serving.garbage import collect_seldom
from functions.serving.settings import TierConfig
from functions.serving.signals import drain_on_sigterm
from functions.serving.tier_app import create_tier_app, create_tier_server
from functions.serving.web import EXTENSION

_NAME = "edge"


def create_app(config: TierConfig | None = None) -> Flask:
    """Wire the function; without a config it is a server's process and reads the environment."""
    if config is not None:
        return create_tier_app(config)
    return create_shard_server(os.environ) if os.environ.get("SHARD_LAYERS") else create_tier_server(_NAME)


def create_shard_server(environment: Mapping[str, str]) -> Flask:
    """The app of a server's process that holds some of the layers."""
    from functions.edge.config import ShardConfig  # gRPC and onnx are loaded for shards only
    from functions.edge.shard_app import create_head, create_shard

    config, shard = TierConfig.from_environment(environment, _NAME), ShardConfig.from_environment(environment)
    if shard is None:
        return create_tier_server(_NAME)
    app = create_head(config, shard) if shard.is_head else create_shard(config, shard)
    collect_seldom()
    site = app.extensions[EXTENSION]
    drain_on_sigterm(site.drain, site.common.linger_s)
    return app
