"""Ask one tier over HTTP: bounded in time, counted in bytes, its failures named.

TierFailedError     the tier gave no answer; `reason` as it goes into the reply
ApiError            the tier refused the request; passed on to the caller
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import httpx

from functions.dispatcher import wire
from functions.dispatcher.breaker import Breaker
from functions.dispatcher.leash import Leash
from functions.serving.ask import CHAT, Ask
from functions.serving.errors import ApiError, RefusedError
from functions.serving.events import CONFIDENCE_HEADER, THRESHOLD_HEADER, End, Event, Events, NetworkBytes, Start
from functions.serving.parse import DEADLINE_HEADER
from functions.serving.recent import Recent
from functions.serving.render import EVENT_STREAM
from functions.serving.traffic import request_bytes, response_bytes

_REPLY_BYTES = 16 << 20
_CONNECT_S = 1.0
_PROBE_S = 1.0
# Kept back from the tier's deadline, so that its answer arrives within ours.
_RETURN_SHARE = 0.05
_RETURN_MAX_S = 0.05
_CLIENT_ERRORS = range(400, 500)
_UNREACHED = frozenset({502, 503, 504})
# A frame is given up after so many times what nearly all of the tier's last ones took, but not before that time.
_PATIENCE = 3.0
_LEAST_TIMEOUT_S = 0.1
# With less time than this nothing is held against a tier that has not answered.
_LEAST_PATIENCE_S = 0.05


class TierFailedError(Exception):
    """The tier was asked and did not answer. `retriable`: the connection broke, the tier itself may be well."""

    def __init__(self, reason: str, *, retriable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retriable = retriable


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

    def __init__(self, target: Target, http: httpx.Client, breaker: Breaker | None = None) -> None:
        self._target = target
        self._http = http
        self._breaker = breaker or Breaker(self._probe)
        self._lock = threading.Lock()
        self._recent: dict[str, Recent] = {}

    @property
    def name(self) -> str:
        """The tier's name."""
        return self._target.name

    @property
    def breaker(self) -> Breaker:
        """Its circuit breaker."""
        return self._breaker

    def is_up(self) -> bool:
        """False while the tier is left alone after failures."""
        return self._breaker.allows()

    def takes_s(self, skill: str, share: float) -> float | None:
        """What that share of its last answers to the skill took at most, network included; None: too few to say."""
        recent = self._recent.get(skill)
        if recent is None:
            return None
        with self._lock:
            return recent.percentile(share, time.monotonic())

    def ask(self, ask: Ask, remaining_s: float, traffic: Traffic, leash: Leash | None = None) -> wire.TierReply:
        """Get the whole answer within `remaining_s`; raises `TierFailedError` or `ApiError`.

        Cutting the `leash` ends it in any thread.
        """
        began = time.monotonic()
        with self._exchange(ask, remaining_s, traffic, leash, stream=False) as response:
            reply = wire.read_reply(ask, self._json(response))
        self._note(ask.skill, time.monotonic() - began, known=True)
        return reply

    def stream(self, ask: Ask, remaining_s: float, traffic: Traffic, leash: Leash | None = None) -> Events:
        """Get the answer token by token; raises as `ask` does, also between events.

        A frame's `Start` tells what the tier forecasts of its confidence.
        """
        last: Event | None = None
        began = time.monotonic()
        with self._exchange(ask, remaining_s, traffic, leash, stream=True) as response:
            for event in wire.read_stream(ask, response.iter_lines()):
                if isinstance(event, End):
                    last = event
                elif isinstance(event, Start):
                    yield replace(event, report=event.report.model_copy(update=_foretold(response)))
                else:
                    yield event
        if last is not None:
            if ask.skill != CHAT:
                self._note(ask.skill, time.monotonic() - began, known=True)
            yield last  # after the exchange is closed and counted

    def _note(self, skill: str, took_s: float, *, known: bool) -> None:
        """Remember how long an answer took.

        A failure after longer than usual counts too, so that time-outs grow with a tier that has become slow; but only
        an answer makes a skill known, since callers name what they like.
        """
        if known:
            with self._lock:
                self._recent.setdefault(skill, Recent()).add(took_s, time.monotonic())

    def _limit_s(self, ask: Ask, remaining_s: float) -> float:
        """The longest to wait. A frame has a usual time; a chat is as long as it is."""
        usual_s = None if ask.skill == CHAT else self.takes_s(ask.skill, 0.99)
        patience_s = self._target.timeout_s if usual_s is None else max(_LEAST_TIMEOUT_S, _PATIENCE * usual_s)
        return min(remaining_s, self._target.timeout_s, patience_s)

    def describe(self) -> dict[str, Any] | None:
        """The tier's entry in its `/v1/models`; None when it does not answer."""
        if not self.is_up():
            return None
        try:
            response = self._http.get(f"{self._target.url}/v1/models", timeout=_PROBE_S)
            entries = response.json()["data"] if response.status_code == httpx.codes.OK else []
        except httpx.ConnectError:
            self._breaker.refused()
            return None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return next((entry for entry in entries if entry.get("id") == self.name), None)

    def _probe(self) -> bool:
        """Whether the tier's model is ready. One that is full is alive."""
        try:
            status = self._http.get(f"{self._target.url}/_/ready", timeout=_PROBE_S).status_code
        except httpx.HTTPError:
            return False
        return status in {httpx.codes.OK, httpx.codes.TOO_MANY_REQUESTS}

    @contextmanager
    def _exchange(
        self, ask: Ask, remaining_s: float, traffic: Traffic, leash: Leash | None, *, stream: bool
    ) -> Iterator[httpx.Response]:
        """Send the request; gives the response to a request that the tier took. Counts and translates."""
        began, limit_s = time.monotonic(), self._limit_s(ask, remaining_s)
        leash = leash or Leash(began)
        leash.expires = began + limit_s
        request = self._request(ask, limit_s, stream=stream)
        traffic.sent += request_bytes(request)
        try:
            with leash.hold(), self._sent(request, traffic) as response:
                yield response
        except (TierFailedError, httpx.HTTPError, httpx.StreamError, wire.MalformedReplyError) as error:
            failure = self._failure(error, out_of_time=limit_s >= remaining_s)
            self._judge(ask, error, failure, leash, time.monotonic() - began)
            raise failure from error
        else:
            self._breaker.answered()
        finally:
            traffic.seconds += time.monotonic() - began

    @contextmanager
    def _sent(self, request: httpx.Request, traffic: Traffic) -> Iterator[httpx.Response]:
        response = self._http.send(request, stream=True)
        try:
            self._check(response)
            yield response
        finally:
            traffic.received += response_bytes(response)
            response.close()

    def _failure(self, error: Exception, *, out_of_time: bool) -> TierFailedError:
        """Translate what went wrong."""
        if isinstance(error, TierFailedError):
            return error
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return TierFailedError(self._unreached)
        if isinstance(error, httpx.TimeoutException):
            return TierFailedError("deadline" if out_of_time else f"{self.name}_timeout")
        if isinstance(error, wire.MalformedReplyError | httpx.DecodingError):
            return TierFailedError(f"{self.name}_error")
        return TierFailedError(self._unreached, retriable=True)

    def _judge(self, ask: Ask, error: Exception, failure: TierFailedError, leash: Leash, waited_s: float) -> None:
        """Tell the breaker. A tier that is full is well; one that was cut off sooner than usual may be.

        A tier answers within the time it is granted, so that one of which nothing is known is to blame at the deadline.
        """
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            self._breaker.refused()
            return
        usual_s = self.takes_s(ask.skill, 0.99)
        is_long = usual_s is not None and waited_s > usual_s
        self._note(ask.skill, waited_s, known=is_long)
        is_silent = usual_s is None and not leash.is_cut and waited_s >= _LEAST_PATIENCE_S
        if (leash.is_cut or failure.reason == "deadline") and not (is_long or is_silent):
            return
        if failure.reason != f"{self.name}_busy":
            self._breaker.failed()

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

    def _check(self, response: httpx.Response) -> None:
        """Pass refusals on; everything else but a 200 is a failure of the tier."""
        status = response.status_code
        if status == httpx.codes.OK:
            return
        if status == httpx.codes.TOO_MANY_REQUESTS:
            raise TierFailedError(f"{self.name}_busy")
        at_fault = status in _CLIENT_ERRORS and status != httpx.codes.UNAUTHORIZED  # the key is ours, not the caller's
        refusal = _refusal(status, self._json(response)) if at_fault else None
        if refusal is not None:
            raise refusal
        # A 404 without our error body comes from a gateway that has no such function.
        unreached = status in _UNREACHED or status in _CLIENT_ERRORS
        raise TierFailedError(self._unreached if unreached else f"{self.name}_error")

    def _json(self, response: httpx.Response) -> Any:
        """Read the body, not without bound."""
        parts, size = [], 0
        for part in response.iter_bytes():
            size += len(part)
            if size > _REPLY_BYTES:
                raise TierFailedError(f"{self.name}_error")
            parts.append(part)
        try:
            return json.loads(b"".join(parts))
        except ValueError:
            return None

    @property
    def _unreached(self) -> str:
        return f"{self.name}_unavailable"


def _refusal(status: int, body: Any) -> ApiError | None:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    param, code = error.get("param"), error.get("code")
    return RefusedError(status, error["message"], param=param, code=code)


def _foretold(response: httpx.Response) -> dict[str, float]:
    """Confidence and threshold, as far as the headers tell them."""
    told = {}
    for name, header in (("confidence", CONFIDENCE_HEADER), ("threshold", THRESHOLD_HEADER)):
        with suppress(ValueError):
            value = float(response.headers.get(header, "nan"))
            if 0 <= value <= 1:
                told[name] = value
    return told
