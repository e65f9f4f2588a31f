"""Ask one tier over HTTP: bounded in time, counted in bytes, its failures named.

TierFailedError     the tier gave no answer; `reason` as it goes into the reply
ApiError            the tier refused the request; passed on to the caller
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from functions.dispatcher import wire
from functions.dispatcher.cooldown import Cooldown
from functions.serving.ask import Ask
from functions.serving.errors import ApiError, RefusedError
from functions.serving.events import End, Event, Events, NetworkBytes
from functions.serving.parse import DEADLINE_HEADER
from functions.serving.render import EVENT_STREAM

_REPLY_BYTES = 16 << 20
_CONNECT_S = 1.0
_PROBE_S = 1.0
# Kept back from the tier's deadline, so that its answer arrives within ours.
_RETURN_SHARE = 0.05
_RETURN_MAX_S = 0.05
_CLIENT_ERRORS = range(400, 500)
_UNREACHED = frozenset({502, 503, 504})


class TierFailedError(Exception):
    """The tier was asked and did not answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Traffic:
    """What one exchange cost: seconds on the wall, bytes both ways with headers as far as the client shows them."""

    seconds: float = 0.0
    sent: int = 0
    received: int = 0

    @property
    def bytes(self) -> NetworkBytes:
        """As the reply reports it."""
        return NetworkBytes(sent=self.sent, received=self.received)


@dataclass(frozen=True)
class Target:
    """Which tier, and where. `timeout_s`: the longest it is waited for."""

    name: str
    url: str
    timeout_s: float


class TierClient:
    """Asks one tier through a pool of connections."""

    def __init__(self, target: Target, http: httpx.Client, cooldown: Cooldown | None = None) -> None:
        self._target = target
        self._http = http
        self._cooldown = cooldown or Cooldown(self._probe)

    @property
    def name(self) -> str:
        """The tier's name."""
        return self._target.name

    def is_up(self) -> bool:
        """False while the tier is left alone after a failed connection."""
        return self._cooldown.allows()

    def ask(self, ask: Ask, remaining_s: float, traffic: Traffic) -> wire.TierReply:
        """Get the whole answer within `remaining_s`; raises `TierFailedError` or `ApiError`."""
        with self._exchange(ask, remaining_s, traffic, stream=False) as (response, expires):
            return wire.read_reply(ask, self._json(response, expires))

    def stream(self, ask: Ask, remaining_s: float, traffic: Traffic) -> Events:
        """Get the answer token by token; raises as `ask` does, also between events."""
        last: Event | None = None
        with self._exchange(ask, remaining_s, traffic, stream=True) as (response, expires):
            for event in wire.read_stream(ask, self._lines(response, expires)):
                if isinstance(event, End):
                    last = event
                else:
                    yield event
        if last is not None:
            yield last  # after the exchange is closed and counted

    def describe(self) -> dict[str, Any] | None:
        """The tier's entry in its `/v1/models`; None when it does not answer."""
        if not self.is_up():
            return None
        try:
            response = self._http.get(f"{self._target.url}/v1/models", timeout=_PROBE_S)
            entries = response.json()["data"] if response.status_code == httpx.codes.OK else []
        except httpx.ConnectError:
            self._cooldown.failed()
            return None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return next((entry for entry in entries if entry.get("id") == self.name), None)

    def _probe(self) -> bool:
        try:
            return self._http.get(f"{self._target.url}/healthz", timeout=_PROBE_S).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    @contextmanager
    def _exchange(
        self, ask: Ask, remaining_s: float, traffic: Traffic, *, stream: bool
    ) -> Iterator[tuple[httpx.Response, float]]:
        """Send the request; gives the response to a request that the tier took. Counts and translates."""
        limit_s = min(remaining_s, self._target.timeout_s)
        began = time.monotonic()
        request = self._request(ask, limit_s, stream=stream)
        traffic.sent += _request_bytes(request)
        try:
            response = self._http.send(request, stream=True)
            try:
                self._check(response, began + limit_s)
                yield response, began + limit_s
            finally:
                traffic.received += _response_bytes(response)
                response.close()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._cooldown.failed()
            raise TierFailedError(self._unreached) from error
        except httpx.TimeoutException as error:
            raise TierFailedError("deadline") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise TierFailedError(self._unreached) from error
        except wire.MalformedReplyError as error:
            raise TierFailedError(f"{self.name}_error") from error
        finally:
            traffic.seconds += time.monotonic() - began

    def _request(self, ask: Ask, limit_s: float, *, stream: bool) -> httpx.Request:
        granted_s = limit_s - min(_RETURN_MAX_S, limit_s * _RETURN_SHARE)
        headers = {
            DEADLINE_HEADER: f"{1e3 * granted_s:.3f}",
            "Content-Type": "application/json",
            "Accept": EVENT_STREAM if stream else "application/json",
        }
        timeout = httpx.Timeout(limit_s, connect=min(_CONNECT_S, limit_s / 2))
        content = json.dumps(wire.request_body(ask, self.name, stream=stream), ensure_ascii=False).encode()
        url = self._target.url + wire.path_of(ask)
        return self._http.build_request("POST", url, content=content, headers=headers, timeout=timeout)

    def _check(self, response: httpx.Response, expires: float) -> None:
        """Pass refusals on; everything else but a 200 is a failure of the tier."""
        status = response.status_code
        if status == httpx.codes.OK:
            return
        if status == httpx.codes.TOO_MANY_REQUESTS:
            raise TierFailedError(f"{self.name}_busy")
        refusal = _refusal(status, self._json(response, expires)) if status in _CLIENT_ERRORS else None
        if refusal is not None:
            raise refusal
        # A 404 without our error body comes from a gateway that has no such function.
        unreached = status in _UNREACHED or status in _CLIENT_ERRORS
        raise TierFailedError(self._unreached if unreached else f"{self.name}_error")

    def _json(self, response: httpx.Response, expires: float) -> Any:
        """Read the body: in time, and not without bound."""
        parts, size = [], 0
        for part in response.iter_bytes():
            size += len(part)
            self._still_waited_for(expires)
            if size > _REPLY_BYTES:
                raise TierFailedError(f"{self.name}_error")
            parts.append(part)
        try:
            return json.loads(b"".join(parts))
        except ValueError:
            return None

    def _lines(self, response: httpx.Response, expires: float) -> Iterator[str]:
        for line in response.iter_lines():
            self._still_waited_for(expires)
            yield line

    def _still_waited_for(self, expires: float) -> None:
        if time.monotonic() > expires:
            raise TierFailedError("deadline")

    @property
    def _unreached(self) -> str:
        return f"{self.name}_unavailable"


def _refusal(status: int, body: Any) -> ApiError | None:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    param, code = error.get("param"), error.get("code")
    return RefusedError(status, error["message"], param=param, code=code)


def _request_bytes(request: httpx.Request) -> int:
    line = len(request.method) + len(request.url.raw_path) + len("  HTTP/1.1\r\n")
    return line + _header_bytes(request.headers) + len(request.content)


def _response_bytes(response: httpx.Response) -> int:
    line = len(f"{response.http_version} {response.status_code} {response.reason_phrase}\r\n")
    return line + _header_bytes(response.headers) + response.num_bytes_downloaded


def _header_bytes(headers: httpx.Headers) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers.raw) + 2
