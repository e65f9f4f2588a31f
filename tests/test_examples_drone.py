"""The drone: models plan while the battery lasts; then rules do, and a running answer stops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from examples.drone import fly
from functions.dispatcher.rules import read_rules
from tests.fakes import FakeTier, card, dispatcher_app, free_port, http_client, served, tier_app, wait_until

BOOK = read_rules(fly.RULES)
COMMAND = "take off to twenty metres, then land"
BY_RULES = [{"intent": "takeoff", "slots": {"altitude_m": 20}}, {"intent": "land", "slots": {}}]


def plan_of(*steps: dict[str, object]) -> str:
    return json.dumps({"intent": "plan", "slots": {"steps": list(steps)}})


@pytest.fixture
def edge() -> FakeTier:
    return FakeTier(card("edge"), says=plan_of({"intent": "hover", "slots": {"duration_s": 30}}))


@pytest.fixture
def client(edge: FakeTier) -> Iterator[httpx.Client]:
    with ExitStack() as stack:
        urls = [stack.enter_context(served(tier_app(tier))) for tier in (FakeTier(card("device")), edge)]
        gateway = stack.enter_context(served(dispatcher_app(*urls)))
        yield stack.enter_context(http_client(gateway))


def steps_of(plan: dict[str, object] | None) -> object:
    assert plan is not None
    return plan["slots"]["steps"]  # type: ignore[index]


def test_with_a_full_battery_the_model_plans(client: httpx.Client, edge: FakeTier) -> None:
    plan, source = fly.make_plan(COMMAND, BOOK, lambda: 80, client)
    assert (steps_of(plan), source) == ([{"intent": "hover", "slots": {"duration_s": 30}}], "edge")
    assert edge.limits[0].json is not None
    assert json.loads(edge.limits[0].json.schema) == BOOK.schema


@pytest.mark.parametrize("percent", [14.9, 0.0, float("-inf"), float("nan")])
def test_with_a_low_battery_the_rules_plan_and_no_model_is_asked(
    client: httpx.Client, edge: FakeTier, percent: float
) -> None:
    plan, source = fly.make_plan(COMMAND, BOOK, lambda: percent, client)
    assert (steps_of(plan), source) == (BY_RULES, "rules: the battery is low")
    assert edge.prompts == []


def test_a_battery_that_falls_stops_the_running_answer(client: httpx.Client, edge: FakeTier, tmp_path: Path) -> None:
    battery = tmp_path / "capacity"
    battery.write_text("40\n")
    edge.endless = True
    edge.before_token = lambda index: battery.write_text("9\n") and None if index == 3 else None
    plan, source = fly.make_plan(COMMAND, BOOK, lambda: fly.read_percent(battery), client)
    assert (steps_of(plan), source) == (BY_RULES, "rules: the battery fell, the model's answer was broken off")
    wait_until(lambda: edge.closed == 1)
    assert edge.closed == 1


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("all is well", "rules: the model gave no plan"),
        (plan_of({"intent": "takeoff", "slots": {"altitude_m": 900}}), "rules: the model's plan breaks their limits"),
        (plan_of({"intent": "attack", "slots": {}}), "rules: the model's plan breaks their limits"),
        (plan_of({"intent": "land", "slots": {"hard": True}}), "rules: the model's plan breaks their limits"),
        (plan_of({"intent": "hover", "slots": {"duration_s": "long"}}), "rules: the model's plan breaks their limits"),
        (plan_of({"intent": "hover", "slots": {}}), "rules: the model's plan breaks their limits"),
        (plan_of(), "rules: the model's plan breaks their limits"),
        ("[1]", "rules: the model's plan breaks their limits"),
    ],
)
def test_a_plan_that_the_rules_do_not_allow_is_not_flown(
    client: httpx.Client, edge: FakeTier, says: str, why: str
) -> None:
    edge.says = says
    plan, source = fly.make_plan(COMMAND, BOOK, lambda: 80, client)
    assert (steps_of(plan), source) == (BY_RULES, why)


def test_every_plan_of_the_rules_is_one_that_they_allow() -> None:
    for said in (COMMAND, "climb, turn left, fly 20 m north", "take 3 photos of the roof and hover", "take a photo"):
        plan = BOOK.plan(said)
        assert plan is not None
        assert BOOK.allows(plan.frame)


def test_without_a_bundle_the_rules_plan(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert fly.main([COMMAND, "--url", url]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == ['1 takeoff {"altitude_m": 20}', "2 land {}"]
    assert "no bundle answers" in said.err
    assert fly.main(["make me a sandwich", "--url", url]) == 1
    assert fly.main([COMMAND, "--rules", "nowhere.toml"]) == 1


@pytest.mark.parametrize(("content", "percent"), [("87\n", 87), ("", 0), ("nan", 0), ("full", 0)])
def test_a_battery_that_cannot_be_read_counts_as_empty(tmp_path: Path, content: str, percent: float) -> None:
    (tmp_path / "capacity").write_text(content)
    assert fly.read_percent(tmp_path / "capacity") == percent
    assert fly.read_percent(tmp_path / "nothing") == 0
