"""Asks a bundle as any client would, and keeps what it reports."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from bench.errors import ServiceError

TIMEOUT_S = 70.0  # the functions give up after 60 s


@dataclass(frozen=True)
class Reply:
    """One answer and what the bundle says about it."""

    text: str
    frame: Mapping[str, Any] | None
    source: str
    route: str
    reason: str
    degraded: bool
    confidence: float | None
    threshold: float | None
    latency_ms: float
    network_bytes: int
    joules: float | None
    joules_source: str
    timing_ms: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dict(vars(self))


class Client:
    """A connection to a bundle's gateway."""

    def __init__(
        self,
        url: str,
        transport: httpx.BaseTransport | None = None,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=url, timeout=timeout_s, transport=transport, trust_env=False, headers=headers,
            limits=httpx.Limits(keepalive_expiry=30.0),
        )  # fmt: skip
        self.clock: Callable[[], float] = time.perf_counter

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(
        self, skill: str, text: str, model: str = "auto", *, deadline_ms: float | None = None, local_only: bool = False
    ) -> Reply:
        """Send one utterance; raises `ServiceError`."""
        begun = self.clock()
        body = _body(skill, [{"role": "user", "content": text}], model)
        try:
            answer = self._http.post("/v1/chat/completions", json=body, headers=_wishes(deadline_ms, local_only))
        except httpx.TransportError as error:
            raise _unreachable(self._http, error) from error
        if not answer.is_success:
            raise _refused(answer)
        return reply(_json(answer.text), (self.clock() - begun) * 1000)

    def stream(
        self,
        skill: str,
        messages: Sequence[Mapping[str, str]],
        model: str = "auto",
        max_tokens: int | None = None,
        *,
        fields: Mapping[str, Any] | None = None,
        deadline_ms: float | None = None,
    ) -> Generator[str | Reply]:
        """Send messages and yield each piece of text as it comes, then the reply as a whole; raises `ServiceError`.

        `fields` go into the body as they are.
        """
        begun = self.clock()
        body = {**_body(skill, messages, model), "stream": True, **({"max_tokens": max_tokens} if max_tokens else {})}
        body |= fields or {}
        headers = {"Accept": "text/event-stream", **_wishes(deadline_ms, local_only=False)}
        pieces: list[str] = []
        last: dict[str, Any] = {}
        try:
            # The gateway streams only for this Accept.
            with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _refused(answer)
                for event in events(answer.iter_lines()):
                    last = event if "edgecascade" in event else last
                    piece = _delta(event)
                    if piece:
                        pieces.append(piece)
                        yield piece
        except httpx.TransportError as error:
            raise _unreachable(self._http, error) from error
        yield _whole("".join(pieces), last.get("edgecascade") or {}, (self.clock() - begun) * 1000)


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, up to `[DONE]`; raises `ServiceError` for an error event."""
    for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if not data:
            continue
        event = _json(data)
        if "error" in event:
            raise ServiceError(f"the service broke off: {_message(event)}")
        yield event


def reply(body: Mapping[str, Any], latency_ms: float) -> Reply:
    """Read a completion; fields that another service does not send stay empty."""
    choices = body.get("choices") or [{}]
    text = (choices[0].get("message") or {}).get("content") or choices[0].get("text") or ""
    return _whole(text, body.get("edgecascade") or {}, latency_ms)


def _whole(text: str, extra: Mapping[str, Any], latency_ms: float) -> Reply:
    network = extra.get("network_bytes") or {}
    joules = extra.get("joules") or {}
    return Reply(
        text=text,
        frame=extra.get("frame"),
        source=extra.get("source", ""),
        route=extra.get("route", ""),
        reason=extra.get("reason", ""),
        degraded=bool(extra.get("degraded", False)),
        confidence=extra.get("confidence"),
        threshold=extra.get("threshold"),
        latency_ms=latency_ms,
        network_bytes=int(network.get("sent", 0)) + int(network.get("received", 0)),
        joules=joules.get("value"),
        joules_source=joules.get("source", ""),
        timing_ms=extra.get("timing_ms") or {},
    )


def _body(skill: str, messages: Sequence[Mapping[str, str]], model: str) -> dict[str, Any]:
    return {"model": model, "skill": skill, "messages": [dict(m) for m in messages]}


def _wishes(deadline_ms: float | None, local_only: bool) -> dict[str, str]:
    deadline = {} if deadline_ms is None else {"X-Deadline-Ms": f"{deadline_ms:g}"}
    return {**deadline, **({"X-Data-Class": "local-only"} if local_only else {})}


def _delta(event: Mapping[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or choices[0].get("text") or ""


def _json(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ServiceError("the service did not answer with JSON; is this an OpenAI-compatible address?") from error
    if not isinstance(values, dict):
        raise ServiceError("the service did not answer with a JSON object; is this an OpenAI-compatible address?")
    return values


def _message(body: Mapping[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _refused(answer: httpx.Response) -> ServiceError:
    try:
        message = _message(_json(answer.text))
    except ServiceError:
        message = answer.text[:200]
    return ServiceError(f"the service answered {answer.status_code}: {message}", answer.status_code)


def _unreachable(http: httpx.Client, error: httpx.TransportError) -> ServiceError:
    return ServiceError(f"{http.base_url} did not answer ({type(error).__name__}); start it with: edgecascade up")
