"""From start to stop: load in the background, serve, drain."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from functions.serving.errors import OverloadedError
from models.errors import ModelError

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_RETRY_AFTER_S = 2


class Lifecycle(Protocol):
    """What health routes need to know."""

    def reason_not_ready(self) -> str | None:
        """Why no requests are taken, or None."""


@dataclass
class Drain:
    """Set once, when the process is told to stop."""

    draining: bool = False

    def start(self) -> None:
        """From now on readiness says 503; requests that still arrive are answered."""
        self.draining = True

    def reason_not_ready(self) -> str | None:
        """Why no requests are taken, or None."""
        return "stopping" if self.draining else None


class Loading(Generic[T]):
    """Loads a value in a thread and holds it, or the reason why there is none."""

    def __init__(self, load: Callable[[], T], drain: Drain, loaded: Callable[[T], None]) -> None:
        self._load = load
        self._drain = drain
        self._loaded = loaded
        self._value: T | None = None
        self._reason: str | None = "loading"

    def start(self) -> None:
        """Begin; returns at once."""
        threading.Thread(target=self._run, name="load", daemon=True).start()

    def reason_not_ready(self) -> str | None:
        """Why no requests are taken, or None."""
        return self._reason or self._drain.reason_not_ready()

    def value(self) -> T:
        """The loaded value; raises `OverloadedError` (503) while there is none. A draining function still serves."""
        if self._value is None:
            message = f"the model is not ready: {self._reason}"
            raise OverloadedError(503, message, code="not_ready", retry_after_s=_RETRY_AFTER_S)
        return self._value

    def _run(self) -> None:
        try:
            value = self._load()
            self._loaded(value)
        except ModelError as error:
            self._reason = f"loading failed: {error}"
            _LOG.error("loading failed: %s", error)
        except Exception as error:  # noqa: BLE001  # whatever it is, readiness tells it
            self._reason = f"loading failed ({type(error).__name__}); the function's log has the details"
            _LOG.exception("loading failed")
        else:
            self._value, self._reason = value, None
            _LOG.info("ready")
