"""The cache before any model: a service in front of another, and the call that deletes a conversation."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, cast

from flask import Flask, Response, jsonify, request

from functions.dispatcher.cache.answers import AnswerCache, Caller, Given, Hit
from functions.dispatcher.cache.store import StoreError
from functions.serving.answering import Service
from functions.serving.ask import Ask, Clocked
from functions.serving.errors import BrokenOffError, RefusedError
from functions.serving.events import End, Event, Events, Piece, Report, Start, Switch, Timing, Usage
from functions.serving.replies import ModelEntry

_LOG = logging.getLogger(__name__)
TENANT_HEADER = "X-Tenant"
CONVERSATION_HEADER = "X-Conversation-Id"
SOURCE = "cache"
_CONVERSATION = re.compile(r"[A-Za-z0-9._\-]{1,128}")
_FROM_MODELS = frozenset({"device", "edge"})


def caller_of_request() -> Caller:
    """Who sent the request at work; raises `RefusedError` naming the header."""
    return _caller(request.headers.get(CONVERSATION_HEADER, "").strip(), CONVERSATION_HEADER)


def _caller(conversation: str, field: str) -> Caller:
    if conversation and not _CONVERSATION.fullmatch(conversation):
        message = "it must be 1 to 128 letters, digits, dots, dashes or underscores"
        raise RefusedError(422, message, param=field, code="invalid_value")
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    api_key = key.strip() if scheme.lower() == "bearer" else ""
    return Caller.of(request.headers.get(TENANT_HEADER, "").strip(), api_key, conversation)


class Forgets(Protocol):
    """A place that holds something of conversations."""

    def forget(self, caller: Caller) -> int:
        """Delete what it holds of the caller's conversation; gives how much that was. May raise `StoreError`."""


def add_conversation_routes(app: Flask, places: Sequence[Forgets]) -> None:
    """Add `DELETE /v1/conversations/<id>`, which deletes the caller's conversation in every place."""

    @app.delete("/v1/conversations/<conversation>")
    def forget(conversation: str) -> Response:
        caller = _caller(conversation, "conversation")
        if not caller.tenant:
            message = "say whose conversation it is, by an API key or the tenant's header"
            raise RefusedError(401, message, param=TENANT_HEADER, code="no_tenant")
        try:
            deleted = sum([place.forget(caller) for place in places])
        except StoreError:
            raise BrokenOffError(500, "not all of it could be deleted; try again", code="not_deleted") from None
        return jsonify(id=conversation, object="conversation.deleted", deleted=deleted)


def purge_regularly(cache: AnswerCache, every_s: float) -> Callable[[], None]:
    """Purge in the background, also while nobody asks; gives what stops it."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(every_s):
            try:
                cache.purge()
            except StoreError as error:
                _LOG.warning("what has expired was not deleted: %s", error)

    threading.Thread(target=run, name="cache-purge", daemon=True).start()
    return stopped.set


@dataclass(frozen=True)
class CachedService:
    """Answers from the cache what it can, lets `inner` answer the rest, and keeps what models said in full."""

    inner: Service
    cache: AnswerCache
    node_id: str
    caller: Callable[[], Caller] = caller_of_request

    def check(self, ask: Ask) -> None:
        """Refuse what the inner service refuses, and a malformed conversation id."""
        self.caller()
        self.inner.check(ask)

    def models(self) -> list[ModelEntry]:
        """Those of the inner service."""
        return self.inner.models()

    def events(self, ask: Ask, clocked: Clocked) -> Events:
        """The answer given before, or a new one."""
        caller, asked_s = self.caller(), self.cache.now()
        hit = self.cache.look_up(caller, ask)
        if hit is not None:
            return self._again(hit)
        events = self.inner.events(ask, clocked)
        if not self.cache.takes(caller, ask):
            return events
        return self._kept(events, lambda given: self.cache.keep(caller, ask, given, asked_s))

    def _again(self, hit: Hit) -> Iterator[Event]:
        report = Report(
            source=SOURCE,
            route=SOURCE,
            reason=hit.kind,
            frame=dict(hit.given.frame) if hit.given.frame is not None else None,
            model_version=hit.given.model_version,
            node_id=self.node_id,
            timing_ms=Timing(),
        )
        yield Start(hit.given.model, report)
        yield Piece(hit.given.text)
        yield End("stop", Usage(), report)

    def _kept(self, events: Events, keep: Callable[[Given], object]) -> Iterator[Event]:
        """Pass the events on; at their end keep the answer, if a model gave it whole and nothing is wrong with it."""
        model, pieces = "", list[Piece]()
        with closing(cast("Any", events)):
            for event in events:
                if isinstance(event, Start):
                    model = event.model
                elif isinstance(event, Piece):
                    pieces.append(event)
                elif isinstance(event, Switch):
                    pieces.clear()
                elif _is_whole(event, pieces):
                    text = "".join(piece.text for piece in pieces)
                    keep(Given(text, model, event.report.model_version, event.report.frame))
                yield event


def _is_whole(end: End, pieces: Sequence[Piece]) -> bool:
    sound = end.finish_reason == "stop" and not end.report.degraded and end.report.source in _FROM_MODELS
    return sound and bool(pieces) and not any(piece.calls or piece.refuses for piece in pieces)
