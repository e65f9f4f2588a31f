"""Let a tier answer: from an `Ask` to its prompt, and from its tokens to events. Knows nothing of HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, cast

from functions.serving.ask import CHAT, Ask, Call, Clocked, Message, Shape
from functions.serving.calls import CallReader
from functions.serving.errors import BrokenOffError, ClientLeftError, OverloadedError, RefusedError, from_prompt_error
from functions.serving.events import Draft, End, Event, Joules, Logprob, Piece, Report, Start, Timing, Usage
from models.errors import AbandonedError, PromptError, ShardsLostError
from models.runtime.confidence import Confidence
from models.runtime.tier import Chat, Completion, Limits, Prompt, SkillQuery, Tier, TierCard, Token

_RETRY_AFTER_S = 1
# What closes a frame whose decode was cut short.
_FRAME_ENDS = ("}}", "}")


@dataclass(frozen=True)
class Answerer:
    """A loaded tier with its calibration."""

    tier: Tier
    confidence: Confidence
    node_id: str
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of(cls, tier: Tier, node_id: str) -> Answerer:
        """Read the calibration from the tier's card; raises `ValueError` or `KeyError` if it is malformed."""
        return cls(tier, Confidence.from_manifest(tier.card.calibration, tier.card.exits), node_id)

    def check(self, ask: Ask) -> None:
        """Raise `RefusedError` for what this tier cannot answer, whatever the text."""
        card = self.tier.card
        if ask.model not in {"auto", card.name, card.model_id}:
            message = f"there is no such model here; use 'auto', '{card.name}' or '{card.model_id}'"
            raise RefusedError(404, message, param="model", code="model_not_found")
        if ask.skill not in self.skills:
            message = f"the {card.name} tier does not know this skill; use {' or '.join(map(repr, self.skills))}"
            raise RefusedError(422, message, param="skill", code="unsupported_skill")
        if ask.skill == CHAT and ask.sampling.max_tokens > card.context:
            message = f"max_tokens is above the model's context of {card.context} tokens"
            raise RefusedError(422, message, param="max_tokens", code="invalid_value")

    @property
    def skills(self) -> tuple[str, ...]:
        """Skills this tier answers, `chat` among them if it can."""
        card = self.tier.card
        return (*(card.skills.names if card.skills else ()), *((CHAT,) if card.chats else ()))

    def events(self, ask: Ask, clocked: Clocked) -> Iterator[Event]:
        """Decode until the tier or the deadline ends it. `PromptError`s come before the first event."""
        prompt = _prompt(ask)
        decode = _Decode(self.clock(), CallReader() if ask.tools and ask.skill == CHAT else None)
        with closing(self._tokens(ask, prompt, clocked)) as tokens:
            for token in tokens:
                decode.add(token, self.clock())
                if len(decode.tokens) == 1:
                    yield Start(self.tier.card.model_id, self._forecast(ask, clocked, decode))
                yield decode.piece(token)
                is_open = token.finish_reason is None and not token.settled
                if is_open and self.clock() >= clocked.expires:
                    decode.late = True
                    break
        yield from self._ending(ask, clocked, decode, prompt)

    def _tokens(self, ask: Ask, prompt: Prompt, clocked: Clocked) -> Generator[Token, None, None]:
        """The tier's tokens, at least one; its complaints in the caller's words. Closing it frees the tier."""
        try:
            tokens = self.tier.generate(prompt, _limits(ask, self.tier.card, clocked))
            with closing(cast("Any", tokens)):
                first = next(tokens, None)
                if first is None:
                    raise BrokenOffError(500, "the tier gave no token", code="no_token")
                yield first
                yield from tokens
        except PromptError as error:
            raise from_prompt_error(error, ask.field(error.field)) from error
        except AbandonedError as error:
            raise ClientLeftError from error
        except ShardsLostError as error:
            raise OverloadedError(503, str(error), code="shards_lost", retry_after_s=_RETRY_AFTER_S) from error

    def _ending(self, ask: Ask, clocked: Clocked, decode: _Decode, prompt: Prompt) -> Iterator[Event]:
        frame = None
        if ask.skill != CHAT:
            frame, tail = _frame(decode.text)
            if tail:
                yield Piece(tail)
        if decode.reader and decode.reader.flush():
            yield Piece(decode.reader.flush())
        usage = Usage.of(self.tier.count_tokens(prompt), len(decode.tokens))
        report = self._report(ask, clocked, decode, late=decode.late or decode.tokens[-1].hurried)
        judged = report if frame is None else self._judged(report, ask, frame, decode)
        yield End(decode.finish_reason, usage, judged)

    def _forecast(self, ask: Ask, clocked: Clocked, decode: _Decode) -> Report:
        """What is known after the first token; of a frame, how sure the tier expects to be of it."""
        report = self._report(ask, clocked, decode, late=False)
        frame = None if ask.skill == CHAT else _frame(decode.text)[0]
        if frame is None:
            return report
        confidence = self.confidence.forecast(ask.skill, str(frame.get("intent", "")), decode.tokens[0])
        return report.model_copy(update={"confidence": confidence, "threshold": self._threshold(ask)})

    def _threshold(self, ask: Ask) -> float:
        return self.confidence.threshold(ask.skill) if ask.threshold is None else ask.threshold

    def _report(self, ask: Ask, clocked: Clocked, decode: _Decode, *, late: bool) -> Report:
        card = self.tier.card
        reason = "chat" if ask.skill == CHAT else "requested"
        return Report(
            source=card.name,
            route=card.name,
            reason="deadline" if late else reason,
            degraded=late,
            model_version=card.model_version,
            node_id=self.node_id,
            timing_ms=decode.timing(clocked, self.clock()),
            joules=_joules(card, decode),
            draft=_draft(decode.tokens[-1]) if ask.draft else None,
        )

    def _judged(self, report: Report, ask: Ask, frame: dict[str, Any], decode: _Decode) -> Report:
        """The report with the frame, how sure the tier is, and from where on it should be trusted."""
        intent = str(frame.get("intent", ""))
        early = decode.tokens[-1].exit_layer
        confidence = None if decode.late else self.confidence.final(ask.skill, intent, decode.tokens, early)
        return report.model_copy(update={"frame": frame, "confidence": confidence, "threshold": self._threshold(ask)})


