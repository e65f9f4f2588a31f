"""What is said when no model answers: messages by reason and language, from a file that a user can edit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from functions.dispatcher.rules import parse_toml, read_text
from functions.serving.settings import ConfigError

MODEL = "canned"
DEFAULT_FILE = Path(__file__).with_name("canned.toml")
ELSE = "else"
REASONS = frozenset(
    {
        *("battery", "deadline", "latency", "local_only"),
        *(f"{tier}_{what}" for tier in ("device", "edge") for what in ("busy", "error", "refused", "unavailable")),
    }
)
"""Why there may be no answer of a model."""
_MAX_TEXT = 1000
# A language tag as RFC 5646 has it, as far as messages are kept apart by it: en, pt-br, zh-hant.
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8})*")


@dataclass(frozen=True)
class Messages:
    """Messages by language and reason; every language has one for `else`."""

    by_language: Mapping[str, Mapping[str, str]]
    default_language: str

    @classmethod
    def parse(cls, text: str, name: str) -> Messages:
        """Read a message file's text; raises `ConfigError`: one sentence with the file's `name` and the field."""
        values = parse_toml(text, name)
        default = values.pop("default_language", None)
        if not isinstance(default, str) or default not in values:
            known = ", ".join(values) or "none"
            raise ConfigError(f"{name}: field 'default_language' must name a language of the file (it has {known})")
        for language, table in values.items():
            _check(name, language, table)
        return cls(values, default)

    def text(self, reason: str, languages: Sequence[str] = ()) -> str:
        """The message for a reason, in the first of the caller's languages that there is, else in the default one."""
        table = next((found for tag in languages if (found := self._table(tag))), self._default)
        return table.get(reason, table[ELSE])

    @property
    def _default(self) -> Mapping[str, str]:
        return self.by_language[self.default_language]

    def _table(self, tag: str) -> Mapping[str, str] | None:
        """The language of a tag, or what it is a variant of: `de` for `de-AT` (RFC 4647, lookup)."""
        parts = tag.lower().split("-")
        names = ("-".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self.by_language[name] for name in names if name in self.by_language), None)


def read_messages(path: Path = DEFAULT_FILE) -> Messages:
    """Read a message file; raises `ConfigError`."""
    return Messages.parse(read_text(path), path.name)


def text_for(reason: str) -> str:
    """The default file's message for a reason."""
    return _shipped().text(reason)


@cache
def _shipped() -> Messages:
    return read_messages()


def _check(name: str, language: str, table: object) -> None:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name}: there is no field '{language}'; languages are tables, such as [en]")
    if not _LANGUAGE.fullmatch(language):
        raise ConfigError(f"{name}: '{language}' is no language tag; write it in small letters, such as en or pt-br")
    if ELSE not in table:
        raise ConfigError(f"{name}: language '{language}' has no field '{ELSE}', which all other reasons get")
    for reason, text in table.items():
        if reason not in REASONS | {ELSE}:
            known = ", ".join(sorted(REASONS))
            raise ConfigError(f"{name}: language '{language}' has the unknown field '{reason}'; known: {known}")
        if not isinstance(text, str) or not 0 < len(text.strip()) <= len(text) <= _MAX_TEXT:
            raise ConfigError(f"{name}: language '{language}', field '{reason}' must be a text of up to {_MAX_TEXT}")
