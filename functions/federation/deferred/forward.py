"""Forward kept questions to the edge, one at a time, the oldest first; while it is out of reach, ever less often."""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable

from functions.federation.deferred.edge import AskEdge, NotNowError
from functions.federation.deferred.store import ANSWERED, REFUSED, DeferredStore, Record
from functions.federation.errors import StoreError

_FIRST_S, _LONGEST_S = 0.5, 60.0
_LOG = logging.getLogger(__name__)


class Forwarder:
    """A thread between the store and the edge. `told` is called with each record that became final."""

    def __init__(
        self,
        store: DeferredStore,
        edge: AskEdge,
        told: Callable[[Record], None],
        first_s: float = _FIRST_S,
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self._store = store
        self._edge = edge
        self._told = told
        self._first_s = first_s
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="forward", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def wake(self) -> None:
        """A question came in."""
        self._wake.set()

    def stop(self) -> None:
        """End after the question at hand; what is not answered stays in the store."""
        self._stopped.set()
        self._wake.set()
        self._thread.join()

    def forward_one(self) -> bool | None:
        """Try the oldest question; None if there is none, False if the edge cannot be reached."""
        record = self._store.next()
        if record is None:
            return None
        try:
            reply = self._edge.ask(record.question.request)
        except NotNowError:
            self.outcomes["not_now"] += 1
            return False
        status = REFUSED if reply.refused else ANSWERED
        if self._store.finish(record.question, status, reply.body):
            self.outcomes[status] += 1
            finished = self._store.get(record.question.id)
            if finished is not None:
                self._told(finished)
        return True

    def _run(self) -> None:
        tries = 0
        while not self._stopped.is_set():
            try:
                went = self.forward_one()
            except StoreError as error:
                _LOG.error("deferred questions wait: %s", error)  # the sentence says it
                went = False
            if went is None:
                tries = 0
                self._wake.wait()
                self._wake.clear()
            elif went:
                tries = 0
            else:
                pause_s = min(_LONGEST_S, self._first_s * 2**tries)
                tries = min(tries + 1, 16)
                self._stopped.wait(pause_s * random.uniform(0.5, 1.0))
