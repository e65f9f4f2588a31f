"""One thread looks at every trigger that is asked about, again and again; whoever asks only reads what it found."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from scaler.errors import CrowdedError, SourceError
from scaler.tolerance import asked
from scaler.trigger import Trigger
from scaler.values import Decision, Reading

_LOG = logging.getLogger(__name__)
_LOOKERS = 8
"""Looks at a time: a source that hangs delays its own trigger, not the others."""


class Looks(Protocol):
    """Reads one trigger's signals and replicas."""

    def look(self, now_s: float) -> Reading:
        """Look once; raises `SourceError`."""
        ...


class Decides(Protocol):
    """Turns readings into decisions, one after the other."""

    def decide(self, reading: Reading) -> Decision:
        """The replicas wanted after this reading."""
        ...


class Watches(Protocol):
    """Is told what happens, for metrics."""

    def looked(self, trigger: Trigger, answer: Answer | None) -> None:
        """A look ended, with an answer or in vain."""
        ...

    def forgot(self, trigger: Trigger) -> None:
        """Nobody asks for it any more."""
        ...

    def watching(self, triggers: int) -> None:
        """So many triggers are looked at."""
        ...


@dataclass(frozen=True)
class Answer:
    """What is known of a trigger: `value` is the metric's, `decision` what it comes from; `at_s` when it was read."""

    at_s: float
    value: int
    decision: Decision

    @property
    def active(self) -> bool:
        """Whether at least one replica is wanted."""
        return self.decision.replicas > 0


@dataclass(frozen=True)
class Bounds:
    """How often to look, when to forget, and how many triggers there may be."""

    poll_s: float = 5.0
    forget_s: float = 600.0
    max_triggers: int = 64


@dataclass
class _Watched:
    """One trigger; `fault` is why the last look gave nothing."""

    looks: Looks
    decides: Decides
    asked_s: float
    answer: Answer | None = None
    fault: str = "its signals are being read for the first time; ask again in a moment"
    running: Future[None] | None = None


Opens = Callable[[Trigger], tuple[Looks, Decides]]
"""Makes what looks at a trigger and what decides for it; starts nothing."""


class Gatherer:
    """Knows the newest answer for each trigger. `start` it, and `stop` it; `open_trigger` wires one trigger."""

    def __init__(
        self, open_trigger: Opens, watches: Watches, bounds: Bounds, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._open = open_trigger
        self._watches = watches
        self._bounds = bounds
        self._clock = clock
        self._watched: dict[Trigger, _Watched] = {}
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gather", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End; whoever waits for a change is woken."""
        self._stopped.set()
        self._wake.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def stopped(self) -> bool:
        """Whether it was told to end."""
        return self._stopped.is_set()

    def answer(self, trigger: Trigger) -> Answer:
        """The newest answer; the first to ask has the trigger looked at from now on.

        Raises `SourceError` while there is none or it is too old, and `CrowdedError` if there are too many triggers.
        """
        with self._changed:
            return self._answer(trigger)

    def await_change(self, trigger: Trigger, active: bool | None, timeout_s: float) -> bool | None:
        """Whether it is active, as soon as that differs from `active`; `active` if that takes longer or is not known.

        Raises `CrowdedError` if there are too many triggers.
        """
        ends_s = time.monotonic() + timeout_s
        with self._changed:
            while not self.stopped:
                now_active = self._active(trigger, active)
                left_s = ends_s - time.monotonic()
                if now_active != active or left_s <= 0:
                    return now_active
                self._changed.wait(left_s)
        return active

    def look(self) -> None:
        """Forget what nobody asks for, then begin a look at each trigger and wait for those that end within a poll."""
        with ThreadPoolExecutor(_LOOKERS) as pool:
            self._begin(pool)

    def _answer(self, trigger: Trigger) -> Answer:
        now_s = self._clock()
        watched = self._watched.get(trigger)
        if watched is None:
            watched = self._register(trigger, now_s)
        watched.asked_s = now_s
        if watched.answer is None:
            raise SourceError(f"there is no answer for '{trigger.function}': {watched.fault}")
        age_s = now_s - watched.answer.at_s
        if age_s > trigger.stale_s:
            why = watched.fault or "looks take too long"
            raise SourceError(f"the last answer for '{trigger.function}' is {age_s:.0f} s old: {why}")
        return watched.answer

    def _active(self, trigger: Trigger, otherwise: bool | None) -> bool | None:
        try:
            return self._answer(trigger).active
        except SourceError:
            return otherwise

    def _register(self, trigger: Trigger, now_s: float) -> _Watched:
        if len(self._watched) >= self._bounds.max_triggers:
            most = self._bounds.max_triggers
            raise CrowdedError(f"{most} triggers are watched already, the most there may be; see SCALER_MAX_TRIGGERS")
        self._watched[trigger] = _Watched(*self._open(trigger), asked_s=now_s)
        self._watches.watching(len(self._watched))
        self._wake.set()
        return self._watched[trigger]

    def _run(self) -> None:
        pool = ThreadPoolExecutor(_LOOKERS, thread_name_prefix="look")
        while not self.stopped:
            self._wake.clear()
            self._begin(pool)
            self._wake.wait(self._bounds.poll_s)
        pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor) -> None:
        now_s = self._clock()
        with self._changed:
            for trigger in [t for t, w in self._watched.items() if now_s - w.asked_s > self._bounds.forget_s]:
                del self._watched[trigger]
                self._watches.forgot(trigger)
                self._watches.watching(len(self._watched))
            for trigger, watched in self._watched.items():
                due = watched.answer is None or now_s - watched.answer.at_s >= self._bounds.poll_s / 2
                if due and (watched.running is None or watched.running.done()):
                    watched.running = pool.submit(self._look, trigger, watched)

    def _look(self, trigger: Trigger, watched: _Watched) -> None:
        """Look, decide, tell. No fault of one trigger may end the looking."""
        answer, fault = None, ""
        try:
            reading = watched.looks.look(self._clock())
            decision = watched.decides.decide(reading)
            answer = Answer(reading.at_s, _value(trigger, decision, reading), decision)
        except SourceError as error:
            fault = str(error)
        except Exception:  # noqa: BLE001  # whatever it is, the answer says that there is none
            _LOG.exception("looking at '%s' failed", trigger.function)
            fault = "something broke here; the scaler's log says where"
        with self._changed:
            watched.fault = fault
            if answer is not None:
                watched.answer = answer
            self._changed.notify_all()
        if fault:
            _LOG.warning("'%s': %s", trigger.function, fault)
        self._watches.looked(trigger, answer)


def _value(trigger: Trigger, decision: Decision, reading: Reading) -> int:
    return asked(decision.replicas, reading.ready + reading.starting, trigger.tolerance)
