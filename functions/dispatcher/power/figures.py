"""The energy model's figures out of a file that the operator writes; each says where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from functions.serving.settings import ConfigError
from functions.serving.strict import Strict
from routing.energy import EDGE, Draw, Figures, Radio

_Name = Literal["device", "device, fewer threads", "idle", "edge"]
_LIMIT_BYTES = 65_536


class _Draw(Strict):
    watts: float = Field(ge=0, allow_inf_nan=False)
    source: str = Field(min_length=1)


class _Radio(Strict):
    joules_per_byte_sent: float = Field(ge=0, allow_inf_nan=False)
    joules_per_byte_received: float = Field(ge=0, allow_inf_nan=False)
    tail_joules: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    tail_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    source: str = Field(min_length=1)


class _File(Strict):
    draws: dict[_Name, _Draw] = Field(default_factory=dict)
    radio: _Radio | None = None


def load(path: Path, key: str) -> Figures:
    """Read the file that the setting `key` names; raises `ConfigError` naming the key and the field."""
    try:
        with path.open("rb") as file:
            values = _File.model_validate_json(file.read(_LIMIT_BYTES))
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{key}: {path}: {place + ': ' if place else ''}{first['msg']}") from None
    draws: dict[str, Draw] = {
        name: Draw(draw.watts, draw.source, on_battery=name != EDGE) for name, draw in values.draws.items()
    }
    return Figures(draws, Radio(**values.radio.model_dump()) if values.radio else None)


def with_card(figures: Figures, name: str, watts: float | None, source: str) -> Figures:
    """`figures`, and for `name` what the tier's card says, unless the operator gave a figure of their own."""
    if watts is None or not source.strip() or name in figures.draws:
        return figures
    return Figures({**figures.draws, name: Draw(watts, source, on_battery=name != EDGE)}, figures.radio)
