"""The device tier: a few million parameters, next to the user."""

from __future__ import annotations

from flask import Flask

from functions.serving.settings import TierConfig
from functions.serving.tier_app import create_tier_app, create_tier_server

_NAME = "device"


def create_app(config: TierConfig | None = None) -> Flask:
    """Wire the function; without a config it is a server's process and reads the environment."""
    return create_tier_server(_NAME) if config is None else create_tier_app(config)
