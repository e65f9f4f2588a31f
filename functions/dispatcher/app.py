"""The dispatcher: the first step of every request."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx
from flask import Flask
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from functions.dispatcher import power
from functions.dispatcher.config import DispatcherConfig
from functions.dispatcher.dispatch import Dispatcher
from functions.dispatcher.fallbacks import open_fallback
from functions.dispatcher.latency import LatencyGuard, LatencyWatch
from functions.dispatcher.leash import LeashedTransport
from functions.dispatcher.policy_file import PolicyWatch
from functions.dispatcher.tier_client import Target, TierClient
from functions.serving.answering import add_routes
from functions.serving.signals import drain_on_sigterm
from functions.serving.web import EXTENSION, Site, create_base

_NAME = "dispatcher"
_KEEP_ALIVE_S = 30.0


def create_app(config: DispatcherConfig | None = None) -> Flask:
    """Wire the dispatcher; without a config it is a server's process and reads the environment.

    Raises `ConfigError` where the policy is none.
    """
    if config is None:
        app = create_app(DispatcherConfig.from_environment(os.environ))
        site = app.extensions[EXTENSION]
        drain_on_sigterm(site.drain, site.common.linger_s)
        return app
    policy = PolicyWatch(config.policy)
    watch = config.power.watch(lambda: policy.policy().power_limits)
    site = Site.create(_NAME, config.common, lambda: policy.policy().deadline_ms)
    inflight = config.common.max_inflight
    http = _http(inflight, config)
    # Each request may ask both tiers at once, while what lost another race is still being cut off.
    executor = ThreadPoolExecutor(3 * inflight, thread_name_prefix="call")
    fallback = open_fallback(config.rules_file, config.messages_file)
    dispatcher = Dispatcher(
        policy=policy.policy,
        device=TierClient(Target("device", config.device_url, config.common.deadline_s), http),
        edge=TierClient(Target("edge", config.edge_url, config.edge_timeout_s), http),
        node_id=config.common.node_id,
        executor=executor,
        power=watch.power,
        fallback=fallback,
    )
    site.metrics.add(power.series(watch.power))
    site.metrics.add(lambda labels: _series(labels, policy, dispatcher))
    watch.listen(dispatcher.wake)
    watch.start()
    app = create_base(site, site.drain)
    ceiling = policy.policy().latency.limits
    watched = (
        LatencyGuard(dispatcher, LatencyWatch(ceiling), fallback, config.common.node_id) if ceiling else dispatcher
    )
    add_routes(app, site, watched)
    weakref.finalize(app, _close, http, executor, watch)
    return app


def _close(http: httpx.Client, executor: ThreadPoolExecutor, watch: power.PowerWatch) -> None:
    """Nobody has the app any more: let go of connections and threads."""
    executor.shutdown(wait=False, cancel_futures=True)
    http.close()
    watch.stop()


def _http(max_inflight: int, config: DispatcherConfig) -> httpx.Client:
    """One pool for both tiers, which get the key that we have."""
    limits = httpx.Limits(
        max_connections=3 * max_inflight, max_keepalive_connections=max_inflight, keepalive_expiry=_KEEP_ALIVE_S
    )
    transport = LeashedTransport(limits, config.trusted or True)
    return httpx.Client(transport=transport, trust_env=False, headers=config.common.api_keys.headers)


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
