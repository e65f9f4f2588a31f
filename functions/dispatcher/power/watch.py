"""Keeps an eye on the power: polls the sources in one thread, and says at any time how things stand."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from functions.dispatcher.power.source import Clock, PowerSource
from routing.power import REQUEST, Power, PowerLimits, PowerMode, Reading, next_power

_LOG = logging.getLogger(__name__)
_STOP_S = 2.0
_UNKNOWN = Power()
Listener = Callable[[Power], None]


class PowerWatch:
    """The latest of each source, and the state that follows from it.

    `limits` is asked at every step, so that a policy may change while this runs. One source that fails takes nothing
    from the others; what it said last holds until it has aged out. Setting `wake` makes the thread look at once.
    """

    def __init__(
        self,
        sources: Sequence[PowerSource],
        limits: Callable[[], PowerLimits] = PowerLimits,
        interval_s: float = 1.0,
        clock: Clock = time.monotonic,
        wake: threading.Event | None = None,
    ) -> None:
        self._sources = tuple(sources)
        self._limits = limits
        self._interval_s = interval_s
        self._clock = clock
        self._wake = wake or threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._latest: dict[str, tuple[Reading, ...]] = {}
        self._failing: set[str] = set()
        self._listeners: dict[object, Listener] = {}
        # Replaced as a whole, so that whoever reads it needs no lock.
        self._state: tuple[Power, tuple[Reading, ...]] = (Power(), ())

    def start(self) -> None:
        """Begin to poll; returns at once. Without sources there is nothing to do."""
        if self._sources and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="power", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread and close the sources; may be called again."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_STOP_S)
        for source in self._sources:
            source.close()

    def power(self, request_level: float | None = None) -> Power:
        """How things stand for a request that tells its own battery's level, or none. Never waits for a source.

        The level, if it is a share from 0 to 1, outranks the sensors for this request and moves nothing for others.
        Readings age here too, should the thread hang in a source.
        """
        power, readings = self._state
        if request_level is None and not readings:  # as on all that have no battery
            return _UNKNOWN
        now_s = self._clock()
        if request_level is not None:
            readings = (Reading(REQUEST, now_s, level=request_level), *readings)
        return next_power(self._limits(), power, readings, now_s)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` in the polling thread whenever the mode has changed; returns what ends that."""
        key = object()
        with self._lock:
            self._listeners[key] = listener
        return lambda: self._forget(key)

    def poll(self) -> Power:
        """Look at every source once, as the thread does."""
        for source in self._sources:
            reading = self._read(source)
            if reading is not None:
                self._latest[source.name] = _kept(self._latest.get(source.name, ()), reading)
        readings = tuple(reading for several in self._latest.values() for reading in several)
        before = self._state[0]
        power = next_power(self._limits(), before, readings, self._clock())
        self._state = (power, readings)
        if power.mode is not before.mode:
            self._tell(power, before.mode)
        return power

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            self.poll()
            self._wake.wait(self._interval_s)

    def _read(self, source: PowerSource) -> Reading | None:
        try:
            reading = source.read()
        except Exception as error:  # noqa: BLE001  # a library's fault must not end the watch
            if source.name not in self._failing:
                _LOG.warning("power source %s fails: %s", source.name, type(error).__name__)
            self._failing.add(source.name)
            return None
        self._failing.discard(source.name)
        return reading

    def _tell(self, power: Power, before: PowerMode) -> None:
        _LOG.info("power: %s → %s (level %s of %s, hot %s)", before, power.mode, power.level, power.source, power.hot)
        with self._lock:
            listeners = list(self._listeners.values())
        for listener in listeners:
            try:
                listener(power)
            except Exception:  # noqa: BLE001  # nor may whoever listens
                _LOG.exception("a listener to the power failed")

    def _forget(self, key: object) -> None:
        with self._lock:
            self._listeners.pop(key, None)


def _kept(before: tuple[Reading, ...], reading: Reading) -> tuple[Reading, ...]:
    """`reading`, and beside it the last level that its source told if it tells none now: that may only be a hiccup."""
    if reading.level is not None:
        return (reading,)
    levels = [one for one in before if one.level is not None]
    return (reading, *(replace(one, watts=None, celsius=None, throttled=None) for one in levels))
