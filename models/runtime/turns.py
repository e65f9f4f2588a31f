"""Who uses the engine next, and with whom. Knows nothing of models.

Flat combining (Hendler et al. 2010): there is no thread that serves. Whoever comes while nobody leads does the work
of all who wait, the most urgent first, until its own is done, and then hands the lead on; so one caller alone meets no
other thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 0.5
"""How long a shared run waits for those who shared the last one, as a share of the time such a run takes."""
_SMOOTHING = 0.2

Run = Callable[[Sequence[Any]], None]
Clock = Callable[[], float]


@dataclass(eq=False)
class _Job:
    who: Hashable
    deadline: float
    number: int
    run: Run
    shared: bool
    most: int | None
    place: int
    done: bool = False
    error: BaseException | None = None
    woken: threading.Lock = field(default_factory=threading.Lock)

    @property
    def urgency(self) -> tuple[float, int]:
        return self.deadline, self.number


@dataclass(frozen=True)
class TurnStats:
    """Since the start: shared runs, the turns that were taken in them, and how long they took."""

    shared_runs: int = 0
    shared_turns: int = 0
    shared_s: float = 0.0


class Turns:
    """Lets one run happen at a time, earliest deadline first; turns of one kind that may be shared become one run."""

    def __init__(self, patience: float = PATIENCE, clock: Clock = time.perf_counter) -> None:
        self._patience, self._clock = patience, clock
        self._changed = threading.Condition()
        self._queue: list[_Job] = []
        self._led = False
        self._expected: dict[Hashable, Run] = {}  # who shared a run and has not been heard of since
        self._shared_s = 0.0  # how long a shared run takes, smoothed
        self._count = 0
        self._stats = TurnStats()

    @property
    def stats(self) -> TurnStats:
        """How well turns were shared."""
        return self._stats

    def take(
        self,
        who: Hashable,
        deadline: float,
        run: Run,
        *,
        shared: bool = False,
        most: int | None = None,
        place: int = 0,
    ) -> None:
        """Return when `run` was called with `who` among its sequence of one or, if `shared`, several.

        Runs are shared between turns with an equal `run`. Whatever it raises is raised here, for each who shared it.

        By default all go together, and whoever shared a run is waited for. Where `most` says how many may, nobody is
        waited for once there are so many, so that others can be elsewhere meanwhile; if there are more, the most
        urgent takes along who is nearest by `place`.
        """
        with self._changed:
            self._expected.pop(who, None)
            alone = not self._led and not self._expected  # where nobody leads, nobody waits either
            if alone:
                self._led = True
        if alone:
            self._serve_alone(who, run, shared=shared)
        else:
            self._queued(_Job(who, deadline, 0, run, shared, most, place))

    def _serve_alone(self, who: Hashable, run: Run, *, shared: bool) -> None:
        """Lead for one turn that meets nobody, which most do: a shorter way to what `_queued` would come to."""
        began = self._clock()
        try:
            run([who])
            if shared:
                with self._changed:
                    self._note(run, [who], self._clock() - began)
        finally:
            with self._changed:
                self._hand_on()

    def _queued(self, job: _Job) -> None:
        with self._changed:
            self._count += 1
            job.number = self._count
            self._queue.append(job)
            leads, self._led = not self._led, True
            if not leads:
                job.woken.acquire()
                self._changed.notify()
        if not leads:
            job.woken.acquire()  # released when the job is done or, if it is not, the lead is ours
        if not job.done:
            self._lead(job)
        if job.error is not None:
            raise job.error

    def leave(self, who: Hashable) -> None:
        """Say that no turn of `who` is to be waited for."""
        with self._changed:
            if self._expected.pop(who, None):
                self._changed.notify()

    def _lead(self, own: _Job) -> None:
        try:
            while not own.done:
                self._serve(self._next())
        finally:
            with self._changed:
                if own in self._queue:  # interrupted
                    self._queue.remove(own)
                self._hand_on()

    def _hand_on(self) -> None:
        """Let the most urgent of those who wait lead, if there is one."""
        if self._queue:
            min(self._queue, key=lambda job: job.urgency).woken.release()
        else:
            self._led = False

    def _next(self) -> list[_Job]:
        """Take the most urgent job out of the queue, with those that share its run."""
        with self._changed:
            gives_up = self._clock() + self._patience * self._shared_s
            while True:
                jobs = self._together()
                missing = self._missing(jobs)
                if not missing:
                    break
                left_s = gives_up - self._clock()
                if left_s <= 0:
                    for who in missing:
                        del self._expected[who]
                    break
                self._changed.wait(left_s)
            self._queue = [job for job in self._queue if job not in jobs]
            return jobs

    def _together(self) -> list[_Job]:
        """The most urgent job, and those in the queue that would share its run."""
        first = min(self._queue, key=lambda job: job.urgency)
        if not first.shared:
            return [first]
        jobs = [job for job in self._queue if job.shared and job.run == first.run]
        if first.most is None or len(jobs) <= first.most:
            return jobs
        return sorted(jobs, key=lambda job: abs(job.place - first.place))[: first.most]

    def _missing(self, jobs: Sequence[_Job]) -> list[Hashable]:
        """Who is to be waited for before these have their run."""
        first = jobs[0]
        if not first.shared or (first.most is not None and len(jobs) >= first.most):
            return []
        return [who for who, run in self._expected.items() if run == first.run]

    def _serve(self, jobs: Sequence[_Job]) -> None:
        began = self._clock()
        error: BaseException | None = None
        try:
            jobs[0].run([job.who for job in jobs])
        except BaseException as raised:  # noqa: BLE001  # it is raised again where the turn was taken
            error = raised
        took_s = self._clock() - began
        with self._changed:
            if jobs[0].shared and error is None:
                self._note(jobs[0].run, [job.who for job in jobs], took_s)
            for job in jobs:
                job.error, job.done = error, True
                if job.woken.locked():
                    job.woken.release()

    def _note(self, run: Run, members: Sequence[Hashable], took_s: float) -> None:
        s = self._stats
        self._stats = TurnStats(s.shared_runs + 1, s.shared_turns + len(members), s.shared_s + took_s)
        self._shared_s += (took_s - self._shared_s) * (_SMOOTHING if self._shared_s else 1.0)
        self._expected.update(dict.fromkeys(members, run))
