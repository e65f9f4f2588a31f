"""Put a kept question to the edge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from functions.serving.parse import DEADLINE_HEADER

_CONNECT_S = 2.0
_REFUSALS = range(400, 500)
# A gateway says this where it could not reach the function behind it.
_GATEWAYS_OWN = "X-OpenFaaS-Internal"
# These say nothing of the question: our key, a gateway's time-out, a lock, too early, too many.
_LATER = frozenset({401, 408, 409, 423, 425, 429})


class NotNowError(Exception):
    """The edge is out of reach, busy, or had no better answer than a degraded one: ask again later."""


@dataclass(frozen=True)
class EdgeReply:
    """The edge's last word, JSON text; `refused`: it is an error, and would be each time."""

    body: str
    refused: bool = False


class AskEdge(Protocol):
    """The edge as store and forward knows it."""

    def ask(self, request: str) -> EdgeReply:
        """Put the question; raises `NotNowError`."""


@dataclass(frozen=True)
class HttpEdge:
    """An edge tier, or a dispatcher beside it, over HTTP."""

    url: str
    http: httpx.Client
    timeout_s: float

    def ask(self, request: str) -> EdgeReply:
        """Put the question; raises `NotNowError`."""
        try:
            response = self.http.post(
                f"{self.url}/v1/chat/completions",
                content=request.encode(),
                headers={"Content-Type": "application/json", DEADLINE_HEADER: f"{1e3 * self.timeout_s:.3f}"},
                timeout=httpx.Timeout(self.timeout_s, connect=min(_CONNECT_S, self.timeout_s)),
            )
            body = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise NotNowError from error
        if _GATEWAYS_OWN in response.headers:
            raise NotNowError
        return _read(response.status_code, body)


def _read(status: int, body: Any) -> EdgeReply:
    if not isinstance(body, Mapping):
        raise NotNowError
    if status == httpx.codes.OK:
        report = body.get("edgecascade")
        if not isinstance(report, Mapping) or report.get("degraded") is not False or not body.get("choices"):
            raise NotNowError
        return EdgeReply(json.dumps(body, ensure_ascii=False))
    if status in _REFUSALS and status not in _LATER and isinstance(body.get("error"), Mapping):
        return EdgeReply(json.dumps({"error": body["error"]}, ensure_ascii=False), refused=True)
    raise NotNowError
