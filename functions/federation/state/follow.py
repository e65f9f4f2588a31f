"""Follow the shared log and forget here what was deleted on another node."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from functions.federation.errors import StoreError
from functions.federation.state.log import DELETED, StateLog

_PAGE = 100
_WAIT_S = 1.0
_AGAIN_S = 1.0
_LOG = logging.getLogger(__name__)


class Follower:
    """A thread that calls `forget` with each deleted conversation; from the oldest kept on, so none is missed."""

    def __init__(self, log: StateLog, forget: Callable[[str], int]) -> None:
        self._log = log
        self._forget = forget
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End within a wait."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        after = 0
        while not self._stopped.is_set():
            try:
                self._log.wait(after, _WAIT_S)
                page = self._log.read(after, _PAGE)
                for entry in page.entries:
                    if entry.event.kind == DELETED:
                        self._forget(entry.event.conversation)
                after = page.upto
            except StoreError as error:
                _LOG.warning("deletions elsewhere are not seen now: %s", error)
                self._stopped.wait(_AGAIN_S)
