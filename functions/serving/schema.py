"""The request schema: OpenAI's, strict, and our extension fields.

Fields we cannot honour are taken only with the value that asks for nothing; the few that change no answer (`user`,
`metadata`, …) are taken and not looked at; any other is refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from functions.serving.form_schema import (
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
    JsonSchemaFormat,
    NamedChoice,
    ResponseFormat,
    ToolCall,
    ToolChoice,
    ToolDefinition,
    tool_use,
)
from functions.serving.strict import Strict, Text
from models.runtime.tier import JsonForm, ToolUse

MAX_MESSAGES = 256
MAX_TOKENS = 8192
MAX_DEADLINE_MS = 3_600_000.0
MAX_DRAFT = 16_384

Draft = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_DRAFT,
        description="What the answer may begin with, such as a smaller model's answer: the model reads it along and "
        "writes on from where it disagrees, which takes less time. Of no use to skills, whose frames are not written.",
    ),
]

_CHAT = (None, "chat")
_NOTHING: tuple[Any, ...] = (None,)


class TextPart(Strict):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: Text


def _asks_for_nothing(value: Any, allowed: tuple[Any, ...]) -> Any:
    """Return `value` if it is one of `allowed`, types included."""
    if any(type(value) is type(one) and value == one for one in allowed):
        return value
    shown = " or ".join(json.dumps(one) for one in allowed)
    raise ValueError(f"this is not supported; leave it out or send {shown}")


def _missing() -> PydanticCustomError:
    return PydanticCustomError("missing", "Field required")


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatMessage(Strict):
    """One message of a chat; `tool_call_id` says which call a message of role `tool` answers."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[Annotated[str, Field(max_length=256)] | None, Field(validate_default=True)] = None
    refusal: Text | None = None
    content: Annotated[Text | list[TextPart] | None, Field(validate_default=True)] = None
    # What a client sends back when it repeats our own message.
    annotations: Any = None
    audio: Any = None
    function_call: Any = None

    @field_validator("annotations", "audio", "function_call")
    @classmethod
    def _neutral(cls, value: Any) -> Any:
        return _asks_for_nothing(value, (None, []))

    @property
    def text(self) -> str:
        """What was said as one string."""
        return _joined(self.content or "") or self.refusal or ""

    @field_validator("tool_calls")
    @classmethod
    def _made_by_the_assistant(cls, value: list[ToolCall] | None, info: ValidationInfo) -> list[ToolCall] | None:
        if value and info.data.get("role") != "assistant":
            raise ValueError("only messages of the assistant hold calls")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _answers_a_call(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is not None) != (info.data.get("role") == "tool"):
            raise _missing() if value is None else ValueError("only messages of role 'tool' answer a call")
        return value

    @field_validator("content")
    @classmethod
    def _says_something(cls, value: str | list[TextPart] | None, info: ValidationInfo) -> str | list[TextPart] | None:
        if value is None and not (info.data.get("tool_calls") or info.data.get("refusal")):
            raise _missing()
        if info.data.get("role") == "user" and not _joined(value or "").strip():
            raise ValueError("it is empty; say something")
        return value


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Common(Strict):
    """What all three POST routes take."""

    model: Annotated[str, Field(min_length=1, max_length=256)] = "auto"
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1, max_length=256)] | list[str] | None = None
    skill: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    deadline_ms: Annotated[float, Field(gt=0, le=MAX_DEADLINE_MS)] | None = None
    out_of_scope: Literal["frame", "chat"] | None = None
    local_only: bool | None = None
    confidence_threshold: Annotated[float, Field(ge=0, le=1)] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and (len(value) > 4 or not all(0 < len(one) <= 256 for one in value)):  # noqa: PLR2004
            raise ValueError("send at most 4 stop strings of 1 to 256 characters each")
        return value


class OpenAiCommon(Common):
    """What chat and text completions share of OpenAI's schema."""

    edgecascade_draft: Draft | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    store: Any = None
    # Taken and not looked at: they change nothing in the answer.
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None

    @field_validator("n")
    @classmethod
    def _one_answer(cls, value: int | None) -> int | None:
        if value not in {None, 1}:
            raise ValueError("only one answer per request; leave it out or send 1")
        return value

    @field_validator("frequency_penalty", "presence_penalty")
    @classmethod
    def _no_penalty(cls, value: Any) -> Any:
        return _asks_for_nothing(value, (None, 0, 0.0))

    @field_validator("logit_bias")
    @classmethod
    def _no_bias(cls, value: Any) -> Any:
        return _asks_for_nothing(value, (None, {}))

    @field_validator("store")
    @classmethod
    def _no_store(cls, value: Any) -> Any:
        return _asks_for_nothing(value, (None, False))

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> OpenAiCommon:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream=true only")
        return self


