"""The app of a function that holds a tier; device and edge differ in their name only."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flask import Flask

from functions.serving.answering import add_routes
from functions.serving.ask import Ask, Clocked
from functions.serving.events import Events
from functions.serving.garbage import collect_seldom
from functions.serving.lifecycle import Drain, Loading
from functions.serving.replies import ModelEntry, ModelFacts
from functions.serving.settings import KeySettings, TierConfig
from functions.serving.signals import drain_on_sigterm
from functions.serving.tier_answer import Answerer
from functions.serving.web import EXTENSION, Site, create_base
from models.runtime.local import LocalTier
from models.runtime.tier import Tier

if TYPE_CHECKING:
    from models.artifact.keys import KeyWrapper

Load = Callable[[TierConfig], Tier]


def read_keys(settings: KeySettings) -> tuple[KeyWrapper | None, bytes | None]:
    """The key of a sealed artifact and whose signature it must bear, as far as they are set; raises `ConfigError`."""
    if settings == KeySettings():
        return None, None
    # Only now: cryptography takes 9 MB, which a tier without keys spares.
    from functions.serving.keys import forbid_core_dumps, open_keys

    keys = open_keys(settings)
    forbid_core_dumps()
    return keys.wrapper, keys.signer


def local_loader(settings: KeySettings) -> Load:
    """Read the keys now, so that a bad one stops the start; return what loads the artifact into this process."""
    wrapper, signer = read_keys(settings)

    def load(config: TierConfig) -> Tier:
        return LocalTier.open(
            Path(config.model_path),
            config.name,
            threads=config.threads,
            sequences=config.common.max_inflight,
            prefix_cache_bytes=config.prefix_cache_bytes,
            providers=config.providers,
            lookup_tokens=config.lookup_tokens,
            exact_drafts=config.exact_drafts,
            exit_threshold=config.exit_threshold,
            slowdown=config.slowdown,
            slowdown_file=config.slowdown_file,
            keys=wrapper,
            signer=signer,
        )

    return load


def create_tier_server(name: str, load: Load | None = None) -> Flask:
    """The app of a server's process: settings from the environment, drained on SIGTERM."""
    app = create_tier_app(TierConfig.from_environment(os.environ, name), load)
    site = app.extensions[EXTENSION]
    collect_seldom()
    drain_on_sigterm(site.drain, site.common.linger_s)
    return app


def create_tier_app(config: TierConfig, load: Load | None = None, drain: Drain | None = None) -> Flask:
    """Wire the app and begin to load the tier; until it is there, answers are 503 with Retry-After.

    `drain` may know of further reasons why no requests are taken.
    """
    load = load or local_loader(config.keys)
    site = Site.create(config.name, config.common)
    if drain is not None:
        site = replace(site, drain=drain)

    def open_tier() -> Answerer:
        return Answerer.of(load(config), config.common.node_id)

    def opened(answerer: Answerer) -> None:
        card = answerer.tier.card
        site.metrics.expect(card.model_version)
        site.metrics.watch(answerer.tier.stats, card.provider)

    loading = Loading(open_tier, site.drain, opened)
    app = create_base(site, loading)
    add_routes(app, site, TierService(loading))
    loading.start()
    return app


@dataclass(frozen=True)
class TierService:
    """Answers with the one tier there is."""

    loading: Loading[Answerer]

    def check(self, ask: Ask) -> None:
        """Refuse what the tier cannot do; 503 while it is not loaded."""
        self.loading.value().check(ask)

    def events(self, ask: Ask, clocked: Clocked) -> Events:
        """Let the tier answer."""
        return self.loading.value().events(ask, clocked)

    def models(self) -> list[ModelEntry]:
        """The tier, under its name."""
        answerer = self.loading.value()
        card = answerer.tier.card
        skills = answerer.skills
        facts = ModelFacts(
            available=True,
            skills=list(skills),
            thresholds={s: answerer.confidence.threshold(s) for s in skills if s in answerer.confidence.thresholds},
            model=card.model_id,
            model_version=card.model_version,
            context=card.context,
            quantisation=card.quantisation,
            execution_provider=card.provider,
            watts=card.watts,
            watts_source=card.watts_source,
        )
        return [ModelEntry(id=card.name, object="model", created=0, owned_by="edgecascade", edgecascade=facts)]
