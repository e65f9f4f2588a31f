"""How many replicas hold the target: a queueing estimate, a forecast, and what the last half hour would have needed.

What is ordered now serves a cold start later. So three numbers are computed, and the greatest is wanted: the replicas
that the forecast load needs (`scaler.queueing`), those that clear the queue which will be there when they serve, and
the floor that bursts too quick for any order would have needed lately (`scaler.rehearsal`). Pure: time comes with the
readings; a `Capacity` remembers what it has been shown, and nothing else.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from scaler.forecast import Forecast, Smoothing
from scaler.queueing import Load, Service, share_late
from scaler.rehearsal import LEAST_SLACK, Habit, Past, Terms, cheapest
from scaler.values import Decision, Reading, Target

_LEVELS_S = (8.0, 30.0, 120.0)
_HOLDS_S = (15.0, 30.0, 60.0)
_CLEARS_S = (5.0, 15.0, 45.0)
_IDLES = (1.0, 0.8, 0.6, 0.4)
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.5)
_PATIENCES = (0.0, 0.15, 0.3, 0.45)


@dataclass(frozen=True)
class Tuning:
    """How quickly things are believed and forgotten; spans and half lives in seconds.

    What competes in a rehearsal: half lives of the rate (`levels_s`), how long what was wanted is kept (`holds_s`), in
    what time a queue is cleared (`clears_s`), the floor's share while nothing arrives (`idles`). `memory_s` is what is
    rehearsed, every `review_s`, once it spans `least_memory_s`; until then the habit is a cautious one. `interval_s`:
    how often orders are taken. `idle_s`: after so long without a request a tier that may go to zero does.
    `least_slack`: where service alone misses the SLO, what more than its own percentile is held instead.
    `most_correction` bounds the factor on the work that late answers may ask for; `gain` is how far one look moves it.
    """

    levels_s: tuple[float, ...] = _LEVELS_S
    holds_s: tuple[float, ...] = _HOLDS_S
    clears_s: tuple[float, ...] = _CLEARS_S
    idles: tuple[float, ...] = _IDLES
    shares: tuple[float, ...] = _SHARES
    patiences: tuple[float, ...] = _PATIENCES
    memory_s: float = 1800.0
    review_s: float = 120.0
    least_memory_s: float = 300.0
    service_s: float = 120.0
    variation_s: float = 600.0
    interval_s: float = 15.0
    idle_s: float = 180.0
    least_slack: float = 1.1
    most_correction: float = 2.0
    gain: float = 0.02


_TUNING = Tuning()
_ROUNDING = 0.02
"""Rates are rounded up, and service times to either side, so that searches can be remembered."""
_STEP = math.log1p(_ROUNDING)
_NEAR = 1.1
"""A floor that is nearer than this is an estimate not worth a cold start."""
_START_HOLD_S, _START_CLEAR_S = 60.0, 15.0


@dataclass
class Capacity:
    """Decides for one tier. Not for several threads."""

    target: Target
    tuning: Tuning = _TUNING
    correction: float = field(init=False, default=1.0)
    habit: Habit = field(init=False)
    _forecasts: list[Forecast] = field(init=False)
    _seen: _Seen = field(init=False)
    _past: deque[Past] = field(init=False, default_factory=deque)
    _past_s: float = field(init=False, default=0.0)
    _reviewed_s: float = field(init=False, default=-math.inf)
    _busy_s: float = field(init=False, default=-math.inf)
    _wanted: deque[tuple[float, int]] = field(init=False, default_factory=deque)
    _needed: dict[int, int] = field(init=False, default_factory=dict)
    _needed_for: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        """Begin with nothing seen."""
        levels = self.tuning.levels_s
        self.habit = Habit(1, _START_HOLD_S, _START_CLEAR_S)
        self._forecasts = [Forecast(Smoothing(level_s=level)) for level in levels]
        self._seen = _Seen()

    def decide(self, reading: Reading) -> Decision:
        """The replicas wanted after this look; looks come in the order of their time."""
        self._review(reading.at_s)
        self._learn(reading)
        wanted, why = self._demand(reading)
        held, why = self._held(reading, wanted, why)
        ceiling = self.target.maximum
        if reading.power_ceiling is not None and reading.power_ceiling < ceiling:
            ceiling = max(self.target.minimum, reading.power_ceiling)
        if held > ceiling:
            limit = "the maximum" if ceiling == self.target.maximum else "power"
            return Decision(ceiling, f"{why}; {limit} allows {ceiling}")
        if held < self.target.minimum:
            return Decision(self.target.minimum, f"{why}; the minimum is {self.target.minimum}")
        return Decision(held, why)

    # ---- what is learned ----

    def _learn(self, reading: Reading) -> None:
        before_s = self._forecasts[0].at_s
        passed_s = reading.at_s - before_s if reading.at_s > before_s > -math.inf else self.tuning.interval_s
        arrived = reading.arrivals_per_s * passed_s if reading.arrived is None else reading.arrived
        self._forecasts = [forecast.seen(reading.at_s, arrived / passed_s) for forecast in self._forecasts]
        self._seen.learn(reading, passed_s, self.tuning)
        if arrived > 0 or reading.in_flight > 0 or self._busy_s == -math.inf:
            self._busy_s = reading.at_s
        self._correct(reading)
        if self._seen.service_s is not None:
            demands = tuple(self._needs(index) for index in range(len(self._forecasts)))
            self._past.append(Past(passed_s, arrived, arrived * self._load(1.0).service.mean_s, demands))
            self._past_s += passed_s
        while self._past_s > self.tuning.memory_s:
            self._past_s -= self._past.popleft().length_s

    def _correct(self, reading: Reading) -> None:
        """More work than measured is assumed while answers are late though nothing waits or starts, else ever less."""
        calm = reading.starting == 0 and reading.ready > 0 and not _backlog(reading, self.target.slots)
        if reading.latency_s is None or not calm or self._seen.service_s is None:
            return
        over = min(1.0, reading.latency_s / self._limit_s() - 1)
        step = self.tuning.gain * over if over > 0 else -self.tuning.gain * (self.correction - 1)
        self.correction = min(self.tuning.most_correction, max(1.0, self.correction + step))

    def _review(self, now_s: float) -> None:
        """Rehearse what came before this look, now and then."""
        if self._past_s < self.tuning.least_memory_s or now_s - self._reviewed_s < self.tuning.review_s:
            return
        self._reviewed_s = now_s
        terms = Terms(
            slo_s=self._limit_s(),
            allowed_late=1 - self.target.percentile,
            maximum=self.target.maximum,
            slots=self.target.slots,
            lead_s=self._lead_s,
        )
        self.habit = cheapest(self._past, self._neighbours(), self._load(1.0).service, terms)

    def _neighbours(self) -> Iterator[Habit]:
        """The habit, and those with another estimate, another idle floor, or another way to keep and to clear."""
        habit, tuning = self.habit, self.tuning
        yield habit
        yield from (replace(habit, estimate=index) for index in range(len(tuning.levels_s)))
        yield from (replace(habit, idle=idle) for idle in tuning.idles)
        yield from (replace(habit, hold_s=hold, clear_s=clear) for hold in tuning.holds_s for clear in tuning.clears_s)
        waits_s = [part * self._limit_s() for part in tuning.patiences]
        yield from (replace(habit, share=share, patience_s=wait_s) for share in tuning.shares for wait_s in waits_s)

    # ---- what is needed ----

    @property
    def _lead_s(self) -> float:
        """From a look until what it orders serves: orders are taken half an interval later in the mean."""
        return self.target.cold_start_s + self.tuning.interval_s / 2

    def _load(self, rate: float) -> Load:
        mean_s = max(1e-6, self._seen.service_s or 0.0) * self.correction
        return Load(rate, self._seen.arrivals_scv, Service(mean_s, self._seen.service_scv))

    def _limit_s(self) -> float:
        """The SLO, or what replicas can hold where service alone takes longer."""
        alone_s = self._load(1.0).service.quantile(self.target.percentile)
        return max(self.target.slo_s, self.tuning.least_slack * alone_s)

    def _demand(self, reading: Reading) -> tuple[int, str]:
        """The replicas that are wanted now, unbounded but for the search, and the sentence."""
        if self._seen.service_s is None:
            busy = reading.in_flight > 0 or reading.arrivals_per_s > 0
            wanted = max(reading.ready + reading.starting, int(busy))
            return wanted, "no request has been measured yet: what is there is kept"
        idle_s = reading.at_s - self._busy_s
        if self.target.minimum == 0 and idle_s >= self.tuning.idle_s:
            return 0, f"nothing has come for {idle_s:.0f} s"
        waiting = _backlog(reading, self.target.slots)
        rate = self._forecasts[self.habit.estimate].ahead(self._lead_s).mean
        needed = self.habit.following(self._needs(self.habit.estimate))
        width = reading.ready * self.target.slots
        clearing = self.habit.clearing(waiting * self._load(1.0).service.mean_s, width, self.target.slots)
        floor = self.habit.floor_at(reading.arrivals_per_s if reading.arrived is None else reading.arrived)
        limit_s = self._limit_s()
        why = (
            f"{rate:.2f} requests/s of {self._seen.service_s:.2f} s expected: {needed} replicas keep"
            f" {100 * self.target.percentile:g} % within {limit_s:.2f} s"
        )
        if limit_s > self.target.slo_s:
            why += f", as service alone misses {self.target.slo_s:g} s"
        if clearing:
            why += f", {clearing} more clear the {waiting:.0f} that wait"
        if floor > needed + clearing:
            current = reading.ready + reading.starting
            if current < floor <= current * _NEAR:
                floor = max(current, needed + clearing)
            why += f", but the bursts of late need {floor}"
        return max(floor, needed + clearing), why

    def _needs(self, index: int) -> int:
        """What one estimate's forecast asks for."""
        return self._smallest(self._forecasts[index].ahead(self._lead_s).mean)

    def _smallest(self, rate: float) -> int:
        """The smallest number that holds the target at a steady rate (rounded up by at most 2 %); up to the maximum."""
        if rate * self.tuning.memory_s < 1:
            return 0
        service = self._load(1.0).service
        if not self._needed_for or abs(service.mean_s / self._needed_for - 1) > _ROUNDING:
            self._needed.clear()
            self._needed_for = service.mean_s
        step = math.ceil(math.log(rate) / _STEP)
        if step not in self._needed:
            self._needed[step] = self._search(self._load(math.exp(step * _STEP)))
        return self._needed[step]

    def _search(self, load: Load) -> int:
        limit_s = self._limit_s()
        # As `share_late` counts them: where service alone is late too often, no number of replicas would do.
        alone = sum(weight for taken_s, weight in load.service.points if taken_s > limit_s)
        allowed = max(1 - self.target.percentile, LEAST_SLACK * alone)
        low, high = 1, max(1, self.target.maximum)
        while low < high:
            middle = (low + high) // 2
            if share_late(load, middle * self.target.slots, limit_s) <= allowed:
                high = middle
            else:
                low = middle + 1
        return low

    # ---- what is kept ----

    def _held(self, reading: Reading, wanted: int, why: str) -> tuple[int, str]:
        """Fewer than there are only after a while, while nothing starts and nothing is late."""
        hold_s = self.habit.hold_s
        self._wanted.append((reading.at_s, wanted))
        while self._wanted[0][0] < reading.at_s - max(self.tuning.holds_s):
            self._wanted.popleft()
        current = reading.ready + reading.starting
        if wanted >= current:
            return wanted, why
        late = reading.latency_s is not None and reading.latency_s > self._late_from_s
        if late and (reading.in_flight > 0 or reading.arrivals_per_s > 0):
            return current, f"{why}; {current} are kept while answers take {reading.latency_s:.2f} s"
        if reading.starting > 0:
            return current, f"{why}; {current} are kept while {reading.starting} of them start"
        most = min(current, max(count for at_s, count in self._wanted if at_s >= reading.at_s - hold_s))
        if most > wanted:
            return most, f"{why}; {most} were wanted in the last {hold_s:g} s"
        return wanted, why

    @property
    def _late_from_s(self) -> float:
        return self.target.slo_s if self._seen.service_s is None else self._limit_s()


@dataclass
class _Seen:
    """Running estimates; `seconds_per_token` belongs to the machine and changes slowly, the tokens to the requests."""

    service_s: float | None = None
    service_scv: float = 1.0
    arrivals_scv: float = 1.0
    tokens: float | None = None
    seconds_per_token: float | None = None

    def learn(self, reading: Reading, passed_s: float, tuning: Tuning) -> None:
        quick = 1 - 2 ** (-passed_s / tuning.service_s)
        slow = 1 - 2 ** (-passed_s / tuning.variation_s)
        if reading.arrivals_scv is not None:
            self.arrivals_scv += slow * (min(reading.arrivals_scv, 4.0) - self.arrivals_scv)
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
