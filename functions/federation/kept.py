"""What the routes that keep and share have in common: names, who may come in, errors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from flask import request
from pydantic import Field

from functions.federation.errors import STORE_ERRORS, translate
from functions.serving.admission import Gate
from functions.serving.errors import RefusedError
from functions.serving.parse import DATA_CLASS_HEADER, HeaderFields

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, description="letters, digits, . _ - and at most 128 of them")]
_MOST_AT_ONCE, _MOST_WAITING = 16, 32
_QUEUE_S = 2.0


class Door:
    """Lets so many calls at a time to what is kept, none of them local-only."""

    def __init__(self) -> None:
        self._gate = Gate(_MOST_AT_ONCE, _MOST_WAITING)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold a place while the block runs; raises `ApiError`, also for what went wrong in it."""
        if HeaderFields.read(dict(request.headers)).local_only:
            raise local_only()
        with self._gate.admitted(time.monotonic() + _QUEUE_S):
            try:
                yield
            except STORE_ERRORS as error:
                raise translate(error) from error


def local_only() -> RefusedError:
    """What is local-only is neither shared nor kept."""
    message = "this is local-only, and what is sent here is kept for others; keep it on your device"
    return RefusedError(403, message, param=DATA_CLASS_HEADER, code="local_only")
