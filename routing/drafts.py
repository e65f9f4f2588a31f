"""Whether to send an answer along as a draft when a request is escalated. Pure: measurements come in as values."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_GAIN = 0.05
"""Of the round trip: what saves less drowns in its jitter."""
FIRST_PIECE, PIECE = 8, 32
"""Tokens that a tier verifies at once: as many as agreed so far, within these bounds (`models.runtime.drafts`)."""
_PRIOR_TOKENS = 4.0
"""How many observed tokens the first guess of an acceptance counts for."""
_KEPT = 0.98
"""Share of what was observed that outlives each further draft, so that the estimate follows a change."""


@dataclass(frozen=True)
class Acceptance:
    """How likely a draft's next token is right if all before it were, learned online; `guess` is where it begins.

    Until the first disagreement each token is a trial (the model of Leviathan et al. 2023, arXiv 2211.17192, section
    3.1); what stands behind it was never tried.
    """

    guess: float = 0.5
    right: float = 0.0
    wrong: float = 0.0

    @property
    def rate(self) -> float:
        """Between 0 and 1."""
        return (_PRIOR_TOKENS * self.guess + self.right) / (_PRIOR_TOKENS + self.right + self.wrong)

    def after(self, proposed: int, accepted: int) -> Acceptance:
        """What is known once a tier has said what came of a draft; raises `ValueError` for what cannot be."""
        if not 0 <= accepted <= proposed:
            raise ValueError(f"{accepted} tokens of {proposed} cannot have been accepted")
        return Acceptance(self.guess, _KEPT * self.right + accepted, _KEPT * self.wrong + (accepted < proposed))


def expected_tokens(acceptance: float, tokens: int) -> float:
    """How many of a draft's first tokens are right on average: acceptance + acceptance² + … (`tokens` terms)."""
    if acceptance >= 1:
        return float(tokens)
    return acceptance * (1 - acceptance**tokens) / (1 - acceptance)


def tokens_looked_at(acceptance: float, tokens: int) -> float:
    """How many of a draft's tokens a tier looks at on average: piece after piece until one has a disagreement."""
    looked_at, at = 0.0, 0
    while at < tokens:
        piece = min(max(at, FIRST_PIECE), PIECE, tokens - at)
        looked_at += acceptance**at * piece
        at += piece
    return looked_at


def worth_drafting(
    round_trip_ms: float, acceptance: float, tokens: int, ms_per_token: float, ms_per_verified_token: float
) -> bool:
    """Whether an escalated request is answered sooner with a draft of so many tokens than without.

    A token that is right saves a step of the larger tier (`ms_per_token`), each that is looked at costs
    `ms_per_verified_token`. Both ways cross the network once, so the round trip only says how much a gain must be to
    be noticed. What is not known yet (NaN, or nothing measured) is not worth it.
    """
    if tokens <= 0 or not 0 <= acceptance <= 1:
        return False
    saved_ms = expected_tokens(acceptance, tokens) * ms_per_token
    gain_ms = saved_ms - tokens_looked_at(acceptance, tokens) * ms_per_verified_token
    return math.isfinite(gain_ms) and gain_ms > LEAST_GAIN * max(round_trip_ms, 0.0)
