"""Routing: the table of examples in its README, and what must hold for any input."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing import Answer, Conditions, Failure, Kind, Observed, Outcome, Pending, Policy, Request, Step, route
from routing.energy import Saving
from routing.policy import Edge
from routing.power import Power, PowerMode

README = Path(__file__).parents[1] / "routing" / "README.md"


def rows() -> list[list[str]]:
    """The table's rows as lists of stripped cells."""
    lines = [line for line in README.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def parse_request(cell: str) -> Request:
    skill, *words = cell.split()
    values: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        match key:
            case "tier":
                values["tier"] = value
            case "threshold":
                values["threshold"] = float(value)
            case "oos":
                values["chat_when_out_of_scope"] = True
            case _:
                values[key] = True
    return Request(skill, **values)


_TIMES = {
    "device": "device_ms",
    "edge": "edge_ms",
    "slow": "slow_device_ms",
    "least": "least_edge_ms",
    "remaining": "remaining_ms",
}
_FLAGS = {"hedge": "may_hedge", "retry": "may_retry"}


def parse_conditions(cell: str) -> tuple[Policy, Conditions]:
    policy, values = Policy(), dict[str, Any]()
    for word in cell.split():
        key, _, value = word.partition("=")
        if key == "policy":
            policy = Policy(confidence_threshold=float(value))
        elif key == "early":
            policy = Policy(edge=Edge(early=value == "yes"))
        elif key == "local_only":
            policy = Policy(local_only_skills=frozenset({value}))
        elif key == "saving":
            values |= {"power": Power(PowerMode.SAVE), "saving": Saving[value.upper()]}
        elif key in {"save", "critical"}:
            values["power"] = Power(PowerMode(key))
        elif value:
            values[_TIMES[key]] = float(value)
        elif key in _FLAGS:
            values[_FLAGS[key]] = True
        else:
            values[key.replace("_down", "_up")] = False
    return policy, Conditions(**values)


def parse_outcome(mark: str, rest: str) -> Outcome:
    value, _, more = rest.partition("/")
    if mark == "!":
        return Failure(rest.rstrip("?"), retriable=rest.endswith("?"))
    if mark == "~":
        return Pending(float(value), float(more) if more else None, 0.8)
    return Answer(float(value) if value != "none" else None, 0.8, more == "oos")


def parse_observed(cell: str) -> Observed:
    seen: dict[str, Outcome] = {}
    for word in cell.split():
        name, mark, rest = re.fullmatch(r"(\w+)([=!~])(.+)", word).groups()  # type: ignore[union-attr]
        seen[name] = parse_outcome(mark, rest)
    return Observed(**seen)


def words_of(step: Step) -> str:
    """A step as the table writes it."""
    if step.kind is Kind.WAIT:
        return f"wait {step.look_again_ms:g}" if step.look_again_ms < math.inf else "wait"
    if step.kind is Kind.FALL_BACK:
        return "fall back"
    return f"{'answer' if step.kind is Kind.ANSWER else 'ask'} {step.uses}"


@pytest.mark.parametrize("row", rows(), ids=lambda row: " / ".join(cell for cell in row[:3] if cell))
def test_table(row: list[str]) -> None:
    policy, conditions = parse_conditions(row[1])
    step = route(policy, conditions, parse_request(row[0]), parse_observed(row[2]))
    assert [words_of(step), step.route, step.reason, "yes" if step.degraded else "no"] == row[3:]


probability = st.floats(0, 1)
maybe = st.none() | probability
policies = st.builds(
    Policy,
    confidence_threshold=maybe,
    edge=st.builds(Edge, hedge=probability, early=st.booleans(), least_ms=st.floats(0, 100)),
    local_only_skills=st.frozensets(st.sampled_from(["home", "chat"])),
)
powers = st.builds(Power, st.sampled_from(PowerMode))
times_ms = st.none() | st.floats(0, 1e3)
conditions_ = st.builds(
    Conditions,
    device_up=st.booleans(),
    edge_up=st.booleans(),
    remaining_ms=st.floats(-10, 1e4),
    power=powers,
    device_ms=times_ms,
    slow_device_ms=times_ms,
    edge_ms=times_ms,
    least_edge_ms=times_ms,
    may_hedge=st.booleans(),
    may_retry=st.booleans(),
    saving=st.none() | st.sampled_from(Saving),
)
requests_ = st.builds(
    Request,
    skill=st.sampled_from(["assistant", "home", "chat"]),
    tier=st.sampled_from(["auto", "device", "edge"]),
    local_only=st.booleans(),
    chat_when_out_of_scope=st.booleans(),
    threshold=maybe,
)
answers = st.builds(Answer, confidence=maybe, threshold=maybe, out_of_scope=st.booleans())
failures = st.builds(Failure, st.sampled_from(["edge_unavailable", "deadline", "edge_error"]), st.booleans())
pending = st.builds(Pending, st.floats(0, 1e3), maybe, maybe)
outcomes = answers | failures | pending
observations = st.builds(Observed, device=st.none() | outcomes, edge=st.none() | outcomes, chat=st.none() | outcomes)


@given(policies, conditions_, requests_, observations)
def test_local_only_never_asks_the_edge(
    policy: Policy, conditions: Conditions, request: Request, observed: Observed
) -> None:
    step = route(policy, conditions, replace(request, local_only=True), observed)
    assert step.kind is not Kind.ASK_EDGE


@given(policies, conditions_, requests_, observations)
def test_an_edge_that_is_down_is_never_asked(
    policy: Policy, conditions: Conditions, request: Request, observed: Observed
) -> None:
    assert route(policy, replace(conditions, edge_up=False), request, observed).kind is not Kind.ASK_EDGE


@given(policies, conditions_, requests_, observations)
def test_at_the_deadline_and_in_critical_nobody_is_asked_or_waited_for(
    policy: Policy, conditions: Conditions, request: Request, observed: Observed
) -> None:
    for now in (replace(conditions, remaining_ms=0.0), replace(conditions, power=Power(PowerMode.CRITICAL))):
        assert route(policy, now, request, observed).is_last


@given(policies, conditions_, requests_, observations)
def test_a_wait_is_for_somebody(policy: Policy, conditions: Conditions, request: Request, observed: Observed) -> None:
    step = route(policy, conditions, request, observed)
    if step.kind is Kind.WAIT:
        assert any(isinstance(one, Pending) for one in (observed.device, observed.edge, observed.chat))
        assert step.look_again_ms >= 0


@given(policies, conditions_, requests_, observations)
def test_what_is_answered_was_observed(
    policy: Policy, conditions: Conditions, request: Request, observed: Observed
) -> None:
    step = route(policy, conditions, request, observed)
    if step.kind is Kind.ANSWER:
        assert isinstance(getattr(observed, step.uses), Answer)
    if step.kind is Kind.FALL_BACK:
        assert step.degraded


@given(policies, conditions_, requests_, answers, probability, probability)
def test_a_higher_threshold_never_keeps_more_at_home(
    policy: Policy, conditions: Conditions, request: Request, device: Answer, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    observed = Observed(device=device)
    at_low = route(policy, conditions, replace(request, skill="home", threshold=low), observed)
    at_high = route(policy, conditions, replace(request, skill="home", threshold=high), observed)
    if at_low.kind is Kind.ASK_EDGE and at_low.uses == "edge":
        assert at_high == at_low
