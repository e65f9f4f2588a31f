"""Store and forward over HTTP: leave a question for the edge, and ask for its answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from flask import Flask, Response, request

from functions.federation.deferred.store import DeferredStore, Question, Record
from functions.federation.errors import DeletedError
from functions.federation.kept import Door, Name, local_only
from functions.federation.state.log import StateLog
from functions.serving import body
from functions.serving.ask import Ask
from functions.serving.errors import RefusedError
from functions.serving.openapi import Extra, operation
from functions.serving.parse import HeaderFields, chat, validated
from functions.serving.replies import Reply
from functions.serving.strict import Strict
from functions.serving.web import Site

# A question that waits has no deadline, streams to nobody, and goes to whatever the edge has.
_DROPPED = ("deadline_ms", "local_only", "model", "stream", "stream_options")


class DeferredRequest(Strict):
    """A question for the edge; the same `id` again changes nothing. `request` is a chat completion's body."""

    id: Name
    conversation: Name | None = None
    request: dict[str, Any]


class DeferredReply(Reply):
    """How a question stands, since when (Unix seconds), and what the edge said: a chat completion, or its error."""

    id: str
    status: Literal["pending", "answered", "refused", "expired"]
    at: float
    answer: dict[str, Any] | None


@dataclass(frozen=True)
class DeferredDesk:
    """The store, the log that knows which conversations were deleted, and who is told of a new question.

    `has_edge` false: there is nobody to forward to, and nothing is taken.
    """

    store: DeferredStore
    log: StateLog
    has_edge: bool
    wake: Callable[[], None]

    def add(self, asked: DeferredRequest) -> DeferredReply:
        """Keep a question."""
        if not self.has_edge:
            message = "this federation has no edge to forward to; set EDGE_URL"
            raise RefusedError(422, message, param="request", code="no_edge")
        ask = _parsed(asked.request)
        if ask.local_only:
            raise local_only()
        if asked.conversation is not None and self.log.is_deleted(asked.conversation):
            raise DeletedError
        kept = {"model": "auto", **{key: value for key, value in asked.request.items() if key not in _DROPPED}}
        text = json.dumps(kept, ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        record = self.store.add(Question(asked.id, asked.conversation or "", text, digest))
        self.wake()
        return _reply(record)

    def get(self, question_id: str) -> DeferredReply:
        """How a question stands."""
        record = self.store.get(question_id)
        if record is None:
            message = "there is no such question, or it is too old, or its conversation was deleted"
            raise RefusedError(404, message, param="id", code="unknown_id")
        return _reply(record)


def add_deferred_routes(app: Flask, site: Site, desk: DeferredDesk, door: Door) -> None:
    """Add `/v1/deferred` and `/v1/deferred/{id}` to an app."""

    @app.post("/v1/deferred")
    def add() -> Any:
        with door.opened():
            asked = validated(DeferredRequest, body.read_object(request, site.common.max_body_bytes))
            return Response(desk.add(asked).json_text(), status=202, mimetype="application/json")

    @app.get("/v1/deferred/<question_id>")
    def get(question_id: str) -> Response:
        with door.opened():
            return Response(desk.get(question_id).json_text(), mimetype="application/json")


def extra() -> Extra:
    """These routes for the OpenAPI document."""
    add = operation("Leave a question for the edge", DeferredReply, DeferredRequest)
    add["responses"]["202"] = add["responses"].pop("200")
    get = operation("See how a question stands", DeferredReply, in_path_id="the id it was left under")
    paths = {"/v1/deferred": {"post": add}, "/v1/deferred/{id}": {"get": get}}
    return Extra(paths, (DeferredRequest,), (DeferredReply,))


def _parsed(given: dict[str, Any]) -> Ask:
    """Refuse now what the edge would refuse for its form; the field is named as the caller wrote it."""
    try:
        return chat(given, HeaderFields())
    except RefusedError as error:
        param = f"request.{error.param}"
        raise RefusedError(error.status, f"request.{error.message}", param=param, code=error.code) from None


def _reply(record: Record) -> DeferredReply:
    answer = json.loads(record.answer) if record.answer else None
    return DeferredReply(id=record.question.id, status=record.status, at=record.at, answer=answer)  # type: ignore[arg-type]
