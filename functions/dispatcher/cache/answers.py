"""Which answers are kept, for whom, for how long, and which request may have them."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from functions.dispatcher.cache import similarity
from functions.dispatcher.cache.store import AnswerStore, Entry, StoreError
from functions.serving.ask import CHAT, Ask, Message, Sampling, Shape

_LOG = logging.getLogger(__name__)
_MAX_FORGOTTEN = 10_000


@dataclass(frozen=True)
class Caller:
    """Who asks: a digest of tenant and key, '' where the caller names neither, and the conversation, '' for none."""

    tenant: str
    conversation: str = ""

    @classmethod
    def of(cls, tenant: str, api_key: str, conversation: str = "") -> Caller:
        """The caller with this key who says it is this tenant: both must be the same to see the same answers."""
        return cls(_digest([tenant, api_key]) if tenant or api_key else "", conversation)


@dataclass(frozen=True)
class CacheRules:
    """`retention_s`: the longest an answer is kept. `alike_above`: likeness that will do, None: the exact request only.

    `similarity.ABOVE` is the likeness that was measured; a lower one gives more answers, and more wrong ones.
    """

    retention_s: float = 3600.0
    alike_above: float | None = None
    max_answer_bytes: int = 16_384

    def __post_init__(self) -> None:
        """Refuse rules that mean nothing; raises `ValueError` naming the field."""
        if not 0 < self.retention_s <= 366 * 86_400:
            raise ValueError("cache.retention_s must be above 0 and at most a year")
        if self.alike_above is not None and not 0 < self.alike_above <= 1:
            raise ValueError("cache.alike_above must be above 0 and at most 1")


@dataclass(frozen=True)
class Given:
    """An answer as it was given."""

    text: str
    model: str
    model_version: str = ""
    frame: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Hit:
    """An answer given before; `likeness` of its question to the one asked, 1 for the same request."""

    given: Given
    kind: Literal["exact", "alike"]
    likeness: float


class AnswerCache:
    """Answers by request and by likeness of the question, each tenant's apart.

    Nothing of a request that is `local_only` or names no tenant is kept, nor is it answered from here. Neither is one
    that samples, asks for log-probabilities or may call functions.
    """

    def __init__(
        self, store: AnswerStore, rules: CacheRules = CacheRules(), clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._rules = rules
        self._clock = clock
        self._lock = threading.Lock()
        self._forgotten: dict[tuple[str, str], float] = {}

    def takes(self, caller: Caller, ask: Ask) -> bool:
        """Whether the request is the cache's business at all."""
        repeatable = ask.sampling.temperature == 0 and ask.sampling.top_logprobs is None and ask.tools is None
        return bool(caller.tenant) and not ask.local_only and repeatable

    def look_up(self, caller: Caller, ask: Ask) -> Hit | None:
        """The tenant's answer to this request, or to one that is enough like it; None also where the store fails."""
        if not self.takes(caller, ask):
            return None
        try:
            return self._found(caller, ask, self._clock())
        except StoreError as error:
            _LOG.warning("nothing was looked up: %s", error)
            return None

    def _found(self, caller: Caller, ask: Ask, now_s: float) -> Hit | None:
        exact = self._store.get(caller.tenant, key_of(ask), now_s)
        if exact is not None:
            return Hit(_given(exact), "exact", 1.0)
        scope, above = scope_of(ask), self._rules.alike_above
        if above is None or not scope:
            return None
        found = self._store.nearest(caller.tenant, scope, similarity.features(ask.text), now_s)
        if found is None or found[1] < above:
            return None
        return Hit(_given(found[0]), "alike", min(1.0, found[1]))

    def keep(self, caller: Caller, ask: Ask, given: Given, asked_s: float | None = None) -> bool:
        """Keep an answer; False if it may not be kept. `asked_s`: when the request came, on the cache's clock."""
        if not self.takes(caller, ask) or len(given.text.encode()) > self._rules.max_answer_bytes:
            return False
        now_s = self._clock()
        if self._was_forgotten(caller, now_s if asked_s is None else asked_s):
            return False
        scope = scope_of(ask) if self._rules.alike_above is not None else ""
        entry = Entry(
            tenant=caller.tenant,
            key=key_of(ask),
            scope=scope,
            conversation=caller.conversation,
            text=given.text,
            model=given.model,
            model_version=given.model_version,
            frame=json.dumps(given.frame, ensure_ascii=False) if given.frame is not None else "",
            made_s=now_s,
            expires_s=now_s + self._rules.retention_s,
            features=similarity.features(ask.text) if scope else {},
        )
        try:
            return self._store.put(entry)
        except StoreError as error:
            _LOG.warning("an answer was not kept: %s", error)
            return False

    def forget(self, caller: Caller) -> int:
        """Delete what came of the caller's conversation, also what is still on its way; gives how much that was.

        Raises `StoreError` where that cannot be done.
        """
        if not caller.tenant or not caller.conversation:
            return 0
        with self._lock:
            self._forgotten[caller.tenant, caller.conversation] = self._clock()
            while len(self._forgotten) > _MAX_FORGOTTEN:
                del self._forgotten[next(iter(self._forgotten))]
        return self._store.forget(caller.tenant, caller.conversation)

    def purge(self) -> int:
        """Delete what has been kept long enough; gives how much that was."""
        return self._store.purge(self._clock())

    def now(self) -> float:
        """The cache's clock, in seconds since the epoch."""
        return self._clock()

    def _was_forgotten(self, caller: Caller, asked_s: float) -> bool:
        with self._lock:
            when_s = self._forgotten.get((caller.tenant, caller.conversation))
        return when_s is not None and asked_s <= when_s


def key_of(ask: Ask) -> str:
    """A digest of all that an answer may depend on."""
    return _digest(_essence(ask))


def scope_of(ask: Ask) -> str:
    """A digest of all but the question's wording, '' where no other wording will do.

    Only chats of one question are put in other words; frames hold the words themselves. Numbers and denials are no
    wording.
    """
    questions = [message for message in ask.messages if message.role != "system"]
    if ask.skill != CHAT or ask.shape is Shape.COMPLETION or len(questions) != 1:
        return ""
    wordless = replace(ask, messages=tuple(message for message in ask.messages if message.role == "system"))
    return _digest([_essence(wordless), similarity.must_agree(ask.text)])


def _essence(ask: Ask) -> list[Any]:
    form = [ask.json.schema, ask.json.strict] if ask.json else None
    chat = [_message(message) for message in ask.messages]
    how = [ask.model, ask.skill, ask.threshold, ask.chat_when_out_of_scope, form, _sampling(ask.sampling)]
    return [ask.shape is Shape.COMPLETION, how, chat, ask.prompt]


def _message(message: Message) -> list[Any]:
    return [message.role, message.content, [[call.name, call.arguments] for call in message.calls]]


def _sampling(sampling: Sampling) -> list[Any]:
    """What matters of it while nothing is drawn."""
    return [sampling.max_tokens, list(sampling.stop)]


def _given(entry: Entry) -> Given:
    frame = json.loads(entry.frame) if entry.frame else None
    return Given(entry.text, entry.model, entry.model_version, frame)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
