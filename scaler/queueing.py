"""How many wait how long before `m` servers: estimates for G/G/m, pure and quick.

The chance to wait is Erlang's (C formula), from 4,096 servers on its limit (Halfin and Whitt, "Heavy-Traffic Limits for
Queues with Many Exponential Servers", Operations Research 1981). How long is the law of a reflected Brownian motion
after some time (Harrison, "Brownian Motion and Stochastic Flow Systems", 1985), also defined in overload; its limit is
the exponential tail with the mean wait of Allen and Cunneen ("Probability, Statistics, and Queueing Theory", 1990).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist

_EXACT_SERVERS = 4096
_SURE_DEVIATIONS = 30.0
_NORMAL = NormalDist()


def _spread_points() -> tuple[tuple[float, float], ...]:
    """Standard scores with their weights: eight in the lower 90 %, six up to 99 %, four above."""
    parts = ((0.0, 0.9, 8), (0.9, 0.99, 6), (0.99, 1.0, 4))
    return tuple(
        (_NORMAL.inv_cdf(low + (high - low) * (i + 0.5) / n), (high - low) / n)
        for low, high, n in parts
        for i in range(n)
    )


_POINTS = _spread_points()


@dataclass(frozen=True)
class Service:
    """Seconds a request takes once it is served, and their squared coefficient of variation; lognormal."""

    mean_s: float
    scv: float

    def quantile(self, share: float) -> float:
        """The seconds that `share` (0 to 1, exclusive) of the requests take at most."""
        mean, deviation = self._log
        return math.exp(mean + deviation * _NORMAL.inv_cdf(share))

    @cached_property
    def points(self) -> tuple[tuple[float, float], ...]:
        """Seconds and weights of typical requests, ascending."""
        mean, deviation = self._log
        return tuple((math.exp(mean + deviation * score), weight) for score, weight in _POINTS)

    @property
    def _log(self) -> tuple[float, float]:
        """Mean and deviation of the logarithm."""
        variance = math.log1p(self.scv)
        return math.log(self.mean_s) - variance / 2, math.sqrt(variance)


@dataclass(frozen=True)
class Load:
    """Arrivals a second with the squared coefficient of variation of the times between them, and what each takes."""

    rate: float
    scv: float
    service: Service

    @property
    def erlangs(self) -> float:
        """Servers kept busy."""
        return self.rate * self.service.mean_s


@lru_cache(maxsize=4096)
def chance_to_wait(servers: int, erlangs: float) -> float:
    """Erlang's C: the share of requests that find all servers busy; 1 in overload."""
    if erlangs >= servers:
        return 1.0
    if erlangs <= 0:
        return 0.0
    if servers > _EXACT_SERVERS:
        beta = (servers - erlangs) / math.sqrt(servers)
        return 0.0 if beta > _SURE_DEVIATIONS else 1 / (1 + beta * _NORMAL.cdf(beta) / _NORMAL.pdf(beta))
    blocked = 1.0
    for busy in range(1, servers + 1):
        blocked = erlangs * blocked / (busy + erlangs * blocked)
    return blocked / (1 - erlangs / servers * (1 - blocked))


def share_late(load: Load, servers: int, limit_s: float, backlog_s: float = 0.0, after_s: float = math.inf) -> float:
    """The share of requests that take longer than `limit_s`, waiting included, `after_s` after now.

    `backlog_s` is the work that waits now, in seconds of one server. Falls with `servers` and `limit_s`, grows with the
    rate and the backlog.
    """
    if servers <= 0:
        return 1.0
    wait = Wait.of(load, servers, backlog_s, after_s)
    return sum(weight * wait.longer_than(limit_s - taken_s) for taken_s, weight in load.service.points)


@dataclass(frozen=True)
class Wait:
    """The waiting time `after_s` after now: its drift and variance a second, what it begins with, Erlang's chance."""

    chance: float
    drift: float
    variance: float
    begin_s: float
    after_s: float

    @classmethod
    def of(cls, load: Load, servers: int, backlog_s: float, after_s: float) -> Wait:
        """Before `servers` servers."""
        busy = load.erlangs / servers
        variance = busy * load.service.mean_s * (load.scv + load.service.scv) / servers
        return cls(chance_to_wait(servers, load.erlangs), busy - 1, variance, backlog_s / servers, after_s)

    def longer_than(self, seconds: float) -> float:
        """The chance of a longer wait; 1 for a negative one."""
        if seconds < 0:
            return 1.0
        return max(self.chance * self._reflected(seconds), self._carried(seconds))

    def _reflected(self, seconds: float) -> float:
        """Reflected Brownian motion that begins at 0."""
        if self.variance <= 0:
            return float(self.drift > 0 and self.drift * self.after_s > seconds)
        if self.after_s == math.inf:
            return 1.0 if self.drift >= 0 else math.exp(2 * self.drift * seconds / self.variance)
        spread = math.sqrt(self.variance * self.after_s)
        moved_s = self.drift * self.after_s
        mirrored = _above((seconds + moved_s) / spread)
        grown = math.exp(min(700.0, 2 * self.drift * seconds / self.variance)) * mirrored if mirrored > 0 else 0.0
        return min(1.0, _above((seconds - moved_s) / spread) + grown)

    def _carried(self, seconds: float) -> float:
        """What is left of the backlog."""
        if self.begin_s <= 0:
            return 0.0
        if self.after_s == math.inf:
            return float(self.drift >= 0)
        left_s = self.begin_s + self.drift * self.after_s
        spread = math.sqrt(self.variance * self.after_s)
        return _above((seconds - left_s) / spread) if spread > 0 else float(left_s > seconds)


def _above(score: float) -> float:
    """The chance of a normal variable above `score` standard deviations."""
    return 0.5 * math.erfc(score / math.sqrt(2))
