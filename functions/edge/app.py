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
    is_part = os.environ.get("SHARD_LAYERS") or os.environ.get("TENSOR_RANK")
    return create_part_server(os.environ) if is_part else create_tier_server(_NAME)


def create_part_server(environment: Mapping[str, str]) -> Flask:
    """The app of a server's process that holds some of the layers, or some of all layers' heads and columns."""
    config = TierConfig.from_environment(environment, _NAME)
    app = _rank(config, environment) if environment.get("TENSOR_RANK") else _shard(config, environment)
    collect_seldom()
    site = app.extensions[EXTENSION]
    drain_on_sigterm(site.drain, site.common.linger_s)
    return app


def _shard(config: TierConfig, environment: Mapping[str, str]) -> Flask:
    from functions.edge.config import ShardConfig  # gRPC and onnx are loaded for parts only
    from functions.edge.shard_app import create_head, create_shard

    shard = ShardConfig.from_environment(environment)
    if shard is None:
        return create_tier_app(config)
    return create_head(config, shard) if shard.is_head else create_shard(config, shard)


def _rank(config: TierConfig, environment: Mapping[str, str]) -> Flask:
    from functions.edge.rank_app import create_head, create_rank
    from functions.edge.rank_config import RankConfig

    rank = RankConfig.from_environment(environment)
    if rank is None:
        return create_tier_app(config)
    return create_head(config, rank) if rank.is_head else create_rank(config, rank)
