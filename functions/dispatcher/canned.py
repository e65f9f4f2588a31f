"""What is said when no tier can answer."""

from __future__ import annotations

MODEL = "canned"

_ELSE = "I can't answer right now. Please try again in a moment."
_BY_REASON = {
    "local_only": "This request may not leave the device, and there is nothing on it that could answer.",
    "deadline": "There was not enough time to answer. Please try again, or allow more time.",
}


def text_for(reason: str) -> str:
    """The message for a reason of the fallback."""
    return _BY_REASON.get(reason, _ELSE)
