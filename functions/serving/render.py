"""Write an answer's events as one JSON body, as text, or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, cast

from flask import Response

from functions.serving.ask import Ask, Shape
from functions.serving.errors import ApiError, BrokenOffError, ClientLeftError
from functions.serving.events import CallDelta, End, Event, Events, Logprob, Piece, Report, Start, Switch, Usage
from functions.serving.replies import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    InvokeReply,
    Reply,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    ToolCallDelta,
    ToolCallReply,
)

EVENT_STREAM = "text/event-stream"
_DONE = "data: [DONE]\n\n"
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Failed = Callable[[Exception], None]


@dataclass
class Whole:
    """A finished answer; `refuses`: its text is none in the form that was asked for."""

    start: Start
    text: str
    logprobs: list[Logprob]
    calls: list[CallDelta]
    refuses: bool
    end: End


def collect(events: Events, gone: Callable[[], bool]) -> Whole:
    """Read all events; raises `ClientLeftError`, with the events closed, once `gone` says that nobody waits."""
    with closing(cast("Any", events)):
        first = next(events)
        assert isinstance(first, Start), "an answer begins with Start"  # noqa: S101  # a bug, not bad input
        pieces = list[Piece]()
        for event in events:
            if isinstance(event, Piece):
                pieces.append(event)
            elif isinstance(event, Switch):
                pieces.clear()
            elif isinstance(event, End):
                return _whole(first, pieces, event)
            if gone():
                raise ClientLeftError
    raise BrokenOffError(500, "the answer broke off", code="broken_off")


def _whole(start: Start, pieces: list[Piece], end: End) -> Whole:
    logprobs = [logprob for piece in pieces for logprob in piece.logprobs]
    calls: dict[int, CallDelta] = {}
    for delta in (call for piece in pieces for call in piece.calls):
        begun = calls.get(delta.index, delta)
        arguments = delta.arguments if begun is delta else begun.arguments + delta.arguments
        calls[delta.index] = replace(begun, arguments=arguments)
    text = "".join(piece.text for piece in pieces)
    return Whole(start, text, logprobs, list(calls.values()), any(piece.refuses for piece in pieces), end)


def whole(ask: Ask, answer: Whole, *, as_text: bool) -> Response:
    """The reply to a request that does not stream."""
    headers = answer.end.report.headers()
    if as_text:
        return Response(answer.text + "\n", mimetype="text/plain", headers=headers)
    body = _whole_body(ask, answer)
    return Response(body.json_text(), mimetype="application/json", headers=headers)


def stream(ask: Ask, events: Events, gone: Callable[[], bool], failed: Failed) -> Response:
    """The reply to a request that streams. Errors before the first event are raised, later ones become an event."""
    first = next(events)
    assert isinstance(first, Start), "an answer begins with Start"  # noqa: S101  # a bug, not bad input
    writer = _Writer(ask, first.model)
    lines = _server_sent(writer, events, gone, failed)
    response = Response(chain([writer.opening()], lines), mimetype=EVENT_STREAM)
    response.headers.update({**_STREAM_HEADERS, **first.report.headers()})
    # A generator that was not begun runs no `finally`: close the events themselves.
    response.call_on_close(cast("Any", events).close)
    return response


def _server_sent(writer: _Writer, events: Events, gone: Callable[[], bool], failed: Failed) -> Iterator[str]:
    try:
        for event in events:
            if gone():  # the first write after the client left still succeeds
                raise ClientLeftError  # noqa: TRY301  # told and counted like any other end
            yield from writer.lines(event)
    except Exception as error:  # noqa: BLE001  # the status line is out: tell the client in the stream
        failed(error)
        shown = error if isinstance(error, ApiError) else BrokenOffError(500, "the answer broke off", code="broken_off")
        yield f"data: {json.dumps(shown.body())}\n\n"
        return
    yield _DONE


def _whole_body(ask: Ask, answer: Whole) -> Reply:
    report, end = answer.end.report, answer.end
    if ask.shape is Shape.INVOKE:
        return InvokeReply(answer=answer.text, frame=report.frame, edgecascade=report)
    wanted = ask.sampling.top_logprobs is not None
    head = _head(ask, answer.start.model)
    if ask.shape is Shape.COMPLETION:
        logprobs = TextLogprobs.of(answer.logprobs, 0) if wanted else None
        text = TextChoice(index=0, text=answer.text, logprobs=logprobs, finish_reason=end.finish_reason)
        return TextCompletion(**head, object="text_completion", choices=[text], usage=end.usage, edgecascade=report)
    message = _message(answer)
    chat_logprobs = ChatLogprobs.of(answer.logprobs) if wanted else None
    choice = ChatChoice(index=0, message=message, logprobs=chat_logprobs, finish_reason=end.finish_reason)
    return ChatCompletion(**head, object="chat.completion", choices=[choice], usage=end.usage, edgecascade=report)


def _message(answer: Whole) -> AssistantMessage:
    text = answer.text or (None if answer.calls else "")
    if answer.refuses:
        return AssistantMessage(role="assistant", content=None, refusal=text)
    called = {"tool_calls": [ToolCallReply.of(call) for call in answer.calls]} if answer.calls else {}
    return AssistantMessage(role="assistant", content=text, refusal=None, **called)


def _delta(piece: Piece) -> Delta:
    said = {"refusal" if piece.refuses else "content": piece.text} if piece.text or not piece.calls else {}
    called = {"tool_calls": [ToolCallDelta.of(call) for call in piece.calls]} if piece.calls else {}
    return Delta.model_validate({**said, **called})


def _head(ask: Ask, model: str) -> dict[str, Any]:
    prefix = "cmpl" if ask.shape is Shape.COMPLETION else "chatcmpl"
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"edgecascade-{model}",
    }


@dataclass
class _Writer:
    """Writes the events of one stream; all chunks share id and creation time."""

    ask: Ask
    model: str
    head: dict[str, Any] = field(init=False)
    written: int = 0  # characters of text so far

    def __post_init__(self) -> None:
        self.head = _head(self.ask, self.model)

    def opening(self) -> str:
        """The first chunk: the role, for a chat; an empty text otherwise."""
        return self._chunk(Delta(role="assistant", content=""), "", [], None)

    def lines(self, event: Event) -> Iterator[str]:
        """The chunks of one event."""
        if isinstance(event, Piece) and (event.text or event.logprobs or event.calls):
            yield self._chunk(_delta(event), event.text, list(event.logprobs), None)
            self.written += len(event.text)
        if isinstance(event, Switch):
            yield self._line(choices=[], edgecascade=event.report)
            self.written = 0
        if isinstance(event, End):
            yield self._chunk(Delta(), "", [], event.finish_reason, event.report)
            if self.ask.include_usage:
                yield self._line(choices=[], usage=event.usage, edgecascade=event.report)

    def _chunk(
        self, delta: Delta, text: str, logprobs: list[Logprob], finish: str | None, report: Report | None = None
    ) -> str:
        shown = logprobs if self.ask.sampling.top_logprobs is not None else []
        choice: Reply
        if self.ask.shape is Shape.COMPLETION:
            text_logprobs = TextLogprobs.of(shown, self.written) if shown else None
            choice = TextChoice(index=0, text=text, logprobs=text_logprobs, finish_reason=finish)
        else:
            chat_logprobs = ChatLogprobs.of(shown) if shown else None
            choice = ChunkChoice(index=0, delta=delta, logprobs=chat_logprobs, finish_reason=finish)
        extra: dict[str, Any] = {} if report is None else {"edgecascade": report}
        return self._line(choices=[choice], **extra)

    def _line(self, *, choices: list[Any], usage: Usage | None = None, **extra: Any) -> str:
        if self.ask.include_usage:
            extra["usage"] = usage
        if self.ask.shape is Shape.COMPLETION:
            body: Reply = TextCompletion(**self.head, object="text_completion", choices=choices, **extra)
        else:
            body = ChatCompletionChunk(**self.head, object="chat.completion.chunk", choices=choices, **extra)
        return f"data: {body.json_text()}\n\n"
