"""Rebalance: look, decide, log, count, and apply. One step; whoever calls it owns the clock and the eyes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge

from scaler.placement.apply import Applier
from scaler.placement.errors import ApplyError
from scaler.placement.rebalance import Action, Decision, Observed, Policy, State, decide

_LOG = logging.getLogger(__name__)


class Controller:
    """Keeps a plan in force. With `dry_run` it decides, logs and counts as ever, and applies nothing.

    `told` hears of each decision before it is applied. Not for two threads at once.
    """

    def __init__(
        self,
        state: State,
        policy: Policy,
        applier: Applier,
        registry: CollectorRegistry,
        *,
        dry_run: bool = False,
        told: Callable[[Decision], None] | None = None,
    ) -> None:
        self.state, self._told = state, told or (lambda _decision: None)
        self._policy, self._applier, self._dry_run = policy, applier, dry_run
        labels = ("action", "reason", "trigger", "result")
        self._decisions = Counter("edgecascade_rebalance", "Decisions on the placement.", labels, registry=registry)
        self._predicted = Gauge(
            "edgecascade_placement_predicted_ms", "What the plan in force was predicted.", ("of",), registry=registry
        )
        self._show()

    def step(self, seen: Observed) -> Decision:
        """Decide on what was seen, and act on it; what could not be applied is logged, and the plan stays."""
        seen, failed = self._with_drift(seen)
        after, decision = decide(self.state, seen, self._policy)
        self._told(decision)
        result = "dry_run" if self._dry_run and decision.action is not Action.KEEP else "done"
        if result == "done" and decision.action is not Action.KEEP:
            try:
                self._applier.apply(decision.plan)
            except ApplyError as error:
                # A failed move counts as one, so that a platform that refuses is not asked all the time.
                result, failed = "failed", str(error)
                after = replace(after, plan=self.state.plan)
        elif result == "dry_run":
            after = replace(after, plan=self.state.plan)
        self.state = after
        self._tell(decision, result, failed)
        return decision

    def _with_drift(self, seen: Observed) -> tuple[Observed, str]:
        if self._dry_run:
            return seen, ""
        try:
            return replace(seen, drifted=seen.drifted or self._applier.drifted(self.state.plan)), ""
        except ApplyError as error:
            return seen, str(error)

    def _tell(self, decision: Decision, result: str, failed: str) -> None:
        self._decisions.labels(decision.action.value, decision.reason.value, decision.trigger.value, result).inc()
        self._show()
        stages = [{"nodes": list(stage.nodes), "layers": stage.layers} for stage in decision.plan.stages]
        words = {
            "action": decision.action.value,
            "reason": decision.reason.value,
            "trigger": decision.trigger.value,
            "result": result,
            "says": decision.sentence,
            "gain_s": None if decision.forced else round(decision.gain_s, 3),
            "cost_s": round(decision.cost_s, 3),
            "plan": stages,
            **({"error": failed} if failed else {}),
        }
        quiet = decision.action is Action.KEEP and decision.reason == decision.trigger and not failed
        _LOG.log(logging.DEBUG if quiet else logging.INFO, "rebalance %s", json.dumps(words, ensure_ascii=False))

    def _show(self) -> None:
        found = self.state.plan.prediction
        for name in ("token_ms", "prompt_ms", "request_ms", "bottleneck_ms"):
            self._predicted.labels(name.removesuffix("_ms")).set(getattr(found, name))
