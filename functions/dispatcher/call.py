"""One question to a tier on its way: bounded in time, counted in bytes, its failures named.

TierFailedError     the tier gave no answer; `reason` as it goes into the reply
RefusedError        the tier refused the request; passed on to the caller
"""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from functions.dispatcher import wire
from functions.dispatcher.exchange import BrokenError, Exchange, Head, Traffic, UnreachedError
from functions.dispatcher.health import Health
from functions.dispatcher.wire import TierReply
from functions.serving.ask import CHAT, Ask
from functions.serving.errors import ApiError, RefusedError
from functions.serving.events import CONFIDENCE_HEADER, THRESHOLD_HEADER, End, Event, Piece, Report, Start

Happening = TierReply | Event | Exception
"""What a call tells: one whole reply; or the events of a stream; or, last of all, what went wrong."""

OK, TOO_MANY = 200, 429
_REPLY_BYTES = 16 << 20
_CONNECT_S = 1.0
_CLIENT_ERRORS = range(400, 500)
_UNAUTHORISED = 401
_UNREACHED = frozenset({502, 503, 504})
_NO_TIME = "deadline"
"""What our functions say when they let nobody in who would be late (`functions/serving/admission.py`)."""


class TierFailedError(Exception):
    """The tier was asked and did not answer. `retriable`: the connection broke, the tier itself may be well."""

    def __init__(self, reason: str, *, retriable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retriable = retriable


class Call:
    """A question under way: poll `sock` for `interest` until `expires`, then see `news`.

    `begun` and `pieces` are what an answer that is streamed, but wanted whole, has told so far.
    """

    def __init__(self, health: Health, exchange: Exchange, ask: Ask, remaining_s: float, *, stream: bool) -> None:
        self.begun: Start | None = None
        self.pieces: list[Piece] = []
        self.is_over = False
        self._health, self._exchange, self._ask = health, exchange, ask
        self._began = health.clock()
        self._limit_s = health.limit_s(ask.skill, remaining_s)
        self._is_ours = self._limit_s < remaining_s  # it ends before the request does: then the tier is to blame
        self._reader = wire.StreamReader(ask) if stream else None
        self._end: End | None = None

    @property
    def name(self) -> str:
        """The tier's."""
        return self._health.name

    @property
    def traffic(self) -> Traffic:
        """What it costs."""
        return self._exchange.traffic

    @property
    def sock(self) -> socket.socket:
        """What to poll."""
        return self._exchange.sock

    @property
    def interest(self) -> int:
        """For what to poll."""
        return self._exchange.interest

    @property
    def expires(self) -> float:
        """When there is no more waiting for what comes next."""
        if self._exchange.is_connected:
            return self._began + self._limit_s
        return self._began + min(self._limit_s, _CONNECT_S, self._limit_s / 2)

    @property
    def waited_s(self) -> float:
        """Seconds since it was put."""
        return self._health.clock() - self._began

    def news(self) -> Iterator[Happening]:
        """What has come, without waiting for more; whatever went wrong comes last, and nothing after it."""
        try:
            yield from self._collected(self._advanced())
            if not self.is_over and self._health.clock() >= self.expires:
                yield from self._late()
        except UnreachedError:
            self.close()
            self._health.breaker.refused()
            yield TierFailedError(self._unreached)
        except BrokenError:
            yield self._failed(self._unreached, retriable=True)
        except wire.MalformedReplyError:
            yield self._failed(f"{self.name}_error")
        except RefusedError as refusal:
            self.close()
            yield refusal

    def cut(self) -> None:
        """Nobody needs the answer any more: its connection closes, which frees the tier. May be called again."""
        if not self.is_over:
            self._health.late(self._ask.skill, self.waited_s, is_cut=True)
            self.close()

    def run_out(self) -> None:
        """The request has no time left: as `cut`, but what is known of the tier says whether that was its fault."""
        if not self.is_over:
            self._health.late(self._ask.skill, self.waited_s, is_cut=False)
            self.close()

    def close(self) -> None:
        """The exchange is over, well or not."""
        if not self.is_over:
            self.is_over = True
            self._exchange.close()
            self.traffic.seconds = self.waited_s

    def _advanced(self) -> Iterator[Happening]:
        """Take in what has come; where that breaks off a stream, what came before is still worth reading."""
        exchange, broken = self._exchange, None
        try:
            exchange.advance()
        except BrokenError as error:
            broken = error
        if len(exchange.body) > _REPLY_BYTES:
            raise wire.MalformedReplyError
        if exchange.head is not None and exchange.head.status == OK and self._reader is not None:
            yield from self._streamed(self._reader, exchange.head, is_all=exchange.is_over or broken is not None)
        elif exchange.head is not None and exchange.is_over:
            yield self._said(exchange.head.status, bytes(exchange.body))
        if broken is not None and not self.is_over:
            raise broken

    def _said(self, status: int, body: bytes) -> TierReply | Exception:
        if status != OK:
            return self._not_ok(status, as_json(body))
        reply = wire.read_reply(self._ask, as_json(body))
        self.close()
        self._health.answered(self._ask.skill, self.waited_s, _worked_s(reply.report))
        return reply

    def _streamed(self, reader: wire.StreamReader, head: Head, *, is_all: bool) -> Iterator[Event]:
        """What has come of a stream; its end once the last bytes are here, which let the connection be used again."""
        yield from self._events(reader, head)
        if not is_all:
            return
        if self._end is not None:
            yield self._ended(self._end)
        elif self._exchange.is_over:
            raise wire.MalformedReplyError

    def _events(self, reader: wire.StreamReader, head: Head) -> Iterator[Event]:
        for event in reader.feed(self._exchange.take_body()):
            if isinstance(event, End):
                self._end = event
            elif isinstance(event, Start):
                yield Start(event.model, event.report.model_copy(update=_foretold(head.headers)))
            else:
                yield event

    def _ended(self, end: End) -> End:
        self.close()
        took_s = None if self._ask.skill == CHAT else self.waited_s
        self._health.answered(self._ask.skill, took_s, _worked_s(end.report))
        return end

    def _collected(self, happenings: Iterator[Happening]) -> Iterator[Happening]:
        """A frame that comes in pieces, once it is whole; a chat as it comes."""
        for happening in happenings:
            if self._reader is None or self._ask.skill == CHAT:
                yield happening
            elif isinstance(happening, Start):
                self.begun = happening
            elif isinstance(happening, Piece):
                self.pieces.append(happening)
            elif isinstance(happening, End):
                yield self._joined(happening)
            else:
                yield happening

    def _joined(self, end: End) -> TierReply:
        return TierReply(
            model=self.begun.model if self.begun else self.name,
            text="".join(piece.text for piece in self.pieces),
            logprobs=tuple(logprob for piece in self.pieces for logprob in piece.logprobs),
            calls=(),
            finish_reason=end.finish_reason,
            usage=end.usage,
            report=end.report,
        )

    def _late(self) -> Iterator[Happening]:
        """Time is up: the connection's, that of this attempt, or the request's own. All may have been said, though."""
        if self._end is not None:
            yield from self._collected(iter([self._ended(self._end)]))
        elif not self._exchange.is_connected:
            raise UnreachedError
        elif self._is_ours:
            self.close()
            self._health.timed_out(self._ask.skill, self.waited_s)
            yield TierFailedError(f"{self.name}_timeout")
        else:
            self.run_out()
            yield TierFailedError("deadline")

    def _failed(self, reason: str, *, retriable: bool = False) -> TierFailedError:
        self.close()
        self._health.failed(self._ask.skill, self.waited_s)
        return TierFailedError(reason, retriable=retriable)

    def _not_ok(self, status: int, said: Any) -> Exception:
        """What a status other than 200 means; all but a refusal of the request is a failure of the tier."""
        if status == TOO_MANY or _code(said) == _NO_TIME:  # it is full, and well
            self.close()
            return TierFailedError("deadline" if _code(said) == _NO_TIME else f"{self.name}_busy")
        at_fault = status in _CLIENT_ERRORS and status != _UNAUTHORISED  # the key is ours, not the caller's
        refusal = _refusal(status, said) if at_fault else None
        if refusal is not None:
            self.close()
            return refusal
        # A 404 without our error body comes from a gateway that has no such function.
        unreached = status in _UNREACHED or status in _CLIENT_ERRORS
        return self._failed(self._unreached if unreached else f"{self.name}_error")

    @property
    def _unreached(self) -> str:
        return f"{self.name}_unavailable"


def poll(calls: Sequence[Call], until: float, now: float, bell: socket.socket | None = None) -> list[Call]:
    """Wait until a call has something to tell, one expires, `bell` can be read, or it is time; gives those calls."""
    poller = select.poll()
    for call in calls:
        poller.register(call.sock, call.interest)
    if bell is not None:
        poller.register(bell, select.POLLIN)
    wait_s = min(until, *(call.expires for call in calls)) - now if calls else until - now
    ready = {number for number, _ in poller.poll(max(0.0, 1e3 * wait_s))}
    return [call for call in calls if call.sock.fileno() in ready or wait_s >= call.expires - now]


def _worked_s(report: Report) -> float:
    return report.timing_ms.total / 1e3


def as_json(body: bytes) -> Any:
    """The value in a body; None if it is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _code(body: Any) -> Any:
    error = body.get("error") if isinstance(body, dict) else None
    return error.get("code") if isinstance(error, dict) else None


def _refusal(status: int, body: Any) -> ApiError | None:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    return RefusedError(status, error["message"], param=error.get("param"), code=error.get("code"))


def _foretold(headers: Mapping[str, str]) -> dict[str, float]:
    """Confidence and threshold, as far as the headers tell them."""
    told = {}
    for name, header in (("confidence", CONFIDENCE_HEADER), ("threshold", THRESHOLD_HEADER)):
        with suppress(ValueError):
            value = float(headers.get(header.lower(), "nan"))
            if 0 <= value <= 1:
                told[name] = value
    return told
