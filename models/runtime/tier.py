"""What a tier is to everyone else: one interface, and the values that cross it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from models.skills import SkillSet

NO_EXIT = 2.0
"""An exit threshold that no probability reaches."""
TUNED_EXITS = None
"""An exit threshold that leaves each skill its own, chosen on validation data."""


@dataclass(frozen=True)
class JsonForm:
    """The answer is JSON that the JSON schema `schema`, given as text, allows.

    Not `strict`: keywords of the schema that cannot be kept to are passed over instead of refused.
    """

    schema: str = '{"type": "object"}'
    strict: bool = False


@dataclass(frozen=True)
class Tool:
    """A function that an answer may call; `parameters`, a JSON schema as text, describes its one argument, an object.

    `strict` is as in `JsonForm`.
    """

    name: str
    parameters: str = '{"type": "object", "properties": {}, "additionalProperties": false}'
    description: str = ""
    strict: bool = False


@dataclass(frozen=True)
class ToolUse:
    """The functions that an answer may call.

    `required`: it must call one; `only`: the name of the one it must call, exactly once; `parallel`: it may make
    several calls.
    """

    tools: tuple[Tool, ...]
    required: bool = False
    only: str = ""
    parallel: bool = True


@dataclass(frozen=True)
class Limits:
    """How to decode: `temperature` 0 is greedy; `top_logprobs` alternatives are reported with each token.

    Of answers at work the one with the earliest `deadline` (seconds, `time.monotonic`) goes first. A frame is then
    read at the last early exit before it, however sure that is; nothing else ends by it.
    `gone` says that nobody waits any more: reading the prompt then ends with `AbandonedError`.
    `draft` is text that the answer may begin with, such as a smaller model's answer: what the model agrees with costs
    it less. `json` and `tools` say what form an answer to a chat or completion must have; where both are given, what is
    no call of a function is JSON. Frames have a form of their own.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    deadline: float = math.inf
    gone: Callable[[], bool] | None = None
    json: JsonForm | None = None
    tools: ToolUse | None = None
    draft: str = ""


@dataclass(frozen=True)
class DraftUse:
    """Tokens of a draft that the model looked at, and those that it would have said itself."""

    proposed: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Token:
    """One decoded step; for a skill a step is a label decision, the intent first, then one a word.

    `text` is what the step adds to the answer ('' if nothing yet); `logprob` the natural log of the chosen token's or
    label's probability, before temperature; `margin` the probability of the best less that of the second best. Both
    are among what the answer's form allows; a token that it forces has 0 and 1.
    `finish_reason` is 'stop' or 'length' on the last token; `exit_layer` says after how many layers an early exit
    answered, if one did, and `hurried` that it was not sure enough, but there was no time for more layers; `settled`
    that the rest of the answer is known and takes no more time; `draft` what came of the draft up to here, None if
    there was none or if it was not looked at.
    """

    text: str
    logprob: float
    margin: float
    id: int = -1
    top: tuple[tuple[str, float], ...] = ()
    finish_reason: str | None = None
    exit_layer: int | None = None
    hurried: bool = False
    settled: bool = False
    draft: DraftUse | None = None


@dataclass(frozen=True)
class SkillQuery:
    """An utterance for one skill; answered by a frame, whatever form `Limits` asks for."""

    skill: str
    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation and the functions that may be called; answered by the next message.

    Each message has `role` and `content`; one of the assistant may have `tool_calls`, as chat templates expect them
    (`{"function": {"name", "arguments": {…}}}`); role `tool` is what a function returned.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A text to go on with."""

    text: str


Prompt = SkillQuery | Chat | Completion


@dataclass(frozen=True)
class TierCard:
    """What a tier says of itself; `context` in tokens, `watts` while it computes, None if nobody measured.

    `provider` is the execution provider in use; `exits` are the calibrations of early exits, by layers passed.
    """

    name: str
    model_id: str
    model_version: str
    skills: SkillSet | None
    chats: bool
    context: int
    quantisation: str
    watts: float | None = None
    watts_source: str = ""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    exits: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    provider: str = "CPU"


@dataclass(frozen=True)
class Depth:
    """Frames that were read at one depth, and the tokens that were read for them."""

    frames: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class TierStats:
    """What a tier counted since it was opened.

    `prefix_*`: prompt tokens looked up in the prefix cache, those found, blocks thrown out, and bytes held now.
    `passes` of single tokens took `pass_tokens` together: more than one each where answers share them; they lasted
    `pass_s` altogether.
    `draft_*` and `lookup_*`: tokens that drafts and lookups of repeated text proposed, and those that the model took.
    `depths`: frames by the number of layers passed.
    """

    prefix_asked_tokens: int = 0
    prefix_reused_tokens: int = 0
    prefix_evicted_blocks: int = 0
    prefix_held_bytes: int = 0
    passes: int = 0
    pass_tokens: int = 0
    pass_s: float = 0.0
    draft_proposed_tokens: int = 0
    draft_accepted_tokens: int = 0
    lookup_proposed_tokens: int = 0
    lookup_accepted_tokens: int = 0
    depths: Mapping[int, Depth] = field(default_factory=dict)


class Tier(Protocol):
    """A model that answers prompts."""

    @property
    def card(self) -> TierCard:
        """What the tier says of itself."""

    def count_tokens(self, prompt: Prompt) -> int:
        """Tokens of the prompt as the model reads it; raises `PromptError`."""

    def generate(self, prompt: Prompt, limits: Limits) -> Iterator[Token]:
        """Answer token by token; raises `PromptError` before the first, frees the session when closed."""

    def stats(self) -> TierStats:
        """What was counted since the tier was opened."""
