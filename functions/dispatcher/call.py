"""One question put to a tier: a thread of the pool works on it, and what comes of it falls into the asker's inbox."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from queue import SimpleQueue

from functions.dispatcher.leash import Leash
from functions.dispatcher.ledger import Exchange
from functions.dispatcher.tier_client import TierClient
from functions.dispatcher.wire import TierReply
from functions.serving.ask import CHAT, Ask
from functions.serving.events import End, Event, Piece, Start

Happening = TierReply | Event | Exception
"""What a call tells: one whole reply; or the events of a stream; or, last of all, what went wrong."""

Inbox = SimpleQueue["tuple[Call, Happening] | None"]
"""Where an asker waits for all its calls; None only wakes it."""


class Call:
    """A question under way. `exchange` counts what it costs, `waited_s` tells how long ago it was put.

    `begun` and `pieces` are what an answer that is streamed, but wanted whole, has told so far.
    """

    def __init__(self, client: TierClient, ask: Ask, exchange: Exchange, expires: float) -> None:
        self.begun: Start | None = None
        self.pieces: list[Piece] = []
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

    @property
    def collects(self) -> bool:
        """Whether an answer that is streamed is wanted whole: a frame is, a chat is not."""
        return self._ask.skill != CHAT

    def collected(self, happening: Happening) -> Happening | None:
        """A frame that comes in pieces, once it is whole; anything but pieces as it is."""
        if isinstance(happening, Start):
            self.begun = happening
        elif isinstance(happening, Piece):
            self.pieces.append(happening)
        elif isinstance(happening, End):
            return self._whole(happening)
        else:
            return happening
        return None

    def _whole(self, end: End) -> TierReply:
        return TierReply(
            model=self.begun.model if self.begun else self.client.name,
            text="".join(piece.text for piece in self.pieces),
            logprobs=tuple(logprob for piece in self.pieces for logprob in piece.logprobs),
            calls=(),
            finish_reason=end.finish_reason,
            usage=end.usage,
            report=end.report,
        )

    def cut(self) -> None:
        """Nobody needs the answer any more: close the connection, which frees the tier."""
        self._leash.cut()

    def _work(self, inbox: Inbox, stream: bool) -> None:
        remaining_s, traffic = self._expires - time.monotonic(), self.exchange.traffic
        try:
            if not stream:
                inbox.put((self, self.client.ask(self._ask, remaining_s, traffic, self._leash)))
                return
            for event in self.client.stream(self._ask, remaining_s, traffic, self._leash):
                inbox.put((self, event))
        except Exception as error:  # noqa: BLE001  # the asker's thread raises or translates it
            inbox.put((self, error))
