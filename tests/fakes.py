"""Stand-ins at the seams: a tier without a model, and apps around it for servers of their own."""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from flask import Flask
from werkzeug.serving import WSGIRequestHandler, make_server

from functions.dispatcher.app import create_app as create_dispatcher
from functions.dispatcher.config import DispatcherConfig
from functions.federation.app import PARTS
from functions.federation.app import create_app as create_federation
from functions.federation.config import FederationConfig
from functions.serving.settings import Common, TierConfig
from functions.serving.tier_app import create_tier_app, create_tier_server
from models.errors import PromptError, PromptTooLongError
from models.runtime.tier import Chat, DraftUse, Limits, Prompt, SkillQuery, TierCard, TierStats, Token
from models.skills import OUT_OF_SCOPE, Skill, SkillSet

SKILLS = SkillSet(
    (
        Skill("assistant", ("greeting", "weather", OUT_OF_SCOPE)),
        Skill("home", ("play_music", OUT_OF_SCOPE), {"play_music": ("artist",)}),
    )
)
_LINE = {"bias": 0.0, "weights": [0.0, 10.0], "means": [0.0, 0.5], "scales": [1.0, 1.0]}  # sigmoid(10·(margin − ½))
_MODELS = {"final": {"in_scope": _LINE, OUT_OF_SCOPE: _LINE}, "threshold": 0.8}
CALIBRATION = {"assistant": _MODELS, "home": _MODELS}
SURE, UNSURE = 0.99, 0.1
SECRET_WORD = "xyzzy-canary"


def card(name: str = "device", **changes: Any) -> TierCard:
    """The card of a fake tier."""
    values: dict[str, Any] = {
        "name": name,
        "model_id": f"fake-{name}",
        "model_version": f"{name}-1",
        "skills": SKILLS,
        "chats": name == "edge",
        "context": 512,
        "quantisation": "int8",
        "watts": 2.0,
        "watts_source": "a test",
        "calibration": CALIBRATION,
    }
    return TierCard(**{**values, **changes})


@dataclass
class FakeTier:
    """Answers by rule.

    A skill query with 'maybe' in it is answered unsurely, one with 'nonsense' is out of scope; a chat is answered
    with the words of `says`, over and over up to `max_tokens` if `endless`; of a draft it accepts all but the last
    word. `before_token` is called with a token's index before it is given; `closed` counts the streams that ended, for
    whatever reason.
    """

    card: TierCard = field(default_factory=card)
    says: str = "all is well"
    endless: bool = False
    before_token: Callable[[int], None] = lambda _index: None
    closed: int = 0
    prompts: list[Prompt] = field(default_factory=list)
    limits: list[Limits] = field(default_factory=list)
    counted: TierStats = field(default_factory=TierStats)

    def count_tokens(self, prompt: Prompt) -> int:
        return len(self._words(prompt))

    def generate(self, prompt: Prompt, limits: Limits) -> Iterator[Token]:
        if len(self._words(prompt)) > self.card.context:
            raise PromptTooLongError(f"the prompt has more than {self.card.context} tokens; shorten it", "messages")
        if not self._words(prompt):
            raise PromptError("the utterance is empty; send at least one word", "messages")
        self.prompts.append(prompt)
        self.limits.append(limits)
        return self._guarded(self._frame(prompt) if isinstance(prompt, SkillQuery) else self._chat(limits))

    def stats(self) -> TierStats:
        return self.counted

    def _guarded(self, tokens: Iterator[Token]) -> Iterator[Token]:
        try:
            for index, token in enumerate(tokens):
                self.before_token(index)
                yield token
        finally:
            self.closed += 1

    def _words(self, prompt: Prompt) -> list[str]:
        if isinstance(prompt, Chat):
            return [word for message in prompt.messages for word in message["content"].split()]
        return prompt.text.split()

    def _frame(self, query: SkillQuery) -> Iterator[Token]:
        margin = UNSURE if "maybe" in query.text else SURE
        skill = self.card.skills[query.skill] if self.card.skills else SKILLS[query.skill]
        intent = OUT_OF_SCOPE if "nonsense" in query.text else skill.intents[0]
        if not skill.slots:
            yield Token(json.dumps({"intent": intent, "slots": {}}), -0.1, margin, finish_reason="stop")
            return
        yield Token(f'{{"intent": "{intent}", "slots": {{', -0.1, margin)
        words = query.text.split()
        for _word in words[:-1]:
            yield Token("", -0.1, margin)
        yield Token(f'"artist": {json.dumps(words[-1], ensure_ascii=False)}}}}}', -0.1, margin, finish_reason="stop")

    def _chat(self, limits: Limits) -> Iterator[Token]:
        words = self.says.split() or [""]
        count = limits.max_tokens if self.endless else min(len(words), limits.max_tokens)
        for index in range(count):
            text = (" " if index else "") + words[index % len(words)]
            last = index == count - 1
            reason = ("length" if self.endless or count < len(words) else "stop") if last else None
            rivals = tuple((f"rival{n}", -2.0 - n) for n in range(limits.top_logprobs))
            proposed = len(limits.draft.split())
            draft = DraftUse(proposed, proposed - 1) if proposed else None
            yield Token(text, math.log(0.5), 0.4, index, rivals, reason, draft=draft)


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def served(app: Flask, port: int = 0) -> Iterator[str]:
    """Serve an app on a real loopback socket; gives its address."""
    server = make_server("127.0.0.1", port, app, threaded=True, request_handler=_Quiet)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def http_client(url: str) -> httpx.Client:
    """A client of a loopback server; it needs no certificates, and reading them takes a while."""
    return httpx.Client(base_url=url, trust_env=False, verify=False, timeout=30)  # noqa: S501


