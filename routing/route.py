"""`route`: one decision from what the operator wants, how things stand, what was asked and what came back.

`routing/README.md` shows it as a table of examples; the tests run that table.
"""

from __future__ import annotations

import math
from dataclasses import replace

from routing.energy import Saving
from routing.policy import Policy
from routing.power import PowerMode
from routing.values import CHAT, Answer, Conditions, Failure, Kind, Observed, Outcome, Pending, Request, Step

_OWN_WISH = frozenset({"local_only", "requested"})
_MOST_ATTEMPTS = 2
_AT_HOME = frozenset(Saving) - {Saving.NO_HEDGING, Saving.EDGE}
TIGHT = 2.0
"""A deadline is tight when the tiers one after the other would take up half of what remains."""
TIGHT_MS = 250.0
"""What is tight as long as nobody knows how long they take: what people and machines that interact wait for."""


def route(policy: Policy, conditions: Conditions, request: Request, observed: Observed) -> Step:
    """Return the next step.

    Each tier is asked once per purpose, and once more after a broken connection if the retry budget allows. Once the
    time is up or the battery is critical nobody is asked or waited for: the best answer so far is the reply.
    """
    if is_local_only(policy, request):
        request = replace(request, local_only=True)
    if request.skill == CHAT:
        step = _chat(policy, conditions, request, observed)
    else:
        step = _out_of_scope(_frame(policy, conditions, request, observed), policy, conditions, request, observed)
    stop = None if step.is_last else _stop(conditions)
    return step if stop is None else _best_so_far(observed, stop)


def threshold_of(policy: Policy, request: Request, calibrated: float | None) -> float:
    """The request's threshold, else the policy's, else the calibrated one, else 1 (nothing stays local)."""
    candidates = (request.threshold, policy.confidence_threshold, calibrated)
    return next((value for value in candidates if value is not None), 1.0)


def is_local_only(policy: Policy, request: Request) -> bool:
    """Whether nothing of the request may leave the device site, by its own wish or by the policy's."""
    return request.local_only or request.skill in policy.local_only_skills


def _stop(conditions: Conditions) -> Failure | None:
    """Why nobody may be asked or waited for any more, or None."""
    if conditions.power.mode is PowerMode.CRITICAL:
        return Failure("battery")
    if conditions.remaining_ms <= 0:
        return Failure("deadline")
    return None


def _best_so_far(observed: Observed, stop: Failure) -> Step:
    if isinstance(observed.edge, Answer):
        return Step(Kind.ANSWER, "edge", "fallback", stop.reason, degraded=True)
    if isinstance(observed.device, Answer):
        return Step(Kind.ANSWER, "device", "fallback", stop.reason, degraded=True)
    return _fall_back(stop)


def _edge_barred(policy: Policy, conditions: Conditions, request: Request) -> Failure | None:
    """Why the edge must not be asked now, or None."""
    if request.local_only:
        return Failure("local_only")
    if request.tier == "device":
        return Failure("requested")
    if conditions.power.mode is PowerMode.CRITICAL:
        return Failure("battery")
    if not conditions.edge_up:
        return Failure("edge_unavailable")
    if conditions.remaining_ms < max(policy.edge.least_ms, conditions.least_edge_ms or 0.0):
        return Failure("deadline")
    return None


def _device_barred(conditions: Conditions) -> Failure | None:
    if conditions.power.mode is PowerMode.CRITICAL:
        return Failure("battery")
    if not conditions.device_up:
        return Failure("device_unavailable")
    return Failure("deadline") if conditions.remaining_ms <= 0 else None


def _standing(outcome: Outcome | None, barred: Failure | None, conditions: Conditions) -> Outcome | None:
    """What the tier said, or why it must not be asked; None if it is to be asked, for the first time or again."""
    if outcome is None:
        return barred
    again = isinstance(outcome, Failure) and outcome.retriable and outcome.attempts < _MOST_ATTEMPTS
    return None if again and barred is None and conditions.may_retry else outcome


