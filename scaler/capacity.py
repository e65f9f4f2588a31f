"""How many replicas hold the target: a queueing estimate, a forecast, and the caution of scaling down. Pure.

What is ordered now serves a cold start later. So the smallest number is sought with which the forecast load, and the
queue that will be there by then, stay within the target until the next order can take effect. Time comes with the
readings; a `Capacity` remembers what it has been shown, and nothing else.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from scaler.forecast import Forecast, Rate, Smoothing
from scaler.queueing import Load, Service, share_late
from scaler.values import Decision, Reading, Target

_RATES = ((-1.2816, 0.2), (-0.5244, 0.2), (0.0, 0.2), (0.5244, 0.2), (1.2816, 0.2))
"""Standard scores of five equally likely rates."""


_SMOOTHING = Smoothing()


@dataclass(frozen=True)
class Tuning:
    """How quickly things are believed and forgotten; half lives and spans in seconds.

    `hold_s`: replicas wanted within it are kept. `least_slack`: where service alone misses the SLO, what more than its
    own percentile is held instead. `correction` bounds the factor on the work that observed latency may ask for, and
    `gain` is how far one look moves it.
    """

    smoothing: Smoothing = _SMOOTHING
    service_s: float = 120.0
    variation_s: float = 600.0
    hold_s: float = 60.0
    least_slack: float = 1.1
    correction: tuple[float, float] = (0.8, 2.0)
    gain: float = 0.05
    interval_s: float = 15.0


_TUNING = Tuning()


@dataclass
class Capacity:
    """Decides for one tier. Not for several threads."""

    target: Target
    tuning: Tuning = _TUNING
    forecast: Forecast = field(init=False)
    correction: float = field(init=False, default=1.0)
    _seen: _Seen = field(init=False, default_factory=lambda: _Seen())
    _wanted: deque[tuple[float, int]] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        """Begin with nothing seen."""
        self.forecast = Forecast(self.tuning.smoothing)

    def decide(self, reading: Reading) -> Decision:
        """The replicas wanted after this look; looks come in the order of their time."""
        self._learn(reading)
        wanted, why = self._demand(reading)
        ceiling = self.target.maximum
        if reading.power_ceiling is not None and reading.power_ceiling < ceiling:
            ceiling = max(self.target.minimum, reading.power_ceiling)
        held, why = self._held(reading, wanted, why)
        if held > ceiling:
            limit = "the maximum" if ceiling == self.target.maximum else "power"
            return Decision(ceiling, f"{why}; {limit} allows {ceiling}")
        if held < self.target.minimum:
            return Decision(self.target.minimum, f"{why}; the minimum is {self.target.minimum}")
        return Decision(held, why)

    # ---- what is learned ----

    def _learn(self, reading: Reading) -> None:
        if reading.at_s > self.forecast.at_s > -math.inf:
            self._seen.interval_s = reading.at_s - self.forecast.at_s
        passed_s = self._seen.interval_s or self.tuning.interval_s
        self.forecast = self.forecast.seen(reading.at_s, reading.arrivals_per_s)
        self._seen.learn(reading, passed_s, self.tuning)
        self._correct(reading)

    def _correct(self, reading: Reading) -> None:
        """Compare the percentile observed with the share that the model expects beyond it, while all is calm."""
        calm = reading.starting == 0 and reading.ready > 0 and not _backlog(reading, self.target.slots)
        if reading.latency_s is None or reading.latency_s <= 0 or not calm or self._seen.service_s is None:
            return
        allowed = 1 - self.target.percentile
        load = self._load(reading.arrivals_per_s)
        expected = share_late(load, reading.ready * self.target.slots, reading.latency_s)
        surprise = math.log(max(allowed, 1e-3) / max(expected, 1e-3))  # above 0: slower than expected
        low, high = self.tuning.correction
        self.correction = min(
            high, max(low, self.correction * math.exp(self.tuning.gain * max(-1.0, min(1.0, surprise))))
        )

    # ---- what is needed ----

    def _load(self, rate: float) -> Load:
        mean_s = max(1e-6, self._seen.service_s or 0.0) * self.correction
        return Load(rate, self._seen.arrivals_scv, Service(mean_s, self._seen.service_scv))

    def _demand(self, reading: Reading) -> tuple[int, str]:
        """The replicas that demand asks for, unbounded but for the search, and the sentence."""
        waiting = _backlog(reading, self.target.slots)
        if self._seen.service_s is None:
            busy = reading.in_flight > 0 or reading.arrivals_per_s > 0
            wanted = max(reading.ready + reading.starting, int(busy))
            return wanted, "no request has been measured yet: what is there is kept"
        if reading.in_flight <= 0 and reading.arrivals_per_s <= 0 and self.forecast.level < self._idle_rate:
            return 0, "nothing arrives"
        lead_s = self.target.cold_start_s + (self._seen.interval_s or self.tuning.interval_s)
        rate = self.forecast.ahead(lead_s)
        limit_s = self._limit_s(rate.mean)
        backlog_s = self._backlog_ahead(reading, rate.mean, lead_s, waiting)
        wanted = self._smallest(rate, limit_s, backlog_s)
        why = (
            f"{rate.mean:.2f} requests/s of {self._seen.service_s:.2f} s expected in {lead_s:.0f} s"
            f"{f' and {waiting:.0f} waiting' if waiting else ''}: {wanted} replicas keep"
            f" {100 * self.target.percentile:g} % within {limit_s:.2f} s"
        )
        if limit_s > self.target.slo_s:
            why += f" (service alone misses {self.target.slo_s:g} s)"
        return wanted, why

    @property
    def _idle_rate(self) -> float:
        """A rate at which less than one request comes in the time that replicas are kept."""
        return 1 / self.tuning.hold_s

    def _limit_s(self, rate: float) -> float:
        """The SLO, or what replicas can hold where service alone takes longer."""
        return max(
            self.target.slo_s, self.tuning.least_slack * self._load(rate).service.quantile(self.target.percentile)
        )

    def _backlog_ahead(self, reading: Reading, rate: float, lead_s: float, waiting: float) -> float:
        """Seconds of one slot that will wait once new replicas serve, if what is there works on."""
        load = self._load(rate)
        serving = self.target.slots * (reading.ready + reading.starting / 2)
        return max(0.0, waiting * load.service.mean_s + (load.erlangs - serving) * lead_s)

    def _smallest(self, rate: Rate, limit_s: float, backlog_s: float) -> int:
        """The smallest number that holds the target over the likely rates, by bisection; at most the maximum."""
        allowed = 1 - self.target.percentile
        low, high = self.target.minimum, self.target.maximum
        loads = [(self._load(max(0.0, rate.mean + score * rate.deviation)), weight) for score, weight in _RATES]
        requests = sum(weight * load.rate for load, weight in loads)
        after_s = self._seen.interval_s or self.tuning.interval_s

        def late(replicas: int) -> float:
            servers = replicas * self.target.slots
            shares = (w * load.rate * share_late(load, servers, limit_s, backlog_s, after_s) for load, w in loads)
            return sum(shares) / requests if requests > 0 else float(backlog_s > 0 and replicas == 0)

        while low < high:
            middle = (low + high) // 2
            if late(middle) <= allowed:
                high = middle
            else:
                low = middle + 1
        return low

    # ---- what is kept ----

    def _held(self, reading: Reading, wanted: int, why: str) -> tuple[int, str]:
        """Fewer than there are only after a while, while nothing starts and nothing is late."""
        self._wanted.append((reading.at_s, wanted))
        while self._wanted[0][0] < reading.at_s - self.tuning.hold_s:
            self._wanted.popleft()
        current = reading.ready + reading.starting
        if wanted >= current:
            return wanted, why
        late = reading.latency_s is not None and reading.latency_s > self._late_from_s(reading.arrivals_per_s)
        if late and (reading.in_flight > 0 or reading.arrivals_per_s > 0):
            return current, f"{why}; {current} are kept while answers take {reading.latency_s:.2f} s"
        if reading.starting > 0:
            return current, f"{why}; {current} are kept while {reading.starting} of them start"
        most = min(current, max(count for _, count in self._wanted))
        if most > wanted:
            return most, f"{why}; {most} were wanted in the last {self.tuning.hold_s:g} s"
        return wanted, why

    def _late_from_s(self, rate: float) -> float:
        return self.target.slo_s if self._seen.service_s is None else self._limit_s(rate)


@dataclass
class _Seen:
    """Running estimates; `seconds_per_token` belongs to the machine and changes slowly, the tokens to the requests."""

    interval_s: float = 0.0
    service_s: float | None = None
    service_scv: float = 1.0
    arrivals_scv: float = 1.0
    tokens: float | None = None
    seconds_per_token: float | None = None

    def learn(self, reading: Reading, passed_s: float, tuning: Tuning) -> None:
        quick = 1 - 2 ** (-passed_s / tuning.service_s)
        slow = 1 - 2 ** (-passed_s / tuning.variation_s)
        if reading.arrivals_scv is not None:
            self.arrivals_scv += slow * (reading.arrivals_scv - self.arrivals_scv)
        if reading.service_scv is not None:
            self.service_scv += slow * (reading.service_scv - self.service_scv)
        if reading.tokens_per_request is not None and reading.tokens_per_request > 0:
            self.tokens = _moved(self.tokens, reading.tokens_per_request, quick)
            if reading.service_s is not None:
                per_token = reading.service_s / reading.tokens_per_request
                self.seconds_per_token = _moved(self.seconds_per_token, per_token, slow)
        if reading.service_s is not None and reading.service_s > 0:
            self.service_s = _moved(self.service_s, reading.service_s, quick)
        elif self.tokens is not None and self.seconds_per_token is not None:
            self.service_s = self.tokens * self.seconds_per_token


def _moved(value: float | None, seen: float, share: float) -> float:
    return seen if value is None else value + share * (seen - value)


def _backlog(reading: Reading, slots: int) -> float:
    """Requests that wait: as told, or what is in flight beyond the slots."""
    return max(reading.queued, reading.in_flight - reading.ready * slots, 0.0)
