"""What every function's web side shares: health, readiness, metrics, the OpenAPI document, errors in one shape."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Flask, Response, jsonify, request
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from werkzeug.exceptions import HTTPException

from functions.serving import openapi
from functions.serving.admission import Gate
from functions.serving.api_keys import ApiKeys
from functions.serving.errors import ApiError, BrokenOffError, OverloadedError, UnauthorisedError, from_http
from functions.serving.lifecycle import Drain, Lifecycle
from functions.serving.metrics import Metrics
from functions.serving.settings import Common

EXTENSION = "edgecascade"
OPEN_PATHS = frozenset({"/healthz", "/_/ready", "/metrics"})
"""What probes and Prometheus ask, which have no key."""
_BEARER = "bearer "
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """What the routes of one function share; under `app.extensions["edgecascade"]` for whoever runs the app.

    `deadlines_ms` gives the deadlines by class that a request may name, as they are then.
    """

    name: str
    common: Common
    gate: Gate
    metrics: Metrics
    drain: Drain
    deadlines_ms: Callable[[], Mapping[str, float]] = dict

    @classmethod
    def create(
        cls,
        name: str,
        common: Common,
        deadlines_ms: Callable[[], Mapping[str, float]] = dict,
        *,
        keeps_all: bool = False,
    ) -> Site:
        """Make the parts from the settings; `keeps_all`: whoever has waited gets an answer, see `Gate`."""
        gate = Gate(common.max_inflight, common.queue_limit, keeps_all=keeps_all)
        return cls(name, common, gate, Metrics(common.node_id, common.shard_id), Drain(), deadlines_ms)


def create_base(site: Site, lifecycle: Lifecycle, extra: openapi.Extra | None = None) -> Flask:
    """An app with the routes that say how the function is, and with its error handlers; `extra`: what else it has."""
    app = Flask(site.name, static_folder=None)
    app.extensions[EXTENSION] = site
    app.url_map.strict_slashes = False
    app.json.sort_keys = False  # type: ignore[attr-defined]
    if site.common.api_keys:
        _add_key_check(app, site.common.api_keys)
    _add_status_routes(app, site, lifecycle, openapi.document(site.name, extra))
    _add_error_handlers(app, site)
    return app


def log_failure(error: BaseException) -> None:
    """Log where an unexpected error came from, but not its message: that may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    _LOG.error("%s at %s", type(error).__name__, places)


def _add_status_routes(app: Flask, site: Site, lifecycle: Lifecycle, document: dict[str, Any]) -> None:
    @app.get("/healthz")
    def healthz() -> Any:
        return jsonify(status="ok")

    @app.get("/_/ready")
    def ready() -> Any:
        reason = lifecycle.reason_not_ready()
        if reason is None and not site.gate.full:
            return jsonify(ready=True, reason="")
        status = 503 if reason else 429
        return jsonify(ready=False, reason=reason or "the queue is full"), status, {"Retry-After": "1"}

    @app.get("/metrics")
    def metrics() -> Response:
        is_ready = lifecycle.reason_not_ready() is None
        gate = site.gate
        body = site.metrics.exposition(inflight=gate.inflight, waiting=gate.waiting, limit=gate.limit, ready=is_ready)
        return Response(body, content_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    def openapi_document() -> Any:
        return jsonify(document)


def _add_key_check(app: Flask, keys: ApiKeys) -> None:
    """Refuse whatever bears no key, unknown routes included, before anything of it is read."""

    @app.before_request
    def check_key() -> None:
        if request.path not in OPEN_PATHS and not keys.admit(_shown_keys()):
            raise UnauthorisedError


def _shown_keys() -> list[str]:
    """The keys in the request's headers: `Authorization: Bearer …`, as OpenAI's clients send it, and `X-API-Key`."""
    authorization = request.headers.get("Authorization", "")
    bearer = authorization[len(_BEARER) :] if authorization.lower().startswith(_BEARER) else ""
    return [key.strip() for key in (bearer, request.headers.get("X-API-Key", "")) if key.strip()]


def _add_error_handlers(app: Flask, site: Site) -> None:
    @app.errorhandler(ApiError)
    def api_error(error: ApiError) -> Any:
        if not isinstance(error, OverloadedError) or error.code != "not_ready":
            site.metrics.rejected(error.code or "unknown")
        return jsonify(error.body()), error.status, error.headers()

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Any:
        body, status, headers = api_error(from_http(error, site.common.max_body_bytes))
        allow = {key: value for key, value in error.get_headers() if key == "Allow"}
        return body, status, {**headers, **allow}

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Any:
        log_failure(error)
        return api_error(BrokenOffError(500, "something broke here; the function's log says where", code="internal"))