def _ask(kind: Kind, step: Step, before: Outcome | None) -> Step:
    """`step` as a question; one that was asked before is a retry."""
    return replace(step, kind=kind, spends="retry" if isinstance(before, Failure) else step.spends)


def _wait(look_again_ms: float = math.inf) -> Step:
    return Step(Kind.WAIT, "", "", "", look_again_ms=look_again_ms)


def _chat(policy: Policy, conditions: Conditions, request: Request, observed: Observed) -> Step:
    """Chat goes to the edge; only a request that names the device is put to the device."""
    if request.tier == "device" and not request.local_only:
        kind, before, barred = Kind.ASK_DEVICE, observed.device, _device_barred(conditions)
        answer = Step(Kind.ANSWER, "device", "device", "requested")
    else:
        kind, before, barred = Kind.ASK_EDGE, observed.chat, _edge_barred(policy, conditions, request)
        answer = Step(Kind.ANSWER, "chat", "chat", "chat")
    standing = _standing(before, barred, conditions)
    if standing is None:
        return _ask(kind, answer, before)
    if isinstance(standing, Pending):
        return _wait()
    return answer if isinstance(standing, Answer) else _fall_back(standing)


def _fall_back(failure: Failure) -> Step:
    return Step(Kind.FALL_BACK, "", "fallback", failure.reason, degraded=True)


def _frame(  # noqa: PLR0911  # one line for each way that two tiers can stand
    policy: Policy, conditions: Conditions, request: Request, observed: Observed
) -> Step:
    """The smallest tier that can be trusted with the skill; the edge's answer, once there, is taken."""
    edge = _standing(observed.edge, _edge_barred(policy, conditions, request), conditions)
    if isinstance(edge, Answer):
        return _edge_answer(conditions, request, observed)
    if _is_edge_first(conditions, request, observed) and not isinstance(edge, Failure):
        wanted = Step(Kind.ASK_EDGE, "edge", "edge", "requested" if request.tier == "edge" else "energy")
        is_saving = conditions.power.mode is not PowerMode.NORMAL
        if edge or (is_saving and isinstance(observed.device, Pending)):  # one at a time while saving
            return _wait()
        return _ask(Kind.ASK_EDGE, wanted, observed.edge)
    device = _standing(observed.device, _device_barred(conditions), conditions)
    if device is None:
        first = Step(Kind.ASK_DEVICE, "device", "device", "requested" if request.tier == "device" else "first")
        return _ask(Kind.ASK_DEVICE, first, observed.device)
    if isinstance(device, Pending):
        return _wait() if edge else _while_device_works(policy, conditions, request, device, observed.edge)
    if isinstance(device, Answer):
        return _device_answer(policy, conditions, request, device, edge, observed.edge)
    if isinstance(edge, Failure):
        return _fall_back(device)
    return _wait() if edge else _ask(Kind.ASK_EDGE, Step(Kind.ASK_EDGE, "edge", "edge", device.reason), observed.edge)


def _while_device_works(
    policy: Policy, conditions: Conditions, request: Request, device: Pending, before: Outcome | None
) -> Step:
    """Start the edge too if the time or a poor forecast asks for it, or the device is slow; else wait."""
    if conditions.power.mode is not PowerMode.NORMAL or before is not None:
        return _wait()
    if policy.edge.early and _is_early(policy, conditions, request, device):
        return Step(Kind.ASK_EDGE, "edge", "edge", "early")
    slow_in_ms = math.inf
    if conditions.may_hedge and conditions.slow_device_ms is not None:
        slow_in_ms = conditions.slow_device_ms - device.waited_ms
        if slow_in_ms <= 0:
            return Step(Kind.ASK_EDGE, "edge", "edge", "hedged", spends="hedge")
    last_call_ms = math.inf  # from then on the edge would hardly make it
    if policy.edge.early:
        last_call_ms = conditions.remaining_ms - (TIGHT_MS if conditions.edge_ms is None else conditions.edge_ms)
    return _wait(min(slow_in_ms, last_call_ms))


