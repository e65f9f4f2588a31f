"""One question put to a tier: a thread of the pool works on it, and what comes of it falls into the asker's inbox."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import closing
from queue import SimpleQueue
from typing import Any, cast

from functions.dispatcher.leash import Leash
from functions.dispatcher.ledger import Exchange
from functions.dispatcher.tier_client import TierClient
from functions.dispatcher.wire import TierReply
from functions.serving.ask import Ask
from functions.serving.events import Event

Happening = TierReply | Event | Exception
"""What a call tells: one whole reply; or the events of a stream; or, last of all, what went wrong."""

Inbox = SimpleQueue["tuple[Call, Happening] | None"]
"""Where an asker waits for all its calls; None only wakes it."""


class Call:
    """A question under way. `exchange` counts what it costs, `waited_s` how long ago it was put."""

    def __init__(self, client: TierClient, ask: Ask, exchange: Exchange, expires: float) -> None:
        self.client = client
        self.exchange = exchange
        self._ask = ask
        self._began = time.monotonic()
        self._expires = expires
        self._leash = Leash(expires)

    def start(self, executor: Executor, inbox: Inbox, *, stream: bool) -> None:
        """Put the question; returns at once."""
        executor.submit(self._work, inbox, stream)

    @property
    def waited_s(self) -> float:
        """Seconds since it was put."""
        return time.monotonic() - self._began

    def cut(self) -> None:
        """Nobody needs the answer any more: close the connection, which frees the tier."""
        self._leash.cut()

    def _work(self, inbox: Inbox, stream: bool) -> None:
        try:
            with closing(self._happenings(stream)) as happenings:
                for happening in happenings:
                    inbox.put((self, happening))
        except Exception as error:  # noqa: BLE001  # the asker's thread raises or translates it
            inbox.put((self, error))

    def _happenings(self, stream: bool) -> Iterator[Any]:
        remaining_s = self._expires - time.monotonic()
        if stream:
            return cast("Any", self.client.stream(self._ask, remaining_s, self.exchange.traffic, self._leash))
        return (self.client.ask(ask, remaining_s, self.exchange.traffic, self._leash) for ask in (self._ask,))
