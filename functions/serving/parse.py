"""From a request's JSON and headers to an `Ask`; what does not fit is refused, naming the field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from functions.serving.ask import CHAT, Ask, Call, Message, Sampling, Shape
from functions.serving.errors import RefusedError
from functions.serving.schema import (
    MAX_DEADLINE_MS,
    ChatMessage,
    ChatRequest,
    Common,
    CompletionRequest,
    InvokeRequest,
)
from functions.serving.strict import MAX_TEXT

Schema = TypeVar("Schema", bound=BaseModel)

DEADLINE_HEADER = "X-Deadline-Ms"
DEADLINE_CLASS_HEADER = "X-Deadline-Class"
BATTERY_HEADER = "X-Battery-Level"
DATA_CLASS_HEADER = "X-Data-Class"
HEADERS = (DEADLINE_HEADER, DEADLINE_CLASS_HEADER, BATTERY_HEADER, DATA_CLASS_HEADER)
LOCAL_ONLY = "local-only"
_FULL_PERCENT = 100.0
# The field to blame where a rule spans several.
_WHOLE_MODEL = {"InvokeRequest": "text", "ChatRequest": "stream_options", "CompletionRequest": "stream_options"}


@dataclass(frozen=True)
class HeaderFields:
    """What a request says in headers instead of fields."""

    deadline_s: float | None = None
    deadline_class: str = ""
    local_only: bool = False
    battery_level: float | None = None

    @classmethod
    def read(cls, headers: Mapping[str, str], deadlines_ms: Mapping[str, float] | None = None) -> HeaderFields:
        """Read them, with the deadlines by class that the function knows; raises `RefusedError` naming the header."""
        data_class = headers.get(DATA_CLASS_HEADER, "").strip().lower()
        if data_class not in {"", LOCAL_ONLY}:
            raise _refused(f"the only data class is '{LOCAL_ONLY}'", DATA_CLASS_HEADER)
        deadline_class = headers.get(DEADLINE_CLASS_HEADER, "").strip().lower()
        asked = (
            _deadline(headers.get(DEADLINE_HEADER, "").strip()),
            _class_deadline(deadline_class, deadlines_ms or {}),
        )
        return cls(
            deadline_s=min((s for s in asked if s is not None), default=None),
            deadline_class=deadline_class,
            local_only=data_class == LOCAL_ONLY,
            battery_level=_battery_level(headers.get(BATTERY_HEADER, "").strip()),
        )


def chat(body: Mapping[str, Any], headers: HeaderFields) -> Ask:
    """Read `POST /v1/chat/completions`."""
    request = validated(ChatRequest, body)
    wanted = (request.top_logprobs or 0) if request.logprobs else None
    return Ask(
        Shape.CHAT,
        skill=request.skill or CHAT,
        messages=tuple(_message(message) for message in request.messages),
        sampling=_sampling(request, request.max_completion_tokens, wanted),
        json=request.json_form,
        tools=request.tool_use,
        draft=request.edgecascade_draft or "",
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        **_shared(request, headers),
    )


def completion(body: Mapping[str, Any], headers: HeaderFields) -> Ask:
    """Read `POST /v1/completions`."""
    request = validated(CompletionRequest, body)
    return Ask(
        Shape.COMPLETION,
        skill=request.skill or CHAT,
        prompt=request.text,
        sampling=_sampling(request, None, request.logprobs),
        draft=request.edgecascade_draft or "",
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        **_shared(request, headers),
    )


def invoke(body: Mapping[str, Any], headers: HeaderFields, default_skill: str) -> Ask:
    """Read `POST /` with a JSON body."""
    request = validated(InvokeRequest, body)
    text = request.text if request.text is not None else request.prompt
    return Ask(
        Shape.INVOKE,
        skill=request.skill or default_skill,
        messages=(Message("user", text or ""),),
        sampling=_sampling(request, None, None),
        **_shared(request, headers),
    )


def plain(text: str, headers: HeaderFields, default_skill: str) -> Ask:
    """Read `POST /` with any other body: all of it is the text."""
    if not text.strip():
        raise _refused("the text is empty; say something", "text")
    if len(text) > MAX_TEXT:
        raise _refused(f"the text has {len(text)} characters; send at most {MAX_TEXT}", "text")
    return invoke({"text": text.strip()}, headers, default_skill)


def _message(message: ChatMessage) -> Message:
    calls = tuple(Call(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ())
    role = "system" if message.role == "developer" else message.role
    return Message(role, message.text, calls, message.tool_call_id or "")


def _shared(request: Common, headers: HeaderFields) -> dict[str, Any]:
    asked = [s for s in (headers.deadline_s, request.deadline_ms and request.deadline_ms / 1e3) if s is not None]
    return {
        "model": request.model,
        "deadline_s": min(asked, default=None),
        "deadline_class": headers.deadline_class,
        "chat_when_out_of_scope": request.out_of_scope == "chat",
        "local_only": headers.local_only or bool(request.local_only),
        "threshold": request.confidence_threshold,
        "battery_level": headers.battery_level,
    }


def _sampling(request: Common, max_completion_tokens: int | None, top_logprobs: int | None) -> Sampling:
    given: dict[str, Any] = {
        "max_tokens": max_completion_tokens or request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": _stops(request.stop),
        "top_logprobs": top_logprobs,
    }
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _deadline(text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_DEADLINE_MS:
        raise _refused("it must be a number of milliseconds above 0 and at most an hour", DEADLINE_HEADER)
    return value / 1e3


def _class_deadline(name: str, deadlines_ms: Mapping[str, float]) -> float | None:
    if not name:
        return None
    if name not in deadlines_ms:
        known = f"known are {', '.join(sorted(deadlines_ms))}" if deadlines_ms else "this function knows none"
        raise _refused(f"there is no such class of deadlines; {known}", DEADLINE_CLASS_HEADER)
    return deadlines_ms[name] / 1e3


def _battery_level(text: str) -> float | None:
    """A share, 0…1; what is above 1 is per cent."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _FULL_PERCENT:
        raise _refused("it must be a share from 0 to 1, or per cent up to 100", BATTERY_HEADER)
    return value / _FULL_PERCENT if value > 1 else value


