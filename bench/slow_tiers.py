"""Tiers slowed to given means by the cost of their forward passes: how much slower each pass must be is found by trial.

A reply takes a + b × slowdown; two trials tell a and b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from bench.bundle import Running, Start, Variant
from bench.faults import FaultProxy, Faults

TIERS = ("device", "edge")
_SETTING = "SLOWDOWN"
_LEAST, _MOST = 1.0, 1000.0
_TRIALS = 3
WARM_UP = 12
_LEAST_STEP = 0.25
"""Two trials closer together than this tell more about the noise than about the tier."""


@dataclass(frozen=True)
class Site:
    """How the two sites are joined and what slower machines they stand for; `network_ms` there and back.

    `edge_threads` None: as many as stack.yml says. With one, as the device has, what is multiplied is processor time
    (`SlowedSession`): the bench, the dispatcher and the other tier, which share the cores here, are not slept off too.
    """

    slowdown: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TIERS, _LEAST))
    network_ms: float = 0.0
    edge_threads: int | None = None


@dataclass(frozen=True)
class Stage:
    """A running bundle whose dispatchers reach each tier through a proxy."""

    running: Running
    proxies: Mapping[str, FaultProxy]


def tier_variants(site: Site) -> dict[str, Variant]:
    """Both tiers, as slow as the site has them; the edge runs all its layers."""
    slowed = {name: {_SETTING: f"{site.slowdown[name]:.4f}"} for name in TIERS}
    slowed["edge"]["EXIT_THRESHOLD"] = "off"
    if site.edge_threads is not None:
        slowed["edge"]["THREADS"] = str(site.edge_threads)
    return {name: Variant(name, environment) for name, environment in slowed.items()}


@contextmanager
def staged(
    start: Start,
    site: Site,
    dispatchers: Mapping[str, Variant],
    edges: Mapping[str, Mapping[str, str]] | None = None,
    seed: int = 1,
) -> Iterator[Stage]:
    """Start both tiers and some dispatchers, with a proxy before each tier; the network lies before the edge.

    Dispatchers named in `edges` have an edge of their own, `edge-of-NAME`, of which that much is changed.
    """
    tiers = tier_variants(site)
    own = {n: Variant("edge", {**tiers["edge"].environment, **changed}) for n, changed in (edges or {}).items()}
    tiers |= {edge_of(name): variant for name, variant in own.items()}
    with ExitStack() as opened:
        proxies = {name: opened.enter_context(FaultProxy(seed=seed + n)) for n, name in enumerate(tiers)}
        joined = {}
        for name, variant in dispatchers.items():
            edge = proxies[edge_of(name) if name in own else "edge"]
            urls = {"DEVICE_URL": proxies["device"].url, "EDGE_URL": edge.url}
            joined[name] = Variant(variant.of, {**urls, **variant.environment})
        running = opened.enter_context(start({**joined, **tiers}))
        for name, proxy in proxies.items():
            proxy.target = running.urls[name]
            if name != "device":
                proxy.set(Faults(latency_ms=site.network_ms / 2))
        yield Stage(running, proxies)


def edge_of(dispatcher: str) -> str:
    """What the edge of one dispatcher alone is called."""
    return f"edge-of-{dispatcher}"


def slowed_to(
    measured: Callable[[Site], Mapping[str, float]],
    wanted_ms: Mapping[str, float],
    network_ms: float,
    say: Callable[[str], None] = lambda _text: None,
) -> Site:
    """The site at which replies, as `measured`, take `wanted_ms` on average; a tier that is slower stays so."""
    trials: list[tuple[Site, Mapping[str, float]]] = []
    site = Site(network_ms=network_ms, edge_threads=1)
    for _ in range(_TRIALS):
        found = measured(site)
        trials.append((site, found))
        say(", ".join(f"{n}: {found[n]:.1f} ms at slowdown {site.slowdown[n]:.2f}" for n in TIERS))
        factors = {n: solve([(s.slowdown[n], f[n]) for s, f in trials], wanted_ms[n]) for n in TIERS}
        site = replace(site, slowdown=factors)
    return site


def solve(trials: Sequence[tuple[float, float]], wanted_ms: float) -> float:
    """The slowdown at which a reply takes `wanted_ms`, from (slowdown, ms) of trials, the last two of them; at least 1.

    After one trial, all of the time is taken to be the passes'.
    """
    slowdown, taken_ms = trials[-1]
    if len(trials) == 1 or abs(trials[-1][0] - trials[-2][0]) < _LEAST_STEP:
        found = slowdown * wanted_ms / taken_ms
    else:
        (k1, ms1), (k2, ms2) = trials[-2:]
        slope = (ms2 - ms1) / (k2 - k1)
        found = k2 + (wanted_ms - ms2) / slope if slope > 0 else slowdown
    return min(_MOST, max(_LEAST, found))