def tier_app(tier: FakeTier, **common: Any) -> Flask:
    """The app of a tier function around a fake tier, loaded."""
    config = TierConfig(tier.card.name, "nowhere", common=Common(node_id="node-7", **common))
    app = create_tier_app(config, lambda _config: tier)
    wait_until(lambda: app.test_client().get("/_/ready").status_code != 503)
    return app


def dispatcher_app(device_url: str, edge_url: str, **changes: Any) -> Flask:
    """The dispatcher's app."""
    common = Common(node_id="site-1", **changes.pop("common", {}))
    return create_dispatcher(DispatcherConfig(device_url, edge_url, common=common, **changes))


def federation_app(nodes: Mapping[str, str], **changes: Any) -> Flask:
    """The federation's app; `federated` ends what it began."""
    common = Common(**{"node_id": "site-2", **changes.pop("common", {})})
    return create_federation(FederationConfig(nodes, common=common, **changes))


@contextmanager
def federated(nodes: Mapping[str, str], **changes: Any) -> Iterator[Flask]:
    """A federation for the length of a block."""
    app = federation_app(nodes, **changes)
    try:
        yield app
    finally:
        app.extensions[PARTS].stop()


def wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Poll until it is true; fails after `timeout_s`."""
    ends = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.005)


def free_port() -> int:
    """A port on which nobody listens."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def read_sse(lines: Iterator[str]) -> list[Any]:
    """The JSON of all server-sent events; `[DONE]` as it is."""
    datas = [line.removeprefix("data: ") for line in lines if line]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def create_app_for_gunicorn() -> Flask:
    """A tier server of its own process: TIER_NAME says which; FAKE_TOKEN_S is how long each token takes."""
    pause_s = float(os.environ.get("FAKE_TOKEN_S", "0"))
    tier = FakeTier(card(os.environ["TIER_NAME"]), endless=True, before_token=lambda _index: time.sleep(pause_s))
    return create_tier_server(tier.card.name, lambda _config: tier)


def user(text: str) -> list[Mapping[str, str]]:
    """A chat of one turn."""
    return [{"role": "user", "content": text}]


def tool(name: str, **function: Any) -> dict[str, Any]:
    """A tool as OpenAI's schema has it."""
    return {"type": "function", "function": {"name": name, **function}}


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    """A `response_format` with a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}
