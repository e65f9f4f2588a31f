"""What answers without a model: canned messages, rules, and the latency ceiling in front of a service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from flask import Flask

from functions.dispatcher.canned import ELSE, REASONS, Messages, read_messages, text_for
from functions.dispatcher.fallbacks import CannedMessages, FirstOf, RulePlanner, events_of, report_of
from functions.dispatcher.latency import LatencyGuard, LatencyWatch
from functions.dispatcher.rules import read_rules
from functions.serving.answering import add_routes
from functions.serving.ask import Ask, Clocked, Message, Shape
from functions.serving.errors import ClientLeftError, OverloadedError, RefusedError
from functions.serving.events import End, Event, Events, Piece, Report, Start, Usage
from functions.serving.replies import ModelEntry
from functions.serving.settings import Common, ConfigError
from functions.serving.web import Site, create_base
from models.runtime.tier import JsonForm, Tool, ToolUse
from routing.latency import LatencyLimits
from tests.fakes import user

DRONE = Path(__file__).parents[1] / "examples" / "drone" / "rules.toml"
TWO = """
default_language = "en"
[en]
else = "Sorry."
battery = "The battery is low."
[de]
else = "Leider nicht."
[pt-br]
else = "Desculpe."
"""


def ask(text: str, **fields: object) -> Ask:
    values = {"shape": Shape.CHAT, "model": "auto", "skill": "chat", "messages": (Message("user", text),), **fields}
    return Ask(**values)  # type: ignore[arg-type]


def test_the_shipped_messages_answer_each_reason_and_any_other() -> None:
    messages = read_messages()
    assert all(messages.text(reason) for reason in REASONS)
    assert messages.text("never heard of") == text_for("never heard of") == messages.by_language["en"][ELSE]
    assert text_for("local_only") != text_for("deadline") != text_for("battery")


@pytest.mark.parametrize(
    ("languages", "reason", "text"),
    [
        ((), "battery", "The battery is low."),
        (("fr", "de-AT", "en"), "battery", "Leider nicht."),
        (("DE",), "deadline", "Leider nicht."),
        (("pt-BR",), "deadline", "Desculpe."),
        (("pt",), "deadline", "Sorry."),
        (("*",), "deadline", "Sorry."),
    ],
)
def test_the_callers_language_is_spoken_where_it_is_known(languages: tuple[str, ...], reason: str, text: str) -> None:
    assert Messages.parse(TWO, "two.toml").text(reason, languages) == text


def test_the_language_is_that_of_the_request_at_work() -> None:
    canned = CannedMessages(Messages.parse(TWO, "two.toml"))
    assert canned.answer(ask("hi"), "deadline") == "Sorry."
    with Flask("test").test_request_context(headers={"Accept-Language": "en;q=0.5, de"}):
        assert canned.answer(ask("hi"), "deadline") == "Leider nicht."


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[en]\nelse = "x"', "mine.toml: field 'default_language' must name a language of the file"),
        ('default_language = "de"\n[en]\nelse = "x"', r"'default_language' must name .* \(it has en\)"),
        ('default_language = "en"\nstyle = 1\n[en]\nelse = "x"', "there is no field 'style'"),
        ('default_language = "en"\n[en]\nbattery = "x"', "language 'en' has no field 'else'"),
        ('default_language = "en"\n[en]\nelse = "x"\nbatery = "x"', "language 'en' has the unknown field 'batery'"),
        ('default_language = "en"\n[en]\nelse = " "', "language 'en', field 'else' must be a text"),
        ('default_language = "en"\n[en]\nelse = 3', "language 'en', field 'else' must be a text"),
        ('default_language = "EN"\n[EN]\nelse = "x"', "'EN' is no language tag"),
        ("default_language", "mine.toml is not TOML"),
    ],
)
def test_a_bad_message_file_is_refused_naming_the_field(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Messages.parse(text, "mine.toml")


# Rules.


def test_the_planner_answers_in_the_form_that_was_asked_for() -> None:
    planner = RulePlanner(read_rules(DRONE))
    frame = {"intent": "plan", "slots": {"steps": [{"intent": "land", "slots": {}}]}}
    assert planner.answer(ask("land"), "battery") == "Landing."
    assert planner.answer(ask("land", json=JsonForm()), "battery") == frame
    assert planner.answer(ask("land", json=JsonForm(json.dumps(planner.book.schema), strict=True)), "battery") == frame
    assert planner.answer(ask("land", json=JsonForm('{"type": "array"}')), "battery") is None
    assert planner.answer(ask("land", tools=ToolUse((Tool("fly"),))), "battery") is None
    assert planner.answer(ask("land", skill="banking"), "battery") is None
    assert planner.answer(ask("sing"), "battery") is None
    everywhere = RulePlanner(replace(planner.book, skills=()))
    assert everywhere.answer(ask("land", skill="banking"), "battery") == frame


def test_the_first_that_has_an_answer_gives_it() -> None:
    first = FirstOf([RulePlanner(read_rules(DRONE)), CannedMessages(read_messages())])
    assert first.answer(ask("land"), "battery") == "Landing."
    assert first.answer(ask("sing"), "battery") == text_for("battery")
    assert FirstOf([]).answer(ask("land"), "battery") is None


@pytest.mark.parametrize("json_form", [None, JsonForm()])
def test_a_text_refuses_whoever_asked_for_json_and_a_frame_does_not(json_form: JsonForm | None) -> None:
    asked = ask("land", json=json_form)
    start, piece, end = events_of(asked, "no", report_of("no", "battery", "node-1"))
    assert isinstance(start, Start)
    assert isinstance(piece, Piece)
    assert isinstance(end, End)
    assert (start.model, piece.text, piece.refuses) == ("canned", "no", json_form is not None)
    assert (end.report.source, end.report.reason, end.report.degraded) == ("canned", "battery", True)
    land = {"intent": "land", "slots": {}}
    _, piece, end = events_of(asked, land, report_of(land, "battery", "node-1"))
    assert isinstance(piece, Piece)
    assert isinstance(end, End)
    assert json.loads(piece.text) == end.report.frame == {"intent": "land", "slots": {}}
    assert (piece.refuses, end.report.source) == (False, "rules")


# The latency ceiling.


@dataclass
class Slow:
    """A service whose answers take `took_s` on the test's clock; it raises `error` if there is one."""

    took_s: float = 0.01
    source: str = "edge"
    reason: str = "chat"
    error: Exception | None = None
    now: float = 0.0
    asked: int = 0
    seen: list[str] = field(default_factory=list)

    def check(self, ask: Ask) -> None:
        self.seen.append("check")

    def models(self) -> list[ModelEntry]:
        return []

    def events(self, ask: Ask, clocked: Clocked) -> Events:
        return self._events()

    def _events(self) -> Iterator[Event]:
        self.asked += 1
        self.now += self.took_s
        report = Report(source=self.source, route="chat", reason=self.reason)
        yield Start(self.source, report)
        if self.error:
            raise self.error
        yield Piece("thought through")
        yield End("stop", Usage(), report)


