"""What became of the deadlines that requests name by a class: the figures of the alerts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from functions.serving.answering import add_routes
from functions.serving.ask import Ask, Clocked
from functions.serving.errors import ClientLeftError, OverloadedError, RefusedError
from functions.serving.events import End, Event, Report, Start, Usage
from functions.serving.replies import ModelEntry
from functions.serving.settings import Common
from functions.serving.web import Site, create_base

CLASSES = {"voice": 20.0, "kiosk": 20_000.0}


class Scripted:
    """Answers as the text says: at once, after the deadline of `voice`, or not at all."""

    def check(self, ask: Ask) -> None: ...

    def events(self, ask: Ask, clocked: Clocked) -> Iterator[Event]:
        if ask.text == "full":
            raise OverloadedError(503, "full", code="overloaded", retry_after_s=1)
        if ask.text == "mine":
            raise RefusedError(400, "too long", param="messages", code="context_length_exceeded")
        if ask.text == "left":
            raise ClientLeftError
        report = Report(source="device", route="device", reason="confident", node_id="n")
        yield Start("device", report)
        if ask.text == "slow":
            time.sleep(CLASSES["voice"] / 1e3 + max(0.0, clocked.expires - time.monotonic()))
        yield End("stop", Usage.of(1, 1), report)

    def models(self) -> list[ModelEntry]:
        return []


@pytest.mark.parametrize(
    ("text", "name", "outcome"),
    [
        ("hi", "kiosk", "kept"),
        ("slow", "voice", "late"),
        ("full", "kiosk", "failed"),
        ("mine", "kiosk", None),
        ("left", "kiosk", None),
        ("hi", "opera", None),
        ("hi", None, None),
    ],
)
def test_a_deadline_of_a_class_is_counted_once(text: str, name: str | None, outcome: str | None) -> None:
    site = Site.create("dispatcher", Common(), lambda: CLASSES)
    app = create_base(site, site.drain)
    add_routes(app, site, Scripted())
    client: Any = app.test_client()
    headers = {"X-Deadline-Class": name} if name else {}
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}]}, headers=headers)
    counted = [
        (sample.labels["deadline_class"], sample.labels["outcome"], sample.value)
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "edgecascade_deadlines_total"
    ]
    assert counted == ([(name, outcome, 1.0)] if outcome else [])
