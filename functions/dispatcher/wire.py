"""What the dispatcher and a tier say to each other: our own API, written and read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from functions.serving.ask import CHAT, Ask, Message, Shape
from functions.serving.events import CallDelta, End, Event, Logprob, Piece, Report, Start, Usage
from functions.serving.schema import MAX_DRAFT
from models.runtime.tier import JsonForm, Tool, ToolUse

_DATA = b"data:"
_DONE = b"[DONE]"


class MalformedReplyError(Exception):
    """A tier said something that is not an answer."""


@dataclass(frozen=True)
class TierReply:
    """A tier's whole answer."""

    model: str
    text: str
    logprobs: tuple[Logprob, ...]
    calls: tuple[CallDelta, ...]
    finish_reason: str
    usage: Usage
    report: Report


def is_completion(ask: Ask) -> bool:
    """True where the tier has to continue a bare text; all else goes as a chat."""
    return ask.shape is Shape.COMPLETION and ask.skill == CHAT


def path_of(ask: Ask) -> str:
    """The tier's route for it."""
    return "/v1/completions" if is_completion(ask) else "/v1/chat/completions"


def request_body(ask: Ask, model: str, *, stream: bool, draft: str = "") -> dict[str, Any]:
    """The JSON to send; `model` is the tier's name.

    `draft` is another tier's answer, in place of the caller's own draft; what is too long for a draft is cut.
    """
    sampling = ask.sampling
    body: dict[str, Any] = {
        "model": model,
        "skill": ask.skill,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
        "confidence_threshold": ask.threshold,
        "edgecascade_draft": (draft or ask.draft)[:MAX_DRAFT] or None,
        **_input(ask),
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return {key: value for key, value in body.items() if value is not None}


def _input(ask: Ask) -> dict[str, Any]:
    top = ask.sampling.top_logprobs
    if is_completion(ask):
        return {"prompt": ask.prompt, "logprobs": top}
    messages = [_message(m) for m in ask.messages] or [{"role": "user", "content": ask.text}]
    return {
        "messages": messages,
        "logprobs": True if top is not None else None,
        "top_logprobs": top or None,
        "response_format": _response_format(ask.json) if ask.json else None,
        **(_tools(ask.tools) if ask.tools else {}),
    }


def _message(message: Message) -> dict[str, Any]:
    functions = [(call.id, {"name": call.name, "arguments": call.arguments}) for call in message.calls]
    calls = [{"id": call_id, "type": "function", "function": function} for call_id, function in functions]
    values = {"role": message.role, "content": message.content, "tool_calls": calls, "tool_call_id": message.call_id}
    return {key: value for key, value in values.items() if value or key == "content"}


def _response_format(form: JsonForm) -> dict[str, Any]:
    if form == JsonForm():
        return {"type": "json_object"}
    schema = {"name": "answer", "schema": json.loads(form.schema), "strict": form.strict}
    return {"type": "json_schema", "json_schema": schema}


def _tools(use: ToolUse) -> dict[str, Any]:
    choice: Any = "required" if use.required else "auto"
    if use.only:
        choice = {"type": "function", "function": {"name": use.only}}
    return {
        "tools": [{"type": "function", "function": _function(tool)} for tool in use.tools],
        "tool_choice": choice,
        "parallel_tool_calls": use.parallel,
    }


def _function(tool: Tool) -> dict[str, Any]:
    parameters = json.loads(tool.parameters)
    return {"name": tool.name, "description": tool.description, "parameters": parameters, "strict": tool.strict}


def read_reply(ask: Ask, body: Any) -> TierReply:
    """Read a whole answer; raises `MalformedReplyError`."""
    try:
        choice = body["choices"][0]
        return TierReply(
            model=str(body["model"]),
            text=str(choice["text"] if is_completion(ask) else choice["message"]["content"] or ""),
            logprobs=tuple(_logprobs(choice.get("logprobs"))),
            calls=() if is_completion(ask) else tuple(_calls(choice["message"])),
            finish_reason=str(choice["finish_reason"]),
            usage=Usage.model_validate(body["usage"]),
            report=Report.model_validate(body["edgecascade"]),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise MalformedReplyError from error


class StreamReader:
    """Reads a streamed answer as its bytes come."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._unread = b""
        self._started = self._is_over = False
        self._finish, self._usage = "stop", Usage()
        self._report: Report | None = None

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that are whole now; raises `MalformedReplyError`. What follows the last event is ignored."""
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            if not self._is_over and line.startswith(_DATA):
                yield from self._read(line.removeprefix(_DATA).strip())

    def _read(self, data: bytes) -> Iterator[Event]:
        if data == _DONE:
            if self._report is None:
                raise MalformedReplyError
            self._is_over = True
            yield End(self._finish, self._usage, self._report)
            return
        try:
            body = json.loads(data)
            if "error" in body:
                raise MalformedReplyError
            yield from self._events(body)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MalformedReplyError from error

    def _events(self, body: Any) -> Iterator[Event]:
        if not self._started:
            yield Start(str(body["model"]), Report(source="", route="", reason=""))
            self._started = True
        for choice in body["choices"]:
            yield from _piece(self._ask, choice)
            self._finish = choice.get("finish_reason") or self._finish
        if body.get("edgecascade"):
            self._report = Report.model_validate(body["edgecascade"])
        if body.get("usage"):
            self._usage = Usage.model_validate(body["usage"])


def _piece(ask: Ask, choice: dict[str, Any]) -> Iterator[Piece]:
    text = choice["text"] if is_completion(ask) else choice["delta"].get("content", "")
    logprobs = tuple(_logprobs(choice.get("logprobs")))
    calls = () if is_completion(ask) else tuple(_calls(choice["delta"]))
    if text or logprobs or calls:
        yield Piece(str(text), logprobs, calls)


def _calls(said: dict[str, Any]) -> Iterator[CallDelta]:
    """The calls in a message or in a chunk of one; whole ones have no index but their place."""
    for place, call in enumerate(said.get("tool_calls") or ()):
        function = call["function"]
        index, name = int(call.get("index", place)), str(function.get("name", ""))
        yield CallDelta(index, str(function["arguments"]), str(call.get("id", "")), name)


def _logprobs(found: Any) -> Iterator[Logprob]:
    """Read either of OpenAI's two forms."""
    if not found:
        return
    if "content" in found:
        for token in found["content"]:
            top = tuple((rival["token"], rival["logprob"]) for rival in token["top_logprobs"])
            yield Logprob(token["token"], token["logprob"], top)
        return
    for token, logprob, rivals in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        yield Logprob(token, logprob, tuple(rivals.items()))
