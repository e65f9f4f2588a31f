"""What is said when no tier can answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from functions.serving.ask import Ask

MODEL = "canned"
RULES = "rules"
"""The source of a frame that no model made."""

_ELSE = "I can't answer right now. Please try again in a moment."
_BY_REASON = {
    "battery": "The battery is too low to answer. Please charge it and try again.",
    "local_only": "This request may not leave the device, and there is nothing on it that could answer.",
    "deadline": "There was not enough time to answer. Please try again, or allow more time.",
}


class Fallback(Protocol):
    """Answers without a model, at once."""

    def answer(self, ask: Ask, reason: str) -> str | Mapping[str, Any] | None:
        """A text, a frame, or None; `reason` says why no model answers. Raises nothing."""


class Canned:
    """The fallback that always has something to say."""

    def answer(self, ask: Ask, reason: str) -> str:  # noqa: ARG002  # others look at it
        """The message for a reason."""
        return _BY_REASON.get(reason, _ELSE)
