"""The three POST routes, the same for every function: parse, admit, answer, reply."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, Protocol, cast

from flask import Flask, Response, request

from functions.serving import body, parse, render
from functions.serving.ask import Ask, Clocked, Shape
from functions.serving.errors import ApiError, RefusedError
from functions.serving.events import End, Event, Events
from functions.serving.replies import ModelEntry, ModelList
from functions.serving.web import Site, log_failure

_TOO_MANY, _OURS = 429, 500


class Service(Protocol):
    """What a function does once HTTP is out of the way."""

    def check(self, ask: Ask) -> None:
        """Refuse what this function can never answer, before it is admitted; raises `ApiError`."""

    def events(self, ask: Ask, clocked: Clocked) -> Events:
        """Answer. Errors before the first event become a status; closing the iterator stops the work."""

    def models(self) -> list[ModelEntry]:
        """What `/v1/models` lists."""


def add_routes(app: Flask, site: Site, service: Service) -> None:
    """Add `/v1/chat/completions`, `/v1/completions`, `POST /` and `/v1/models` to an app."""
    desk = _Desk(site, service)

    @app.post("/v1/chat/completions")
    def chat() -> Response:
        return desk.reply(lambda headers: parse.chat(desk.json(), headers))

    @app.post("/v1/completions")
    def completions() -> Response:
        return desk.reply(lambda headers: parse.completion(desk.json(), headers))

    @app.post("/")
    def invoke() -> Response:
        return desk.reply(desk.parse_invoke, as_text=_wants_text)

    @app.get("/v1/models")
    def models() -> Response:
        listed = ModelList(object="list", data=service.models())
        return Response(listed.json_text(), mimetype="application/json")

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        for entry in service.models():
            if entry.id == name:
                return Response(entry.json_text(), mimetype="application/json")
        raise RefusedError(
            404, "there is no such model; GET /v1/models lists them", param="model", code="model_not_found"
        )


class _Desk:
    """One function's desk: everything between Flask's `request` and the service."""

    def __init__(self, site: Site, service: Service) -> None:
        self._site = site
        self._service = service

    def json(self) -> dict[str, Any]:
        """The request's JSON body."""
        return body.read_object(request, self._site.common.max_body_bytes)

    def headers(self) -> parse.HeaderFields:
        """What the request says in headers."""
        said = {name: request.headers.get(name, "") for name in parse.HEADERS}
        return parse.HeaderFields.read(said, self._site.deadlines_ms())

    def parse_invoke(self, headers: parse.HeaderFields) -> Ask:
        """Read `POST /`: JSON if it says so (or is a form that looks like it: curl's default), else plain text."""
        text = body.read_text(request, self._site.common.max_body_bytes)
        default_skill = self._site.common.default_skill
        is_form = request.mimetype == "application/x-www-form-urlencoded"
        if request.is_json or (is_form and text.lstrip().startswith("{")):
            return parse.invoke(body.parse_object(text), headers, default_skill)
        return parse.plain(text, headers, default_skill)

    def reply(self, read: Callable[[parse.HeaderFields], Ask], as_text: Callable[[], bool] = lambda: False) -> Response:
        """Refuse, or parse, admit, answer, reply."""
        started, headers = time.monotonic(), self.headers()
        self._site.gate.refuse_early(started + self._granted(headers.deadline_s))  # the body may only shorten it
        ask = read(headers)
        self._service.check(ask)
        expires = started + self._granted(ask.deadline_s)
        gone = _gone(request.environ)
        events = self._counted(self._admitted(ask, started, expires, gone))
        if ask.deadline_class:
            events = self._timed(ask.deadline_class, expires, events)
        if ask.stream:
            return render.stream(ask, events, gone, self._broke)
        answer = render.collect(events, gone)
        return render.whole(ask, answer, as_text=ask.shape is Shape.INVOKE and as_text())

    def _granted(self, asked_s: float | None) -> float:
        most_s = self._site.common.deadline_s
        return most_s if asked_s is None else min(asked_s, most_s)

    def _admitted(self, ask: Ask, started: float, expires: float, gone: Callable[[], bool]) -> Iterator[Event]:
        with self._site.gate.admitted(expires, gone) as place:
            until = expires if place.has_time else time.monotonic()
            events = self._service.events(ask, Clocked(started, until, place.waited_s, gone))
            with closing(cast("Any", events)):
                for event in events:
                    if isinstance(event, End) and event.report.degraded:
                        place.is_answer = False
                        place.is_late = event.report.reason == "deadline" or event.report.reason.endswith("_busy")
                    yield event

    def _counted(self, events: Events) -> Iterator[Event]:
        for event in events:
            if isinstance(event, End):
                self._site.metrics.answered(event.report, event.usage)
            yield event

    def _timed(self, name: str, expires: float, events: Events) -> Iterator[Event]:
        """Count what became of a class's deadline; a bad request and a caller who left tell nothing of it."""
        try:
            for event in events:
                if isinstance(event, End):
                    self._site.metrics.deadline(name, "kept" if time.monotonic() <= expires else "late")
                yield event
        except Exception as error:
            if not isinstance(error, ApiError) or error.status == _TOO_MANY or error.status >= _OURS:
                self._site.metrics.deadline(name, "failed")
            raise

    def _broke(self, error: Exception) -> None:
        code = error.code if isinstance(error, ApiError) else None
        self._site.metrics.rejected(code or "broken_off")
        if not isinstance(error, ApiError):
            log_failure(error)


def _wants_text() -> bool:
    """Plain text in, plain text out, unless the caller asks for JSON; JSON in, JSON out."""
    wanted = request.accept_mimetypes.best_match(["text/plain", "application/json"], "text/plain")
    return not request.is_json and wanted == "text/plain"


def _gone(environ: Mapping[str, Any]) -> Callable[[], bool]:
    """Tells whether the client has hung up, where the server shows us its socket (gunicorn does)."""
    connection = environ.get("gunicorn.socket")
    if not isinstance(connection, socket.socket):
        return lambda: False

    def hung_up() -> bool:
        readable, _, _ = select.select([connection], [], [], 0)
        try:
            return bool(readable) and connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except OSError:
            return True

    return hung_up
