"""The replies as OpenAI's schema has them, with our `edgecascade` object. `/openapi.json` is made from these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from functions.serving.events import CallDelta, Logprob, Report, Usage

_LEAST_LOGPROB = -9999.0


class Reply(BaseModel):
    """Base: what was not set is not sent."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    def json_text(self) -> str:
        """One line of JSON with the fields that were set."""
        return self.model_dump_json(exclude_unset=True)


class TopLogprob(Reply):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log-probabilities as chat completions have them."""

    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, tokens: list[Logprob]) -> ChatLogprobs:
        """Write them down."""
        content = [
            TokenLogprob(**_token(t.token, t.logprob), top_logprobs=[TopLogprob(**_token(*rival)) for rival in t.top])
            for t in tokens
        ]
        return cls(content=content, refusal=None)


class TextLogprobs(Reply):
    """Log-probabilities as text completions have them."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def of(cls, tokens: list[Logprob], offset: int) -> TextLogprobs:
        """Write them down; `offset` is where the first token begins in the whole text, in characters."""
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.token)
        return cls(
            tokens=[t.token for t in tokens],
            token_logprobs=[_finite(t.logprob) for t in tokens],
            top_logprobs=[{text: _finite(value) for text, value in t.top} for t in tokens],
            text_offset=offsets,
        )


class FunctionCall(Reply):
    """What is called; `arguments` is a JSON object, as text."""

    name: str
    arguments: str


class ToolCallReply(Reply):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: FunctionCall

    @classmethod
    def of(cls, call: CallDelta) -> ToolCallReply:
        """Write a whole call down."""
        return cls(id=call.id, type="function", function=FunctionCall(name=call.name, arguments=call.arguments))


class FunctionDelta(Reply):
    """Some more of what is called; the first piece has the name."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Reply):
    """Some more of a call of a function; the first piece has the id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta

    @classmethod
    def of(cls, call: CallDelta) -> ToolCallDelta:
        """Write it down."""
        if not call.id:
            return cls(index=call.index, function=FunctionDelta(arguments=call.arguments))
        function = FunctionDelta(name=call.name, arguments=call.arguments)
        return cls(index=call.index, id=call.id, type="function", function=function)


class AssistantMessage(Reply):
    """The answer. `refusal` holds what is said instead where no answer has the form that was asked for."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(Reply):
    """The one choice of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class Delta(Reply):
    """What a chunk adds."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    refusal: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(Reply):
    """The choice of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class TextChoice(Reply):
    """The one choice of a text completion, whole or in chunks."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class Head(Reply):
    """What completions and chunks begin with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Head):
    """Reply of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    edgecascade: Report


class ChatCompletionChunk(Head):
    """One event of a streamed chat; the last ones carry `edgecascade`, and `usage` where it was asked for."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None
    edgecascade: Report | None = None


class TextCompletion(Head):
    """Reply of `/v1/completions`; streamed, each event has this form too."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage | None = None
    edgecascade: Report | None = None


class InvokeReply(Reply):
    """Reply of `POST /` to JSON: the answer as text, and the frame if it is one."""

    answer: str
    frame: dict[str, Any] | None
    edgecascade: Report


class ModelFacts(Reply):
    """What a tier can do, how it was calibrated, and the watts that its card gives it, with their source."""

    available: bool
    skills: list[str]
    thresholds: dict[str, float]
    model: str
    model_version: str
    context: int | None
    quantisation: str | None
    execution_provider: str | None = None
    watts: float | None = None
    watts_source: str = ""


class ModelEntry(Reply):
    """One entry of `/v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    edgecascade: ModelFacts


class ModelList(Reply):
    """Reply of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ErrorDetail(Reply):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Every error of every route; streamed, it comes as an event."""

    error: ErrorDetail


class Health(Reply):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(Reply):
    """Whether requests are taken, and if not, why."""

    ready: bool
    reason: str


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
