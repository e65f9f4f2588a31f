"""What ranks tell each other, and the seam behind which it travels. Knows no network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.errors import RankLostError

Floats = NDArray[np.float32]


class Exchange(Protocol):
    """One rank's end. All ranks make the same calls in the same order; both raise `RankLostError` if another failed."""

    def total(self, part: Floats) -> Floats:
        """The sum of all ranks' parts, added in the order of ranks: every rank gets bitwise the same."""

    def joined(self, part: Floats) -> Floats:
        """All ranks' parts, one behind the other along the last axis; of use to rank 0 only."""


class Threads:
    """Ranks that are threads of this process; `end(n)` is rank n's."""

    def __init__(self, count: int) -> None:
        self._parts: list[Floats | None] = [None] * count
        self._all_here = threading.Barrier(count)

    def end(self, number: int) -> Exchange:
        """The end of one rank."""
        return _ThreadEnd(self, number)

    def abort(self) -> None:
        """Let ranks that wait for one that failed go on with an error."""
        self._all_here.abort()

    def reset(self) -> None:
        """Begin anew after an error."""
        self._all_here.reset()

    def meet(self, number: int, part: Floats, combine: Callable[[list[Floats]], Floats]) -> Floats:
        """Lay down a part, and combine all once they are there."""
        self._parts[number] = part
        try:
            self._all_here.wait()
            found = combine([given for given in self._parts if given is not None])
            self._all_here.wait()  # nobody lays the next part down before all have read these
        except threading.BrokenBarrierError as error:
            raise RankLostError("another rank failed in the midst of a pass") from error
        return found


class _ThreadEnd:
    def __init__(self, threads: Threads, number: int) -> None:
        self._threads, self._number = threads, number

    def total(self, part: Floats) -> Floats:
        return self._threads.meet(self._number, part, _sum)

    def joined(self, part: Floats) -> Floats:
        return self._threads.meet(self._number, part, lambda parts: np.concatenate(parts, axis=-1))


def _sum(parts: list[Floats]) -> Floats:
    total = parts[0].copy()
    for other in parts[1:]:
        total += other
    return total
