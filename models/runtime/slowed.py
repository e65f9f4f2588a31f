"""A slower machine, for benches: each forward pass lasts a multiple of its own time. Knows nothing of models."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class SlowedSession:
    """An onnxruntime session; after each run it sleeps until the run took `factor` times as long.

    It sleeps in the caller's turn, so the cost grows with the work as on a slower machine, and leaves the processor to
    the other tiers.
    """

    def __init__(
        self,
        session: Any,
        factor: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._session, self._factor, self._clock, self._sleep = session, factor, clock, sleep

    def run_with_iobinding(self, *args: Any) -> None:
        """As onnxruntime's."""
        self._slowed(self._session.run_with_iobinding, *args)

    def run_with_ort_values(self, *args: Any) -> Any:
        """As onnxruntime's."""
        return self._slowed(self._session.run_with_ort_values, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def _slowed(self, run: Callable[..., Any], *args: Any) -> Any:
        began = self._clock()
        result = run(*args)
        self._sleep((self._factor - 1) * (self._clock() - began))
        return result
