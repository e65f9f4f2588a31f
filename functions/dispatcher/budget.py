"""A budget for what is done twice: so many in a hundred requests, and never a storm."""

from __future__ import annotations

import threading

_BURST = 3.0
_MOST = 10.0


class Budget:
    """A token bucket that requests fill: each adds a share, each retry or hedge takes one.

    Over any run of n requests at most `share·n + 10` are taken, over the first ones `share·n + 3`. A share of 0 means
    none at all. (After the retry budgets of Finagle, and the Google SRE book, chapter 22.)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = _BURST

    def deposit(self, share: float) -> None:
        """One more request has come; with a share of 0 what was saved is lost."""
        with self._lock:
            self._tokens = min(_MOST, self._tokens + share) if share else 0.0

    @property
    def available(self) -> bool:
        """Whether one could be taken now."""
        return self._tokens >= 1

    def take(self) -> bool:
        """Take one; False where there is none."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True
