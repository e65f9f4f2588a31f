"""A kiosk: frequent questions are answered from a cache before any model, the rest by the device, then the edge.

Three steps, the cheapest first:

1. `questions.toml`, what the operator wrote, by exact and by like wording;
2. what a model answered before, to this tenant, kept for an hour;
3. the bundle: the device tier, and the edge where the device is unsure or the question is none of its skills'.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
from pydantic import Field, ValidationError

from functions.dispatcher.cache import similarity
from functions.dispatcher.cache.answers import AnswerCache, CacheRules, Caller, Given
from functions.dispatcher.cache.memory import MemoryStore
from functions.dispatcher.cache.sqlite import SqliteStore
from functions.dispatcher.cache.store import Bounds
from functions.serving.ask import Ask, Message, Shape
from functions.serving.settings import ConfigError
from functions.serving.strict import Strict

QUESTIONS = Path(__file__).with_name("questions.toml")
_YEAR_S = 366 * 86_400
_DEADLINE_MS = 5000
_OUT_OF_SCOPE = "out_of_scope"
_SORRY = "I can't answer that right now. Please ask at the information desk."


_Text = Annotated[str, Field(min_length=1, max_length=1000)]


class _Question(Strict):
    ask: Annotated[list[_Text], Field(min_length=1)]
    answer: _Text


class _Questions(Strict):
    question: list[_Question]


@dataclass(frozen=True)
class Answer:
    """What the kiosk says, and who says it: questions, cache, device, edge or canned."""

    text: str
    source: str


@dataclass(frozen=True)
class Kiosk:
    """One process for several tenants' terminals; `written` holds their operators' answers, `learned` the models'."""

    written: AnswerCache
    learned: AnswerCache
    client: httpx.Client

    @classmethod
    def open(cls, learned: AnswerCache, client: httpx.Client) -> Kiosk:
        """A kiosk that knows no question yet."""
        rules = CacheRules(retention_s=_YEAR_S, alike_above=similarity.ABOVE)
        return cls(AnswerCache(MemoryStore(Bounds()), rules), learned, client)

    def learn(self, tenant: str, path: Path = QUESTIONS) -> int:
        """Read the operator's questions for a tenant; gives how many wordings; raises `ConfigError`."""
        found = [(text, question.answer) for question in _questions(path) for text in question.ask]
        for text, answer in found:
            self.written.keep(Caller.of(tenant, ""), _ask(text), Given(answer, path.name))
        return len(found)

    def answer(self, tenant: str, question: str, conversation: str = "", *, local_only: bool = False) -> Answer:
        """Answer one question; what is `local_only` stays on the device site and is kept nowhere."""
        caller = Caller.of(tenant, "", conversation)
        hit = self.written.look_up(caller, _ask(question))
        if hit is not None:
            return Answer(hit.given.text, "questions")
        hit = self.learned.look_up(caller, _ask(question, local_only=local_only))
        if hit is not None:
            return Answer(hit.given.text, "cache")
        return self._asked(caller, question, local_only=local_only)

    def forget(self, tenant: str, conversation: str) -> int:
        """Delete what was learned in a conversation; gives how many answers that were."""
        return self.learned.forget(Caller.of(tenant, "", conversation))

    def _asked(self, caller: Caller, question: str, *, local_only: bool) -> Answer:
        """Ask the bundle; a whole answer in words is kept. A frame names what is wanted, which is no answer to keep."""
        asked_s = self.learned.now()
        body = {
            "skill": "assistant",
            "out_of_scope": "chat",
            "messages": [{"role": "user", "content": question}],
            "deadline_ms": _DEADLINE_MS,
            "local_only": local_only,
        }
        try:
            response = self.client.post("/v1/chat/completions", json={"model": "auto", **body})
            response.raise_for_status()
            said = response.json()
            choice, report = said["choices"][0], said["edgecascade"]
            text, finished = choice["message"]["content"] or "", choice["finish_reason"] == "stop"
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return Answer(_SORRY, "canned")
        if (report["frame"] or {}).get("intent") == _OUT_OF_SCOPE:  # the device knows only that, and the edge is away
            return Answer(_SORRY, "canned")
        if report["frame"] is None and finished and not report["degraded"]:
            given = Given(text, report["source"], report["model_version"])
            self.learned.keep(caller, _ask(question, local_only=local_only), given, asked_s)
        return Answer(text, report["source"])


def _ask(question: str, *, local_only: bool = False) -> Ask:
    return Ask(Shape.CHAT, "auto", "chat", (Message("user", question),), local_only=local_only)


def _questions(path: Path) -> Sequence[_Question]:
    """The entries of a question file; raises `ConfigError` naming the entry and its field."""
    try:
        return _Questions.model_validate(tomllib.loads(path.read_text("utf-8"))).question
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ConfigError(f"{path.name}, field {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Answer the questions given, or those on standard input, a line each."""
    parser = argparse.ArgumentParser(description="Answer questions at a kiosk.")
    parser.add_argument("question", nargs="*", help="without any, one a line on standard input")
    parser.add_argument("--tenant", default="mill-street", help="whose kiosk it is")
    parser.add_argument("--conversation", default="", help="the visitor's; --forget deletes what came of it")
    parser.add_argument("--forget", action="store_true", help="delete what was learned in the conversation, and end")
    parser.add_argument("--local-only", action="store_true", help="the questions may not leave the device site")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--cache", type=Path, default=Path("var/kiosk.db"), help="where learned answers are kept")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the bundle's gateway")
    given = parser.parse_args(arguments)
    try:
        given.cache.parent.mkdir(parents=True, exist_ok=True)
        store = SqliteStore(given.cache, Bounds())
        with closing(store), httpx.Client(base_url=given.url, timeout=10.0, trust_env=False) as client:
            kiosk = Kiosk.open(AnswerCache(store, CacheRules(alike_above=similarity.ABOVE)), client)
            kiosk.learned.purge()
            if given.forget:
                print(f"{kiosk.forget(given.tenant, given.conversation)} answers forgotten")
                return 0
            kiosk.learn(given.tenant, given.questions)
            for question in given.question or (line.strip() for line in sys.stdin if line.strip()):
                found = kiosk.answer(given.tenant, question, given.conversation, local_only=given.local_only)
                print(f"{found.text}  ({found.source})", flush=True)
    except ConfigError as error:
        print(f"kiosk: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