@dataclass
class _Decode:
    """One decode while it runs; times in seconds on the function's clock. `reader` where functions may be called."""

    began: float
    reader: CallReader | None = None
    tokens: list[Token] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    late: bool = False

    def add(self, token: Token, now: float) -> None:
        """Note a token."""
        if not self.tokens:
            self.first = now
        self.last = now
        self.tokens.append(token)

    def piece(self, token: Token) -> Piece:
        """What the token adds to the answer."""
        piece = Piece(token.text, (Logprob(token.text, token.logprob, token.top),))
        return self.reader.push(piece) if self.reader else piece

    @property
    def finish_reason(self) -> str:
        """Why the answer ended."""
        said = "length" if self.late else self.tokens[-1].finish_reason or "stop"
        called = self.reader is not None and self.reader.only_whole_calls
        return "tool_calls" if said == "stop" and called else said

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(token.text for token in self.tokens)

    def timing(self, clocked: Clocked, now: float) -> Timing:
        """Milliseconds by part."""
        return Timing(
            total=1e3 * (now - clocked.started),
            queue=1e3 * clocked.queued_s,
            prefill=1e3 * (self.first - self.began),
            decode=1e3 * (self.last - self.first),
            first_token=1e3 * (self.first - clocked.started),
        )


def _prompt(ask: Ask) -> Prompt:
    if ask.skill != CHAT:
        return SkillQuery(ask.skill, ask.text)
    if ask.shape is Shape.COMPLETION:
        return Completion(ask.prompt)
    return Chat(tuple(_message(message) for message in ask.messages), ask.tools.tools if ask.tools else ())


def _message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        values["tool_calls"] = [_call(call) for call in message.calls]
    if message.call_id:
        values["tool_call_id"] = message.call_id
    return values


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _limits(ask: Ask, card: TierCard, clocked: Clocked) -> Limits:
    """How to decode. A frame is as long as its utterance and always the best one: sampling does not apply to it."""
    sampling = ask.sampling
    limits = Limits(top_logprobs=sampling.top_logprobs or 0, deadline=clocked.expires, gone=clocked.gone)
    if ask.skill != CHAT:
        return replace(limits, max_tokens=card.context)
    return replace(
        limits,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=sampling.stop,
        json=ask.json,
        tools=ask.tools,
        draft=ask.draft,
    )


def _frame(text: str) -> tuple[dict[str, Any] | None, str]:
    """The frame in `text`, and what has to be added to the text to make it whole."""
    for tail in ("", *_FRAME_ENDS):
        try:
            frame = json.loads(text + tail)
        except json.JSONDecodeError:
            continue
        return (frame, tail) if isinstance(frame, dict) else (None, "")
    return None, ""


def _draft(token: Token) -> Draft:
    """What the tier says of the draft with its last token."""
    if token.draft is None:
        return Draft(ignored=True)
    return Draft(proposed=token.draft.proposed, accepted=token.draft.accepted)


def _joules(card: TierCard, decode: _Decode) -> Joules | None:
    if card.watts is None:
        return None
    return Joules(value=card.watts * (decode.last - decode.began), kind="modelled", source=card.watts_source)
