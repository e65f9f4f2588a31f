"""How a tier has been doing: its circuit breaker, and how long it took lately."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from functions.dispatcher.breaker import Breaker
from functions.serving.ask import CHAT
from functions.serving.recent import Recent

# A frame is given up after so many times what nearly all of the tier's last ones took, but not before that time.
_PATIENCE = 3.0
_LEAST_TIMEOUT_S = 0.1
# For so long a tier that is seldom asked counts as known.
_KNOWN_S = 3600.0
# Of what a tier's answers take beyond its own work, so many make do with what is kept back for it.
_AWAY_SHARE = 0.9
# Kept back for that as long as it is not known, whichever is less; and never more than that share.
_RETURN_SHARE, _RETURN_MAX_S, _MOST_AWAY = 0.05, 0.05, 0.5
# With less time than this nothing is held against a tier that has not answered.
_LEAST_PATIENCE_S = 0.05


class Health:
    """One tier's; each call adds to it, from any thread. `timeout_s`: the longest an answer is waited for."""

    def __init__(
        self, name: str, timeout_s: float, breaker: Breaker, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.breaker = breaker
        self.clock = clock
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._recent: dict[str, Recent] = {}
        self._away = Recent(keeps_s=_KNOWN_S)
        self._answered_at = -math.inf

    def takes_s(self, skill: str, share: float, *, lately: bool = False) -> float | None:
        """What that share of its last answers to the skill took at most, network included; None: too few to say.

        `lately`: also None where nobody has heard of it for a while.
        """
        recent = self._recent.get(skill)
        if recent is None:
            return None
        with self._lock:
            now = self.clock()
            return recent.percentile(share, now) if recent.is_fresh(now) or not lately else None

    def limit_s(self, skill: str, remaining_s: float) -> float:
        """The longest to wait. A frame has a usual time; a chat is as long as it is."""
        usual_s = None if skill == CHAT else self.takes_s(skill, 0.99)
        patience_s = self._timeout_s if usual_s is None else max(_LEAST_TIMEOUT_S, _PATIENCE * usual_s)
        return min(remaining_s, self._timeout_s, patience_s)

    def granted_s(self, left_s: float) -> float:
        """How much of the time left it may use, so that its answer is here in time: less the way there and back."""
        with self._lock:
            away_s = self._away.percentile(_AWAY_SHARE, self.clock())
        if away_s is None:
            away_s = min(_RETURN_MAX_S, _RETURN_SHARE * left_s)
        return left_s - min(away_s, _MOST_AWAY * left_s)

    def answered(self, skill: str, took_s: float | None, worked_s: float = 0.0) -> None:
        """It answered; `took_s` is None where that says nothing of the next time, `worked_s` what it says it needed."""
        self._answered_at = self.clock()
        self.breaker.answered()
        if took_s is None:
            return
        self._note(skill, took_s)
        if 0 < worked_s <= took_s:
            with self._lock:
                self._away.add(took_s - worked_s, self.clock())

    def failed(self, skill: str, waited_s: float) -> None:
        """It took the question and gave no answer, or nonsense."""
        if self._is_long(skill, waited_s):
            self._note(skill, waited_s)
        self.breaker.failed()

    def late(self, skill: str, waited_s: float, *, is_cut: bool) -> None:
        """It was given up: because another was sooner (`is_cut`), or at the end of the request's own time.

        A tier answers within the time it is granted, so that one of which nothing is known is to blame at the deadline;
        else one that was given up sooner than usual may be well.
        """
        unknown = self.takes_s(skill, 0.99) is None
        is_silent = unknown and not is_cut and waited_s >= _LEAST_PATIENCE_S
        if is_silent or self._is_long(skill, waited_s):
            self.timed_out(skill, waited_s)

    def timed_out(self, skill: str, waited_s: float) -> None:
        """It took longer than it may. One that answered somebody else meanwhile is busy, not sick."""
        if self._is_long(skill, waited_s):
            self._note(skill, waited_s)
        if self._answered_at < self.clock() - waited_s:
            self.breaker.failed()

    def _is_long(self, skill: str, waited_s: float) -> bool:
        """Longer than usual: that counts too, so that time-outs grow with a tier that has become slow.

        Only an answer makes a skill known, since callers name what they like.
        """
        usual_s = self.takes_s(skill, 0.99)
        return usual_s is not None and waited_s > usual_s

    def _note(self, skill: str, took_s: float) -> None:
        with self._lock:
            self._recent.setdefault(skill, Recent(keeps_s=_KNOWN_S)).add(took_s, self.clock())