def guarded(slow: Slow) -> LatencyGuard:
    limits = LatencyLimits(canned_above_ms=100, back_below_ms=50, probe_every=5, probe_after_s=1e6)
    watch = LatencyWatch(limits, clock=lambda: slow.now)
    return LatencyGuard(slow, watch, CannedMessages(read_messages()), "node-1")


def sources(guard: LatencyGuard, count: int) -> list[str]:
    ends = [list(guard.events(ask("why?"), Clocked(0, 60)))[-1] for _ in range(count)]
    return [end.report.source for end in ends if isinstance(end, End)]


def test_slow_models_are_spared_and_come_back_by_themselves() -> None:
    slow = Slow(took_s=0.2)
    guard = guarded(slow)
    assert sources(guard, 5) == ["edge"] * 5
    assert sources(guard, 10) == [*["canned"] * 4, "edge"] * 2
    slow.took_s = 0.01
    assert "canned" in sources(guard, 10)
    sources(guard, 20)
    assert sources(guard, 10) == ["edge"] * 10


def test_what_failed_slowly_counts_and_what_tells_nothing_does_not() -> None:
    for error, counts in [(OverloadedError(503, "x"), 5), (ClientLeftError(), 0), (RefusedError(422, "x"), 0)]:
        guard = guarded(Slow(took_s=0.01, error=error))
        for _ in range(5):
            with pytest.raises(type(error)):
                list(guard.events(ask("why?"), Clocked(0, 60)))
        assert len(guard.watch.gate.samples) == counts
    for source, reason, counts in [("canned", "edge_unavailable", 0), ("canned", "deadline", 4), ("device", "x", 4)]:
        guard = guarded(Slow(source=source, reason=reason))
        sources(guard, 4)
        assert len(guard.watch.gate.samples) == counts


def test_a_stream_that_the_caller_leaves_is_closed_and_tells_nothing() -> None:
    guard = guarded(Slow())
    events = guard.events(ask("why?"), Clocked(0, 60))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert guard.watch.gate.samples == ()


def test_where_the_fallback_has_nothing_to_say_the_models_are_asked_all_the_same() -> None:
    slow = Slow(took_s=0.2)
    guard = replace(guarded(slow), fallback=RulePlanner(read_rules(DRONE)))
    assert sources(guard, 10) == ["edge"] * 10
    end = list(guard.events(ask("land"), Clocked(0, 60)))[-1]
    assert isinstance(end, End)
    assert end.report.source == "canned"
    guard.check(ask("land"))
    assert (slow.seen, guard.models()) == (["check"], [])


@pytest.mark.parametrize("stream", [False, True])
def test_over_http_a_canned_answer_is_flagged_and_speaks_the_callers_language(stream: bool) -> None:
    slow = Slow(took_s=0.2)
    canned = CannedMessages(Messages.parse(TWO, "two.toml"))
    guard = replace(guarded(slow), fallback=FirstOf([RulePlanner(read_rules(DRONE)), canned]))
    sources(guard, 5)
    site = Site.create("dispatcher", Common(node_id="n"))
    app = create_base(site, site.drain)
    add_routes(app, site, guard)
    body = {"messages": user("why?"), "stream": stream}
    reply = app.test_client().post("/v1/chat/completions", json=body, headers={"Accept-Language": "de"})
    assert reply.status_code == 200
    assert "Leider nicht." in reply.text
    assert reply.headers["X-Edgecascade-Source"] == "canned"
    assert reply.headers["X-Edgecascade-Reason"] == "latency"
    assert reply.headers["X-Edgecascade-Degraded"] == "true"
    form = {**body, "messages": user("land"), "stream": False, "response_format": {"type": "json_object"}}
    planned = app.test_client().post("/v1/chat/completions", json=form).json
    assert json.loads(planned["choices"][0]["message"]["content"]) == planned["edgecascade"]["frame"]
    assert (planned["edgecascade"]["source"], slow.asked) == ("rules", 5)
