"""The dispatcher: the first step of every request."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator, Mapping

from flask import Flask
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from functions.dispatcher import power
from functions.dispatcher.cache.service import CachedService, add_conversation_routes, purge_regularly
from functions.dispatcher.config import DispatcherConfig
from functions.dispatcher.dispatch import Dispatcher
from functions.dispatcher.fallbacks import open_fallback
from functions.dispatcher.latency import LatencyGuard, LatencyWatch
from functions.dispatcher.policy_file import PolicyWatch
from functions.dispatcher.savings import Savings
from functions.dispatcher.tier_client import Target, TierClient
from functions.serving.answering import Service, add_routes
from functions.serving.garbage import collect_seldom
from functions.serving.signals import drain_on_sigterm
from functions.serving.web import EXTENSION, Site, create_base

_NAME = "dispatcher"
_PURGE_EVERY_S = 60.0


def create_app(config: DispatcherConfig | None = None) -> Flask:
    """Wire the dispatcher; without a config it is a server's process and reads the environment.

    Raises `ConfigError` where the policy is none.
    """
    if config is None:
        app = create_app(DispatcherConfig.from_environment(os.environ))
        site = app.extensions[EXTENSION]
        collect_seldom()
        drain_on_sigterm(site.drain, site.common.linger_s)
        return app
    policy = PolicyWatch(config.policy)
    watch = config.power.watch(lambda: policy.policy().power_limits)
    site = Site.create(_NAME, config.common, lambda: policy.policy().deadline_ms, keeps_all=True)
    fallback = open_fallback(config.rules_file, config.messages_file)
    key = config.common.api_keys.headers
    dispatcher = Dispatcher(
        policy=policy.policy,
        device=TierClient(Target("device", config.device_url, config.common.deadline_s, key, config.trusted)),
        edge=TierClient(Target("edge", config.edge_url, config.edge_timeout_s, key, config.trusted)),
        node_id=config.common.node_id,
        power=watch.power,
        savings=Savings(config.power.figures, time.monotonic),
        fallback=fallback,
    )
    site.metrics.add(power.series(watch.power))
    site.metrics.add(lambda labels: _series(labels, policy, dispatcher))
    watch.listen(dispatcher.wake)
    watch.start()
    app = create_base(site, site.drain)
    service: Service = dispatcher
    ceiling = policy.policy().latency.limits
    if ceiling:
        service = LatencyGuard(service, LatencyWatch(ceiling), fallback, config.common.node_id)
    cache = config.cache.open()
    if cache:
        service = CachedService(service, cache, config.common.node_id)
        add_conversation_routes(app, [cache])
        weakref.finalize(app, purge_regularly(cache, _PURGE_EVERY_S))
    add_routes(app, site, service)
    weakref.finalize(app, watch.stop)  # nobody has the app any more
    return app


def _series(labels: Mapping[str, str], policy: PolicyWatch, dispatcher: Dispatcher) -> Iterator[Metric]:
    """What the dispatcher itself has to show."""
    names, values = list(labels), list(labels.values())
    for name, text, value in (
        ("policy_reloads", "Times a changed policy was taken.", policy.reloads),
        ("policy_refused", "Times a changed policy was bad, and the old one stayed.", policy.refused),
    ):
        counter = CounterMetricFamily(f"edgecascade_{name}", text, labels=names)
        counter.add_metric(values, value)
        yield counter
    opened = GaugeMetricFamily("edgecascade_breaker_open", "1 while the tier is left alone.", labels=[*names, "tier"])
    for client in (dispatcher.device, dispatcher.edge):
        opened.add_metric([*values, client.name], int(client.breaker.is_open))
    yield opened
