"""Who gets in: so many at work, so many waiting by deadline, everyone else is refused at once.

How many are at work adapts: three in ten fewer each time an answer comes late that should not have, one more after as
many timely ones as there are places (additive increase, multiplicative decrease); at first, after lateness, after ten
times as many: what was too much a moment ago probably still is.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from functions.serving.errors import ApiError, ClientLeftError, OverloadedError
from functions.serving.recent import Recent

_LOOK_EVERY_S = 0.1
"""How often one who waits looks whether the caller is still there."""
_DECREASE = 0.7
_CALM_S = 5.0
_WARY = 0.1
"""Share of the usual increase right after a decrease; all of it once nothing was late for so many seconds."""
_LEAST_SHARE = 1 / 12
"""Of `max_inflight`: a tier that is slow for another reason must not shut the door altogether."""
_LATE_SHARE = 0.1
"""An answer that used up its time but for this share was cut short by its deadline."""
_LONGEST_RETRY_AFTER_S = 60


@dataclass(order=True)
class _Turn:
    """One who waits; the earliest deadline is first, and among equals who came first."""

    expires: float
    number: int
    called: threading.Event = field(default_factory=threading.Event, compare=False)
    hopeless: bool = field(default=False, compare=False)


@dataclass
class Place:
    """One request at work, which waited so long for that. What is answered without its tier says `is_answer` False.

    `is_late`: nothing better was had in time; else whether the answer is late is told by when it comes. Without
    `has_time` it waited in vain, and all it can have is an answer that takes none.
    """

    waited_s: float
    has_time: bool = True
    is_answer: bool = True
    is_late: bool = False


class Gate:
    """Admits up to `max_inflight` requests, lets `queue_limit` wait, refuses the rest with 429.

    Who has too little time left for what answers take is refused with 503 instead of being let in for nothing; of those
    who waited, only where `keeps_all` is not set: then they are let in, at once, for an answer that takes no time.
    """

    def __init__(
        self,
        max_inflight: int,
        queue_limit: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        keeps_all: bool = False,
    ) -> None:
        self._max_inflight = max_inflight
        self._queue_limit = queue_limit
        self._clock = clock
        self._keeps_all = keeps_all
        self._lock = threading.Lock()
        self._inflight = 0
        self._limit = float(max_inflight)
        self._next_decrease = self._decreased = -math.inf
        self._queue: list[_Turn] = []
        self._numbers = 0
        self._took = Recent()

    @property
    def inflight(self) -> int:
        """Requests admitted."""
        return self._inflight

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def limit(self) -> int:
        """Requests that may be at work at the moment."""
        return int(self._limit)

    @property
    def full(self) -> bool:
        """True when the next request would be refused."""
        return self._inflight >= self.limit and len(self._queue) >= self._queue_limit

    def refuse_early(self, expires: float) -> None:
        """Raise `OverloadedError` where `admitted` would at once, before anything of a request is read.

        `expires` is as late as it may turn out to be.
        """
        if self.full:
            raise self._too_many()
        with self._lock:
            if self._inflight >= self.limit and self._has_no_hope(_Turn(expires, self._numbers + 1)):
                raise self._too_late()

    @contextmanager
    def admitted(self, expires: float, gone: Callable[[], bool] = lambda: False) -> Iterator[Place]:
        """Hold a place while the block runs; gives it, for the block to say what came of it.

        `expires` is when, on the clock, waiting is of no more use. Raises `OverloadedError` when the queue is full or
        there is no hope (at once) or, unless all who wait are kept, the time is up; and `ClientLeftError` once the
        caller is `gone`.
        """
        came = self._clock()
        place = self._enter(came, expires, gone)
        try:
            if gone():
                raise ClientLeftError
            yield place
        finally:
            self._leave(place, came, expires)

    def _enter(self, came: float, expires: float, gone: Callable[[], bool]) -> Place:
        with self._lock:
            if self._inflight < self.limit:
                self._inflight += 1
                return Place(0.0)
            if len(self._queue) >= self._queue_limit:
                raise self._too_many()
            self._numbers += 1
            turn = _Turn(expires, self._numbers)
            if self._has_no_hope(turn):
                raise self._too_late()
            heapq.heappush(self._queue, turn)
        error: ApiError | None = None
        while (left_s := expires - self._clock()) > 0:
            if turn.called.wait(min(left_s, _LOOK_EVERY_S)):
                break
            if gone():
                error = ClientLeftError()
                break
        has_time = self._take(turn, error)
        return Place(self._clock() - came, has_time)

    def _take(self, turn: _Turn, error: ApiError | None) -> bool:
        """Take the place that was handed over, maybe in the last moment; else leave the queue. False: in vain."""
        with self._lock:
            if not turn.called.is_set():
                self._queue.remove(turn)
                heapq.heapify(self._queue)
                turn.hopeless = True
            if not turn.hopeless:
                return True
            if error or not self._keeps_all:
                raise error or self._too_late()
            self._inflight += 1
            return False

    def _leave(self, place: Place, came: float, expires: float) -> None:
        with self._lock:
            now, began = self._clock(), came + place.waited_s
            late = place.is_late or now - came >= (1 - _LATE_SHARE) * (expires - came)
            if place.has_time and (late or place.is_answer):
                self._adapt(now, began, expires - came, late=late)
            if place.is_answer and place.has_time:
                self._took.add(now - began, now)
            self._inflight -= 1
            while self._queue and self._inflight < self.limit:
                turn = heapq.heappop(self._queue)  # the place goes straight to whoever has the earliest deadline
                turn.hopeless = turn.expires - now < (self._took.percentile(0.1, now) or 0.0)
                self._inflight += not turn.hopeless
                turn.called.set()

    def _adapt(self, now: float, began: float, granted_s: float, *, late: bool) -> None:
        """One place more or fewer. Who never had the time that answers take says nothing about the load."""
        usual_s = self._took.percentile(0.5, now)
        if late:
            if usual_s is not None and granted_s > usual_s and now >= self._next_decrease:
                self._limit = max(1.0, _LEAST_SHARE * self._max_inflight, _DECREASE * self._limit)
                self._next_decrease = now + (now - began)  # what is at work now was let in before
                self._decreased = now
        elif self._inflight >= self.limit:
            share = min(1.0, max(_WARY, (now - self._decreased) / _CALM_S))
            self._limit = min(self._max_inflight, self._limit + share / self._limit)

    def _has_no_hope(self, turn: _Turn) -> bool:
        """Whether those with an earlier deadline will probably leave the turn too little time for its own answer."""
        now = self._clock()
        usual_s = self._took.percentile(0.5, now)
        if usual_s is None:
            return False
        before = sum(other < turn for other in self._queue) + 1
        return turn.expires - now < usual_s * (1 + before / self.limit)

    def _too_many(self) -> OverloadedError:
        return self._overloaded(429, "too many requests; come back later", "overloaded")

    def _too_late(self) -> OverloadedError:
        return self._overloaded(503, "the deadline passed, or would pass, while the request waits", "deadline")

    def _overloaded(self, status: int, message: str, code: str) -> OverloadedError:
        """With the time after which those who wait now will probably be done; whole seconds, at least one."""
        usual_s = self._took.percentile(0.5, self._clock()) or 0.0
        clear_s = usual_s * (len(self._queue) + 1) / self.limit
        retry_after_s = min(_LONGEST_RETRY_AFTER_S, max(1, math.ceil(clear_s)))
        return OverloadedError(status, message, code=code, retry_after_s=retry_after_s)
