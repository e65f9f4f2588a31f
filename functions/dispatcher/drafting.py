"""Whether an escalated request takes the device's answer along, from what the edge said of earlier ones."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace

from functions.serving.events import Report, Usage
from routing import Acceptance, worth_drafting

_NEW = 0.2
"""The weight of the latest measurement."""

_UNKNOWN = Acceptance()


@dataclass(frozen=True)
class _Skill:
    """What is known of one skill; milliseconds, NaN: not measured yet."""

    acceptance: Acceptance = _UNKNOWN
    ignored: bool = False
    ms_per_token: float = math.nan
    ms_per_verified_token: float = math.nan
    round_trip_ms: float = 0.0


class Drafting:
    """One edge's, over all requests. Only answers make a skill known, since callers name what they like."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._skills: dict[str, _Skill] = {}

    def draft(self, skill: str, text: str, tokens: int) -> str:
        """`text` where it is worth sending, else nothing.

        The first escalation of a skill takes its draft along: only that shows whether the edge verifies any.
        """
        known = self._skills.get(skill)
        if known is None:
            return text
        if known.ignored:
            return ""
        worth = worth_drafting(
            known.round_trip_ms, known.acceptance.rate, tokens, known.ms_per_token, known.ms_per_verified_token
        )
        return text if worth else ""

    def learn(self, skill: str, usage: Usage, report: Report, took_ms: float) -> None:
        """Take in what the edge says of an answer that took so long here: its times, and what came of the draft."""
        timing, draft = report.timing_ms, report.draft
        with self._lock:
            known = self._skills.get(skill, _Skill())
            if draft is not None and draft.ignored:
                known = replace(known, ignored=True)
            elif draft is not None and 0 <= draft.accepted <= draft.proposed:
                known = replace(known, acceptance=known.acceptance.after(draft.proposed, draft.accepted))
            steps = usage.completion_tokens - (draft.accepted if draft is not None else 0)
            self._skills[skill] = replace(
                known,
                ms_per_token=_mean(known.ms_per_token, timing.decode, steps),
                ms_per_verified_token=_mean(known.ms_per_verified_token, timing.prefill, usage.prompt_tokens),
                round_trip_ms=max(0.0, took_ms - timing.total),
            )


def _mean(known: float, ms: float, count: int) -> float:
    """An exponential mean that begins with its first measurement."""
    if count <= 0 or ms <= 0:
        return known
    measured = ms / count
    return measured if math.isnan(known) else known + _NEW * (measured - known)