def _is_early(policy: Policy, conditions: Conditions, request: Request, device: Pending) -> bool:
    """Whether one after the other would be too late, or nearly so while the device expects to be unsure.

    As long as nobody knows how long the tiers take, that is a question of the time there is.
    """
    if conditions.edge_ms is None or conditions.device_ms is None:
        return conditions.remaining_ms <= TIGHT_MS
    sequential_ms = max(0.0, conditions.device_ms - device.waited_ms) + conditions.edge_ms
    poor = device.forecast is not None and device.forecast < threshold_of(policy, request, device.threshold)
    return sequential_ms * (TIGHT if poor else 1.0) >= conditions.remaining_ms


def _is_edge_first(conditions: Conditions, request: Request, observed: Observed) -> bool:
    """Whether the edge is asked before the device: by request, or because that costs the battery less."""
    is_cheaper = conditions.saving is Saving.EDGE and request.tier == "auto" and observed.device is None
    return request.tier == "edge" or is_cheaper


def _edge_answer(conditions: Conditions, request: Request, observed: Observed) -> Step:
    if isinstance(observed.device, Answer):
        return Step(Kind.ANSWER, "edge", "escalated", "low_confidence")
    reason = "requested" if request.tier == "edge" else "device_unavailable"
    if _is_edge_first(conditions, request, observed) and request.tier != "edge":
        reason = "energy"
    if isinstance(observed.device, Failure):
        reason = observed.device.reason
    if isinstance(observed.device, Pending):
        reason = "faster"
    return Step(Kind.ANSWER, "edge", "edge", reason)


def _device_answer(
    policy: Policy,
    conditions: Conditions,
    request: Request,
    device: Answer,
    edge: Failure | Pending | None,
    before: Outcome | None,
) -> Step:
    """The device answered: reply with it, ask or await the edge, or reply with it for want of the edge."""
    if request.tier == "device":
        return Step(Kind.ANSWER, "device", "device", "requested")
    confident = (device.confidence or 0.0) >= threshold_of(policy, request, device.threshold)
    if confident and request.tier == "auto":
        return Step(Kind.ANSWER, "device", "device", "confident")
    if edge is None and request.tier == "auto" and conditions.saving in _AT_HOME:
        return _without_edge(Step(Kind.ANSWER, "device", "device", ""), Failure("battery"))
    if edge is None:
        return _ask(Kind.ASK_EDGE, Step(Kind.ASK_EDGE, "edge", "escalated", "low_confidence"), before)
    if isinstance(edge, Pending):
        return _wait()
    return _without_edge(Step(Kind.ANSWER, "device", "device", edge.reason), edge)


def _without_edge(step: Step, edge: Failure) -> Step:
    """`step` as it reads when the edge was wanted; it is degraded unless the caller shut the edge out."""
    if edge.reason in _OWN_WISH:
        return replace(step, reason=edge.reason)
    return replace(step, route="fallback", reason=edge.reason, degraded=True)


def _out_of_scope(step: Step, policy: Policy, conditions: Conditions, request: Request, observed: Observed) -> Step:
    """Where the reply would say 'out of scope' and the request allows it, let the edge chat instead."""
    if step.kind is not Kind.ANSWER or not request.chat_when_out_of_scope:
        return step
    said = observed.edge if step.uses == "edge" else observed.device
    if not (isinstance(said, Answer) and said.out_of_scope):
        return step
    chat = _standing(observed.chat, _edge_barred(policy, conditions, request), conditions)
    if chat is None:
        return _ask(Kind.ASK_EDGE, Step(Kind.ASK_EDGE, "chat", "chat", "out_of_scope"), observed.chat)
    if isinstance(chat, Pending):
        return _wait()
    if isinstance(chat, Answer):
        return Step(Kind.ANSWER, "chat", "chat", "out_of_scope")
    return _without_edge(step, chat)
