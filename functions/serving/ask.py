"""`Ask`: a parsed request, free of HTTP and of the schema it came in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from models.runtime.tier import JsonForm, ToolUse

CHAT = "chat"


class Shape(StrEnum):
    """Which of the three POST routes was used; it decides how the answer is written."""

    CHAT = "chat"
    COMPLETION = "completion"
    INVOKE = "invoke"


@dataclass(frozen=True)
class Call:
    """A call of a function that an assistant made; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn of a chat; of role `tool` it is what the call with `call_id` returned."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    calls: tuple[Call, ...] = ()
    call_id: str = ""


@dataclass(frozen=True)
class Sampling:
    """How to decode; `top_logprobs` None: no log-probabilities wanted."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Ask:
    """What is asked of a function.

    `messages` holds at least one turn of the user (for `Shape.COMPLETION` there are none, but a `prompt`).
    `json` and `tools` are the form that a chat's answer must have. `draft` is what the answer may begin with.
    `deadline_s` is what the caller grants, None if it said nothing; so with `battery_level`, a share of a full battery.
    `deadline_class` is the name it gave its deadline, if any.
    """

    shape: Shape
    model: str
    skill: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    sampling: Sampling = Sampling()
    json: JsonForm | None = None
    tools: ToolUse | None = None
    draft: str = ""
    stream: bool = False
    include_usage: bool = False
    deadline_s: float | None = None
    deadline_class: str = ""
    chat_when_out_of_scope: bool = False
    local_only: bool = False
    threshold: float | None = None
    battery_level: float | None = None

    @property
    def text(self) -> str:
        """The utterance: the prompt, or what the user said last."""
        if self.shape is Shape.COMPLETION:
            return self.prompt
        return next(message.content for message in reversed(self.messages) if message.role == "user")

    def field(self, name: str | None) -> str | None:
        """A field that a tier blames, as this caller knows it: the text has another name on each route."""
        if name is None or not name.startswith(("messages", "prompt")):
            return name
        return {Shape.CHAT: "messages", Shape.COMPLETION: "prompt", Shape.INVOKE: "text"}[self.shape]


@dataclass(frozen=True)
class Clocked:
    """When a request began, when it must be answered (both on the function's monotonic clock), how long it queued.

    `gone` tells whether the caller has hung up.
    """

    started: float
    expires: float
    queued_s: float = 0.0
    gone: Callable[[], bool] | None = None
