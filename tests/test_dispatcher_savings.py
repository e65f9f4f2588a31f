"""What the dispatcher chooses while the battery is to be saved."""

from __future__ import annotations

import math

import pytest

from functions.dispatcher.power import PowerConfig
from functions.dispatcher.savings import Savings
from routing.energy import Draw, Figures, Radio, Saving
from tests.fakes import FakeTier, card, dispatcher_app, served, tier_app, user

MADE_UP = "made up: a test"


def figures(device_w: float = 6, idle_w: float = 2, joules_per_byte: float = 1e-6) -> Figures:
    draws = {"device": Draw(device_w, MADE_UP), "idle": Draw(idle_w, MADE_UP)}
    return Figures(draws, Radio(joules_per_byte, joules_per_byte, MADE_UP))


def savings(known: Figures) -> Savings:
    made = Savings(known, lambda: 0.0)
    for _ in range(10):
        made.device_answered("home")
    made.edge_answered("home", 500, 900, escalated=True)
    return made


@pytest.mark.parametrize(
    ("known", "device_s", "edge_s", "chosen"),
    [
        (figures(), 0.03, 0.1, Saving.DEVICE_ONLY),
        (figures(device_w=6, idle_w=0.1), 0.1, 0.05, Saving.EDGE),
        (figures(idle_w=0.1, joules_per_byte=1e-3), 0.1, 0.05, Saving.DEVICE_ONLY),
        (figures(), 2.0, 0.1, Saving.EDGE),
        (figures(), 2.0, 2.0, None),
        (figures(), None, 0.1, None),
        (figures(), 0.03, None, None),
        (Figures(), 0.03, 0.1, None),
        (Figures({"device": Draw(6, MADE_UP)}), 0.5, 0.1, None),
    ],
)
def test_the_cheapest_way_in_time_or_none_where_a_figure_is_missing(
    known: Figures, device_s: float | None, edge_s: float | None, chosen: Saving | None
) -> None:
    assert savings(known).choice("home", device_s, edge_s, remaining_s=1.0) is chosen


def test_nothing_is_chosen_before_the_edge_was_ever_asked() -> None:
    assert Savings(figures(), lambda: math.inf).choice("home", 0.03, 0.1, 1.0) is None


def test_a_low_battery_keeps_an_unsure_answer_at_home_where_the_figures_say_so() -> None:
    edge = FakeTier(card("edge"))
    with served(tier_app(FakeTier(card("device")))) as device_url, served(tier_app(edge)) as edge_url:
        # 1 J a byte: whatever the tiers take here, the radio costs more.
        power = PowerConfig(figures=figures(joules_per_byte=1.0))
        client = dispatcher_app(device_url, edge_url, power=power).test_client()

        def ask(level: str) -> tuple[str, str, bool]:
            body = {"messages": user("maybe hello"), "skill": "assistant"}
            reply = client.post("/v1/chat/completions", json=body, headers={"X-Battery-Level": level})
            said = reply.json["edgecascade"]
            return said["source"], said["reason"], said["degraded"]

        assert {ask("0.9") for _ in range(10)} == {("edge", "low_confidence", False)}
        asked = len(edge.prompts)
        assert ask("0.1") == ("device", "battery", True)
        assert len(edge.prompts) == asked
