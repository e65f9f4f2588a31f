"""What all request schemas share: strict models, and bounds on text."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_TEXT = 65_536

Text = Annotated[str, Field(max_length=MAX_TEXT)]


class Strict(BaseModel):
    """Frozen, strict types, unknown fields refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
