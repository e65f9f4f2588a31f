"""A reading in words, as a file or a topic carries it: a level alone, or a JSON object."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from functions.serving.strict import Strict
from routing.power import Reading

LIMIT_BYTES = 4096


class _Message(Strict):
    """The fields of the object; any may be left out."""

    level: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    charging: bool | None = None
    watts: float | None = Field(default=None, allow_inf_nan=False)
    celsius: float | None = Field(default=None, allow_inf_nan=False)
    throttled: bool | None = None


def parse(content: str | bytes, source: str, at_s: float) -> Reading | None:
    """`0.42`, or `{"level": 0.42, "charging": false, "watts": 5.1, "celsius": 61, "throttled": false}`; else None."""
    text = content.strip() if isinstance(content, str) else content.decode("utf-8", "replace").strip()
    if len(text) > LIMIT_BYTES:
        return None
    try:
        fields = _Message.model_validate_json(text) if text.startswith("{") else _Message(level=float(text))
    except ValueError:  # pydantic's ValidationError is one
        return None
    return _reading(fields, source, at_s)


def from_object(content: Any, source: str, at_s: float) -> Reading | None:
    """The same, where JSON was read already."""
    try:
        return _reading(_Message.model_validate(content), source, at_s)
    except ValidationError:
        return None


def _reading(fields: _Message, source: str, at_s: float) -> Reading | None:
    """None where nothing was told."""
    told = fields.model_dump(exclude_none=True)
    return Reading(source, at_s, **told) if told else None
