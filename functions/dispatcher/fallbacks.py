"""What answers when no model may or can: rules, then canned messages.

Each is a fallback as the dispatcher knows it: `answer(ask, reason)` gives a text, a frame, or None where it has
nothing to say. A text is a refusal to whoever asked for JSON; a frame is what was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flask import has_request_context, request

from functions.dispatcher.canned import DEFAULT_FILE, MODEL, Messages, read_messages
from functions.dispatcher.rules import RuleBook, read_rules
from functions.serving.ask import CHAT, Ask
from functions.serving.events import End, Event, Piece, Report, Start, Usage
from models.runtime.tier import JsonForm

RULES = "rules"
"""The source of what rules understood; a text's is `canned`."""

Answered = str | Mapping[str, Any] | None


class Fallback(Protocol):
    """Answers without a model, at once."""

    def answer(self, ask: Ask, reason: str) -> Answered:
        """A text, a frame, or None; `reason` says why no model answers. Raises nothing."""


def callers_languages() -> list[str]:
    """What the request at work says in `Accept-Language`, the dearest first; nothing outside of a request."""
    return list(request.accept_languages.values()) if has_request_context() else []


@dataclass(frozen=True)
class CannedMessages:
    """Says why there is no answer, in the caller's language where the file has it."""

    messages: Messages
    languages: Callable[[], Sequence[str]] = callers_languages

    def answer(self, ask: Ask, reason: str) -> str:  # noqa: ARG002  # each fallback looks at what it needs
        """The message for the reason."""
        return self.messages.text(reason, self.languages())


@dataclass(frozen=True)
class RulePlanner:
    """Understands what its rules know. To whoever holds answers to another form than the rules' own it says nothing."""

    book: RuleBook

    def answer(self, ask: Ask, reason: str) -> Answered:  # noqa: ARG002  # each fallback looks at what it needs
        """The plan or frame; for a chat without a form the rules' sentences."""
        if not self.book.answers(ask.skill) or ask.tools is not None or not self._has_form(ask.json):
            return None
        plan = self.book.plan(ask.text)
        if plan is None:
            return None
        return plan.text if ask.skill == CHAT and ask.json is None else plan.frame

    def _has_form(self, form: JsonForm | None) -> bool:
        if form is None or form.schema == JsonForm().schema:
            return True
        found: Any = json.loads(form.schema)
        return bool(found == self.book.schema)


@dataclass(frozen=True)
class FirstOf:
    """Asks several fallbacks in order."""

    fallbacks: Sequence[Fallback]

    def answer(self, ask: Ask, reason: str) -> Answered:
        """The first answer there is."""
        answers = (fallback.answer(ask, reason) for fallback in self.fallbacks)
        return next((answer for answer in answers if answer is not None), None)


def open_fallback(rules_file: Path | None = None, messages_file: Path | None = None) -> Fallback:
    """What a dispatcher falls back on: the rules if there is a file of them, then messages; raises `ConfigError`."""
    canned = CannedMessages(read_messages(messages_file or DEFAULT_FILE))
    return FirstOf([RulePlanner(read_rules(rules_file)), canned]) if rules_file else canned


def report_of(answer: Answered, reason: str, node_id: str) -> Report:
    """What is reported of a fallback's answer."""
    frame = dict(answer) if isinstance(answer, Mapping) else None
    source = MODEL if frame is None else RULES
    return Report(source=source, route="fallback", reason=reason, degraded=True, frame=frame, node_id=node_id)


def piece_of(ask: Ask, answer: Answered) -> Piece:
    """A fallback's answer as text; what is no frame is a refusal to who asked for JSON, so that nobody parses it."""
    if isinstance(answer, Mapping):
        return Piece(json.dumps(answer, ensure_ascii=False))
    return Piece(answer or "", refuses=ask.json is not None)


def events_of(ask: Ask, answer: Answered, report: Report) -> Iterator[Event]:
    """A fallback's answer as a service gives it."""
    yield Start(report.source, report)
    yield piece_of(ask, answer)
    yield End("stop", Usage(), report)