class ChatRequest(OpenAiCommon):
    """`POST /v1/chat/completions`."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "audio": _NOTHING,
        "prediction": _NOTHING,
        "web_search_options": _NOTHING,
        "reasoning_effort": (None, "none"),
        "verbosity": _NOTHING,
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    @field_validator(*NEUTRAL)
    @classmethod
    def _neutral(cls, value: Any, info: ValidationInfo) -> Any:
        return _asks_for_nothing(value, cls.NEUTRAL[info.field_name or ""])

    @property
    def json_form(self) -> JsonForm | None:
        """The form that `response_format` asks for."""
        return self.response_format.form if self.response_format else None

    @property
    def tool_use(self) -> ToolUse | None:
        """What may be called."""
        return tool_use(self.tools or [], self.tool_choice, parallel=self.parallel_tool_calls is not False)

    @field_validator("messages")
    @classmethod
    def _has_a_user(cls, value: list[ChatMessage]) -> list[ChatMessage]:
        if not any(message.role == "user" for message in value):
            raise ValueError("there is no message of the user; send one with role 'user'")
        return value

    @field_validator("messages")
    @classmethod
    def _results_follow_calls(cls, value: list[ChatMessage]) -> list[ChatMessage]:
        called: set[str] = set()
        for index, message in enumerate(value):
            called |= {call.id for call in message.tool_calls or ()}
            if message.tool_call_id is not None and message.tool_call_id not in called:
                raise ValueError(f"'tool_call_id' of message {index} is of no call in a message before it")
        return value

    @field_validator("response_format")
    @classmethod
    def _frames_have_their_own_schema(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, JsonSchemaFormat) and info.data.get("skill") not in _CHAT:
            raise ValueError("a skill answers with a frame of its own schema; send 'json_object' or nothing")
        return value

    @field_validator("tools")
    @classmethod
    def _have_names_of_their_own(cls, value: list[ToolDefinition] | None) -> list[ToolDefinition] | None:
        names = [tool.function.name for tool in value or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"there are two functions of the name '{twice}'")
        return value

    @field_validator("tools")
    @classmethod
    def _have_bounded_schemas(cls, value: list[ToolDefinition] | None) -> list[ToolDefinition] | None:
        size = sum(len(tool.function.tool.parameters.encode()) for tool in value or ())
        if size > MAX_TOOLS_BYTES:
            raise ValueError(f"the functions' schemas have {size} bytes; send at most {MAX_TOOLS_BYTES}")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _can_be_made(cls, value: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        names = {tool.function.name for tool in info.data.get("tools") or ()}
        named = value.function.name if isinstance(value, NamedChoice) else ""
        if named and named not in names:
            raise ValueError(f"'tools' has no function of the name '{named}'")
        if value == "required" and not names:
            raise ValueError("there is nothing to call; send 'tools'")
        if (named or value == "required") and info.data.get("skill") not in _CHAT:
            raise ValueError("a skill answers with a frame and calls no functions; leave 'skill' out or send 'auto'")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("top_logprobs goes with logprobs=true only")
        return value


class CompletionRequest(OpenAiCommon):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None
    echo: Any = None
    suffix: Any = None

    @field_validator("best_of")
    @classmethod
    def _best_of_one(cls, value: int | None) -> int | None:
        return cls._one_answer(value)

    @field_validator("echo")
    @classmethod
    def _no_echo(cls, value: Any) -> Any:
        return _asks_for_nothing(value, (None, False))

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: Any) -> Any:
        return _asks_for_nothing(value, (None, ""))

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, value: str | list[str]) -> str | list[str]:
        if not "".join(value).strip():
            raise ValueError("the prompt is empty; say something")
        return value

    @property
    def text(self) -> str:
        """The prompt as one string."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class InvokeRequest(Common):
    """`POST /` with JSON: `text` or `prompt`, which mean the same."""

    text: Text | None = None
    prompt: Text | None = None

    @field_validator("text", "prompt")
    @classmethod
    def _says_something(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("it is empty; say something")
        return value

    @model_validator(mode="after")
    def _one_text(self) -> InvokeRequest:
        if (self.text is None) == (self.prompt is None):
            raise ValueError("send 'text' or 'prompt', one of the two")
        return self
