"""The shared log over HTTP: append, read on after a number, delete a conversation."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from flask import Flask, Response, request

from functions.federation.announce import STATE_TOPIC, Announce
from functions.federation.errors import STORE_ERRORS, translate
from functions.federation.kept import NAME_PATTERN, Door, Name
from functions.federation.state.log import Entry, Event, Page, StateLog
from functions.serving import body
from functions.serving.admission import Gate
from functions.serving.errors import RefusedError
from functions.serving.openapi import Extra, operation
from functions.serving.parse import validated
from functions.serving.replies import Reply
from functions.serving.strict import Strict
from functions.serving.web import Site

MAX_EVENT_BYTES = 16_384
MAX_PAGE = 500
MAX_WAIT_MS = 25_000
_PAGE = 100
_MOST_WAITING = 16
_LOOK_EVERY_S = 1.0  # how often one who waits looks whether the function is told to stop


class EventRequest(Strict):
    """An event to append; the same `id` again changes nothing."""

    id: Name
    conversation: Name
    kind: Literal["fact", "turn"]
    body: Any


class EventReply(Reply):
    """An event in its place; `at` is Unix seconds. `kind` deleted: forget what you have of the conversation."""

    sequence: int
    at: float
    id: str
    conversation: str
    kind: Literal["fact", "turn", "deleted"]
    node: str
    body: Any


class AppendReply(EventReply):
    """What was appended; `new` false: it was there."""

    new: bool


class EventsReply(Reply):
    """Events in order. Read on after `upto`; a reader that stood before `trimmed` may have missed events."""

    events: list[EventReply]
    upto: int
    trimmed: int


class DeletedReply(Reply):
    """A conversation is gone: so many events, and so many questions that were kept for the edge on this node."""

    conversation: str
    events: int
    deferred: int


@dataclass(frozen=True)
class StateDesk:
    """The log, who hears of news, and how a conversation's deferred questions are forgotten."""

    log: StateLog
    announce: Announce
    forget: Callable[[str], int]
    node_id: str
    waiters: Gate = field(default_factory=lambda: Gate(_MOST_WAITING, 0))

    def append(self, asked: EventRequest) -> AppendReply:
        """Append an event and announce it."""
        text = json.dumps(asked.body, ensure_ascii=False, sort_keys=True)
        if len(text.encode()) > MAX_EVENT_BYTES:
            message = f"body: it has more than {MAX_EVENT_BYTES} bytes as JSON; put a reference into the event"
            raise RefusedError(422, message, param="body", code="invalid_value")
        entry, new = self.log.append(Event(asked.id, asked.conversation, asked.kind, self.node_id, text))
        if new:
            self.tell(entry.sequence, asked.conversation, asked.kind)
        return AppendReply(**_fields(entry), new=new)

    def delete(self, conversation: str) -> DeletedReply:
        """Delete a conversation here and, by the log's order, everywhere."""
        deferred = self.forget(conversation)
        events = self.log.delete(conversation)
        last = self.log.read(0, 1, conversation).entries
        self.tell(last[0].sequence if last else 0, conversation, "deleted")
        return DeletedReply(conversation=conversation, events=events, deferred=deferred)

    def tell(self, sequence: int, conversation: str, kind: str) -> None:
        """Announce that there is something to read."""
        self.announce.tell(STATE_TOPIC, {"sequence": sequence, "conversation": conversation, "kind": kind})


def add_state_routes(app: Flask, site: Site, desk: StateDesk, door: Door) -> None:
    """Add `/v1/state/events` and `DELETE /v1/conversations/{conversation}` to an app."""

    @app.post("/v1/state/events")
    def append() -> Response:
        with door.opened():
            asked = validated(EventRequest, body.read_object(request, site.common.max_body_bytes))
            return _json(desk.append(asked))

    @app.get("/v1/state/events")
    def read() -> Response:
        after, limit = _number("after", 0, 0, 1 << 53), _number("limit", _PAGE, 1, MAX_PAGE)
        conversation = request.args.get("conversation")
        with door.opened():
            page = desk.log.read(after, limit, conversation)
        wait_s = _number("wait_ms", 0, 0, MAX_WAIT_MS) / 1e3
        if wait_s and not page.entries:
            with desk.waiters.admitted(time.monotonic()):
                page = _awaited(page, limit, conversation, time.monotonic() + wait_s)
        events = [EventReply(**_fields(entry)) for entry in page.entries]
        return _json(EventsReply(events=events, upto=page.upto, trimmed=page.trimmed))

    def _awaited(page: Page, limit: int, conversation: str | None, ends: float) -> Page:
        """The next page that holds something, or an empty one when the time is up or the function stops."""
        try:
            while not page.entries and not site.drain.draining and (left_s := ends - time.monotonic()) > 0:
                desk.log.wait(page.upto, min(left_s, _LOOK_EVERY_S))
                page = desk.log.read(page.upto, limit, conversation)
        except STORE_ERRORS as error:
            raise translate(error) from error
        return page

    @app.delete("/v1/conversations/<conversation>")
    def delete(conversation: str) -> Response:
        if not re.match(NAME_PATTERN, conversation):
            message = "conversation: use letters, digits, . _ - and at most 128 of them"
            raise RefusedError(422, message, param="conversation", code="invalid_value")
        with door.opened():
            return _json(desk.delete(conversation))


def extra() -> Extra:
    """These routes for the OpenAPI document."""
    paths = {
        "/v1/state/events": {
            "post": operation("Append an event", AppendReply, EventRequest),
            "get": operation(
                "Read events in their order",
                EventsReply,
                after="the last sequence number you know; 0: from the oldest that is kept",
                limit=f"how many events at most, up to {MAX_PAGE}; {_PAGE} if left out",
                wait_ms=f"wait so long for an event if there is none yet, up to {MAX_WAIT_MS}",
                conversation="only this conversation's events",
            ),
        },
        "/v1/conversations/{conversation}": {
            "delete": operation("Delete a conversation everywhere", DeletedReply, in_path_conversation="its name")
        },
    }
    return Extra(paths, (EventRequest,), (EventReply, AppendReply, EventsReply, DeletedReply))


def _fields(entry: Entry) -> dict[str, Any]:
    event = entry.event
    values = {"id": event.id, "conversation": event.conversation, "kind": event.kind, "node": event.node}
    return {"sequence": entry.sequence, "at": entry.at, **values, "body": json.loads(event.body)}


def _json(reply: Reply) -> Response:
    return Response(reply.json_text(), mimetype="application/json")


def _number(name: str, default: int, low: int, high: int) -> int:
    text = request.args.get(name, str(default))
    if not re.fullmatch(r"\d{1,16}", text, re.ASCII) or not low <= int(text) <= high:
        message = f"{name}: it must be a whole number from {low} to {high}"
        raise RefusedError(422, message, param=name, code="invalid_value")
    return int(text)