def validated(schema: type[Schema], body: Mapping[str, Any]) -> Schema:
    """Read a body as `schema` has it; raises `RefusedError` naming the field."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        param, message = _blame(error, body)
        param = param or _WHOLE_MODEL.get(schema.__name__, "body")
        raise _refused(f"{param}: {message}", param) from None


def _blame(error: ValidationError, body: Mapping[str, Any]) -> tuple[str, str]:
    """The field at fault and what is wrong with it; where a union says several things, what fits the value best."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    found = [(*_param(e["loc"], body, e["type"]), e) for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
    fitting = [(name, e) for name, value, e in found if not (isinstance(value, list) and e["type"] == "string_type")]
    name, first = max(fitting or [(name, e) for name, _, e in found], key=lambda pair: len(pair[0]))
    if first["type"] == "extra_forbidden":
        return name or "body", "there is no such field; GET /openapi.json lists them"
    return name, first["msg"].removeprefix("Value error, ")


def _param(loc: Sequence[str | int], body: Any, kind: str) -> tuple[str, Any]:
    """A field as the caller wrote it, `messages[0].content`, and its value; names of union branches are left out."""
    name, here = "", body
    for index, part in enumerate(loc):
        missing = kind == "missing" and index == len(loc) - 1
        if isinstance(here, Mapping) and (missing or part in here):
            name += f".{part}" if name else str(part)
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            name += f"[{part}]"
            here = here[part]
    return name, here


def _refused(message: str, param: str) -> RefusedError:
    return RefusedError(422, message, param=param, code="invalid_value")
