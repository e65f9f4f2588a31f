"""Requests on a simulated clock, driven by `route` as the dispatcher does: what must hold whatever the tiers do."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from functions.dispatcher.budget import Budget
from routing import Answer, Conditions, Failure, Kind, Observed, Outcome, Pending, Policy, Request, Step, route
from routing.energy import Saving
from routing.policy import Edge
from routing.power import Power, PowerMode

TIERS = {"device": "device", "edge": "edge", "chat": "edge"}
BURST = 3
probability = st.floats(0, 1)


class Requests(RuleBasedStateMachine):
    """One request after the other; a tier answers, breaks, or says nothing, and time passes."""

    @initialize(
        retry_budget=st.sampled_from([0.0, 0.1, 0.5]), hedge=st.sampled_from([0.0, 0.05, 0.5]), early=st.booleans()
    )
    def start(self, retry_budget: float, hedge: float, early: bool) -> None:
        self.policy = Policy(retry_budget=retry_budget, edge=Edge(hedge=hedge, early=early))
        self.retries, self.hedges = Budget(), Budget()
        self.requests = self.spent_retries = self.spent_hedges = 0
        self.now_ms, self.mode, self.up = 0.0, PowerMode.NORMAL, {"device": True, "edge": True}
        self.request: Request | None = None
        self.saving: Saving | None = None

    @precondition(lambda self: self.request is None)
    @rule(
        skill=st.sampled_from(["assistant", "chat"]),
        tier=st.sampled_from(["auto", "device", "edge"]),
        local_only=st.booleans(),
        out_of_scope=st.booleans(),
        deadline_ms=st.sampled_from([5.0, 30.0, 80.0, 200.0, 30_000.0]),
    )
    def arrives(self, skill: str, tier: str, local_only: bool, out_of_scope: bool, deadline_ms: float) -> None:
        self.request = Request(skill, tier, local_only, out_of_scope)  # type: ignore[arg-type]
        self.expires_ms, self.observed, self.asked_at = self.now_ms + deadline_ms, Observed(), dict[str, float]()
        self.tries = dict.fromkeys(TIERS, 0)
        self.forecasts, self.wake_ms, self.ends = dict[str, float](), math.inf, 0
        self.requests += 1
        self.retries.deposit(self.policy.retry_budget)
        self.hedges.deposit(self.policy.edge.hedge)
        self.drive()

    @precondition(lambda self: self.request is not None)
    @rule(passed_ms=st.sampled_from([0.0, 1.0, 10.0, 40.0, 100.0, 1e5]))
    def time_passes(self, passed_ms: float) -> None:
        """The dispatcher wakes where it said it would, and at the deadline."""
        until_ms = self.now_ms + passed_ms
        while self.request is not None and min(self.wake_ms, self.expires_ms) <= until_ms:
            self.now_ms = max(self.now_ms, min(self.wake_ms, self.expires_ms))
            self.drive()
        self.now_ms = until_ms

    def pending(self, name: str) -> bool:
        return self.request is not None and isinstance(getattr(self.observed, name), Pending)

    @precondition(lambda self: any(self.pending(name) for name in TIERS))
    @rule(data=st.data(), confidence=probability, out_of_scope=st.booleans())
    def a_tier_answers(self, data: st.DataObject, confidence: float, out_of_scope: bool) -> None:
        self.settle(data, Answer(confidence, 0.8, out_of_scope))

    @precondition(lambda self: any(self.pending(name) for name in TIERS))
    @rule(
        data=st.data(), reason=st.sampled_from(["device_timeout", "edge_busy", "edge_error"]), retriable=st.booleans()
    )
    def a_tier_fails(self, data: st.DataObject, reason: str, retriable: bool) -> None:
        self.settle(data, Failure(reason, retriable))

    @precondition(lambda self: any(self.pending(name) for name in TIERS))
    @rule(forecast=probability)
    def the_device_tells_its_forecast(self, forecast: float) -> None:
        self.forecasts["device"] = forecast
        self.drive()

    @rule(mode=st.sampled_from(PowerMode), saving=st.none() | st.sampled_from(Saving))
    def power_changes(self, mode: PowerMode, saving: Saving | None) -> None:
        self.mode, self.saving = mode, saving
        if self.request is not None:
            self.drive()

    @rule(tier=st.sampled_from(["device", "edge"]))
    def a_tier_comes_or_goes(self, tier: str) -> None:
        self.up[tier] = not self.up[tier]

    def settle(self, data: st.DataObject, outcome: Outcome) -> None:
        name = data.draw(st.sampled_from([name for name in TIERS if self.pending(name)]))
        if isinstance(outcome, Failure):
            outcome = replace(outcome, attempts=self.tries[name])
        self.observed = replace(self.observed, **{name: outcome})
        self.drive()

    def conditions(self) -> Conditions:
        return Conditions(
            self.up["device"],
            self.up["edge"],
            self.expires_ms - self.now_ms,
            Power(self.mode),
            device_ms=20,
            slow_device_ms=40,
            edge_ms=70,
            may_hedge=self.hedges.available,
            may_retry=self.retries.available,
            saving=self.saving if self.mode is PowerMode.SAVE else None,
        )

    def drive(self) -> None:
        """As the dispatcher does: take steps until there is nothing to do but wait, or the answer is there."""
        assert self.request is not None
        for _ in range(10):
            for name, at_ms in self.asked_at.items():
                if self.pending(name):
                    seen = Pending(self.now_ms - at_ms, self.forecasts.get(name), 0.8)
                    self.observed = replace(self.observed, **{name: seen})
            step = route(self.policy, self.conditions(), self.request, self.observed)
            if step.is_last:
                self.end(step)
                return
            if step.kind is Kind.WAIT:
                assert any(self.pending(name) for name in TIERS), "somebody is waited for"
                self.wake_ms = self.now_ms + step.look_again_ms
                return
            self.take(step)
        raise AssertionError("route never came to an end")

    def take(self, step: Step) -> None:
        assert self.request is not None
        tier = "device" if step.kind is Kind.ASK_DEVICE else "edge"
        assert tier == TIERS[step.uses]
        assert tier == "device" or not self.request.local_only, "local-only never asks the edge"
        assert self.mode is not PowerMode.CRITICAL, "critical asks no model"
        assert self.up[tier], "a tier that is down is not asked"
        assert self.now_ms < self.expires_ms, "nobody is asked after the deadline"
        if self.mode is PowerMode.SAVE:
            assert not self.pending("device"), "nothing in parallel while saving"
            assert step.spends != "hedge"
        if step.spends == "retry":
            assert self.retries.take()
            self.spent_retries += 1
        elif step.spends == "hedge":
            assert self.hedges.take()
            self.spent_hedges += 1
        else:
            assert self.tries[step.uses] == 0, "asked again only out of the budget"
        self.tries[step.uses] += 1
        assert self.tries[step.uses] <= 2
        self.asked_at[step.uses] = self.now_ms
        self.observed = replace(self.observed, **{step.uses: Pending()})

    def end(self, step: Step) -> None:
        self.ends += 1
        assert self.ends == 1, "exactly one terminal event"
        assert self.now_ms <= self.expires_ms, "never an answer after the deadline"
        if step.kind is Kind.ANSWER:
            assert isinstance(getattr(self.observed, step.uses), Answer)
        else:
            assert step.degraded
        if step.reason in {"deadline", "battery"}:
            assert step.degraded
        self.request = None

    @invariant()
    def budgets_hold(self) -> None:
        if hasattr(self, "policy"):
            for spent, share in (
                (self.spent_retries, self.policy.retry_budget),
                (self.spent_hedges, self.policy.edge.hedge),
            ):
                assert spent <= (share * self.requests + BURST if share else 0)

    @invariant()
    def a_request_is_never_left_hanging(self) -> None:
        if getattr(self, "request", None) is not None:
            assert any(self.pending(name) for name in TIERS)
            assert self.now_ms <= self.expires_ms


Requests.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRequests = Requests.TestCase
