"""One node of the federation: ask it, and read what it says as a vote.

NodeFailedError     the node gave no vote; `reason` as it goes into the metrics
RefusedError        the node refused the request: the caller's fault, not the node's
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
from pydantic import ValidationError

from functions.federation.traffic import request_bytes, response_bytes
from functions.serving.ask import CHAT, Ask, Message, Shape
from functions.serving.errors import RefusedError
from functions.serving.events import NetworkBytes, Report, Usage
from functions.serving.parse import DEADLINE_HEADER
from functions.serving.replies import ModelFacts
from routing.votes import Ballot

_REPLY_BYTES = 4 << 20
_CONNECT_S = 1.0
_DESCRIBE_S = 1.0
_MODEL = "auto"  # any node understands it, whether a tier or a dispatcher answers there
# Kept back from a time limit that is handed on, so that the answer arrives within ours.
_RETURN_SHARE = 0.05
_RETURN_MAX_S = 0.05
_LATE_S = 5.0  # the election ends first; this ends what nobody cancelled
_REFUSALS = range(400, 500)
_BUSY = frozenset({429, 503})
# A gateway says this where it could not reach the function behind it.
_GATEWAYS_OWN = "X-OpenFaaS-Internal"


class NodeFailedError(Exception):
    """The node was asked and gave no vote: busy, unreachable, malformed or degraded."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class NodeReply:
    """A node's vote and the answer it came in."""

    ballot: Ballot
    text: str
    finish_reason: str
    usage: Usage
    report: Report
    network: NetworkBytes


class AskTier(Protocol):
    """A device tier as the federation knows it. Cancelling a call must stop the work on the other side."""

    @property
    def name(self) -> str:
        """What votes, metrics and logs call it."""

    async def ask(self, ask: Ask, remaining_s: float) -> NodeReply:
        """Get its vote, of use for `remaining_s`; raises `NodeFailedError` or `RefusedError`."""

    async def describe(self) -> ModelFacts | None:
        """What it can do; None when it does not say."""


@dataclass(frozen=True)
class HttpTier:
    """A node that speaks our own API; `http` is shared by all nodes."""

    name: str
    url: str
    http: httpx.AsyncClient

    async def ask(self, ask: Ask, remaining_s: float) -> NodeReply:
        """Get its vote; cancelling closes the connection, which tells the tier that nobody waits."""
        request = self._request(ask, remaining_s)
        try:
            response = await self.http.send(request, stream=True)
            try:
                body = await _read(response)
            finally:
                await response.aclose()
        except httpx.TimeoutException as error:
            raise NodeFailedError("timeout") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise NodeFailedError("unreachable") from error
        if _GATEWAYS_OWN in response.headers:
            raise NodeFailedError("unreachable")
        _check(response.status_code, body)
        network = NetworkBytes(sent=request_bytes(request), received=response_bytes(response))
        return read_reply(self.name, ask, body, network)

    async def describe(self) -> ModelFacts | None:
        """The facts of the first model it lists."""
        try:
            response = await self.http.get(f"{self.url}/v1/models", timeout=_DESCRIBE_S)
            return ModelFacts.model_validate(response.json()["data"][0]["edgecascade"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return None

    def _request(self, ask: Ask, remaining_s: float) -> httpx.Request:
        path, body = request_of(ask)
        headers = {
            DEADLINE_HEADER: f"{1e3 * kept_back(remaining_s):.3f}",
            "Content-Type": "application/json",
            "Accept": "application/json",
        }
        return self.http.build_request(
            "POST",
            self.url + path,
            content=json.dumps(body, ensure_ascii=False).encode(),
            headers=headers,
            timeout=httpx.Timeout(remaining_s + _LATE_S, connect=_CONNECT_S),
        )


def kept_back(limit_s: float) -> float:
    """The time limit to hand on where this one is ours, seconds."""
    return max(1e-3, limit_s - min(_RETURN_MAX_S, _RETURN_SHARE * limit_s))


def request_of(ask: Ask) -> tuple[str, dict[str, Any]]:
    """The route and the body that put a request to a node."""
    sampling = ask.sampling
    body = {
        "model": _MODEL,
        "skill": ask.skill,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
    }
    body = {key: value for key, value in body.items() if value is not None}
    if ask.shape is Shape.COMPLETION and ask.skill == CHAT:
        return "/v1/completions", {**body, "prompt": ask.prompt}
    messages = [_message(message) for message in ask.messages] or [{"role": "user", "content": ask.text}]
    return "/v1/chat/completions", {**body, "messages": messages}


def read_reply(node: str, ask: Ask, body: Any, network: NetworkBytes) -> NodeReply:
    """Read an answer as a vote; raises `NodeFailedError` for one that is none."""
    try:
        choice = body["choices"][0]
        report = Report.model_validate(body["edgecascade"])
        usage = Usage.model_validate(body["usage"])
        is_completion = ask.shape is Shape.COMPLETION and ask.skill == CHAT
        text = str(choice["text"] if is_completion else choice["message"]["content"] or "")
        finish_reason = str(choice["finish_reason"])
        if report.frame is not None:
            ballot = Ballot.of_frame(node, report.frame, report.confidence)
        else:
            ballot = Ballot.of_text(node, text, report.confidence)
    except (AttributeError, LookupError, TypeError, ValueError, ValidationError) as error:
        raise NodeFailedError("malformed") from error
    if report.degraded:
        raise NodeFailedError("degraded")
    return NodeReply(ballot, text, finish_reason, usage, report, network)


def _message(message: Message) -> dict[str, Any]:
    functions = [(call.id, {"name": call.name, "arguments": call.arguments}) for call in message.calls]
    calls = [{"id": call_id, "type": "function", "function": function} for call_id, function in functions]
    values = {"role": message.role, "content": message.content, "tool_calls": calls, "tool_call_id": message.call_id}
    return {key: value for key, value in values.items() if value or key == "content"}


async def _read(response: httpx.Response) -> Any:
    """The body's JSON, None if it is none; not without bound."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > _REPLY_BYTES:
            raise NodeFailedError("malformed")
        parts.append(part)
    try:
        return json.loads(b"".join(parts))
    except ValueError:
        return None


def _check(status: int, body: Any) -> None:
    """Pass refusals on; everything else but a 200 is a failure of the node."""
    if status == httpx.codes.OK:
        return
    if status in _BUSY:
        raise NodeFailedError("busy")
    error = body.get("error") if isinstance(body, Mapping) else None
    at_fault = status in _REFUSALS and status != httpx.codes.UNAUTHORIZED  # the key is ours, not the caller's
    if at_fault and isinstance(error, Mapping) and isinstance(error.get("message"), str):
        raise RefusedError(status, error["message"], param=error.get("param"), code=error.get("code"))
    raise NodeFailedError("unreachable" if status in _REFUSALS else "error")
