"""`route`: one decision from what the operator wants, how things stand, what was asked and what came back.

`routing/README.md` shows it as a table of examples; the tests run that table.
"""

from __future__ import annotations

from dataclasses import replace

from routing.values import CHAT, Answer, Conditions, Failure, Kind, Observed, Outcome, Policy, Request, Step

_OWN_WISH = frozenset({"local_only", "requested"})


def route(policy: Policy, conditions: Conditions, request: Request, observed: Observed) -> Step:
    """Return the next step; each tier is asked at most once per purpose, so at most three steps ask."""
    if request.skill == CHAT:
        return _chat(policy, conditions, request, observed)
    step = _frame(policy, conditions, request, observed)
    return _out_of_scope(step, policy, conditions, request, observed)


def threshold_of(policy: Policy, request: Request, calibrated: float | None) -> float:
    """The request's threshold, else the policy's, else the calibrated one, else 1 (nothing stays local)."""
    candidates = (request.threshold, policy.threshold, calibrated)
    return next((value for value in candidates if value is not None), 1.0)


def _edge_barred(policy: Policy, conditions: Conditions, request: Request) -> Failure | None:
    """Why the edge must not be asked now, or None."""
    if request.local_only:
        return Failure("local_only")
    if request.tier == "device":
        return Failure("requested")
    if not conditions.edge_up:
        return Failure("edge_unavailable")
    if conditions.remaining_ms < policy.least_edge_ms:
        return Failure("deadline")
    return None


def _device_barred(conditions: Conditions) -> Failure | None:
    if not conditions.device_up:
        return Failure("device_unavailable")
    return Failure("deadline") if conditions.remaining_ms <= 0 else None


def _chat(policy: Policy, conditions: Conditions, request: Request, observed: Observed) -> Step:
    """Chat goes to the edge; only a request that names the device is put to the device."""
    if request.tier == "device" and not request.local_only:
        device = observed.device or _device_barred(conditions)
        if device is None:
            return Step(Kind.ASK_DEVICE, "device", "device", "requested")
        return _reply_or_fall_back(device, Step(Kind.ANSWER, "device", "device", "requested"))
    edge = observed.chat or _edge_barred(policy, conditions, request)
    if edge is None:
        return Step(Kind.ASK_EDGE, "chat", "chat", "chat")
    return _reply_or_fall_back(edge, Step(Kind.ANSWER, "chat", "chat", "chat"))


def _reply_or_fall_back(outcome: Outcome, answer: Step) -> Step:
    return answer if isinstance(outcome, Answer) else _fall_back(outcome)


def _fall_back(failure: Failure) -> Step:
    return Step(Kind.FALL_BACK, "", "fallback", failure.reason, degraded=True)


def _frame(policy: Policy, conditions: Conditions, request: Request, observed: Observed) -> Step:
    """The smallest tier that can be trusted with the skill; the edge's answer, once there, is taken."""
    edge = observed.edge or _edge_barred(policy, conditions, request)
    if isinstance(edge, Answer):
        return _edge_answer(request, observed)
    if request.tier == "edge" and edge is None:
        return Step(Kind.ASK_EDGE, "edge", "edge", "requested")
    device = observed.device or _device_barred(conditions)
    if device is None:
        return Step(Kind.ASK_DEVICE, "device", "device", "requested" if request.tier == "device" else "first")
    if isinstance(device, Failure):
        return _fall_back(device) if edge else Step(Kind.ASK_EDGE, "edge", "edge", device.reason)
    return _device_answer(policy, request, device, edge)


def _edge_answer(request: Request, observed: Observed) -> Step:
    if isinstance(observed.device, Answer):
        return Step(Kind.ANSWER, "edge", "escalated", "low_confidence")
    reason = "requested" if request.tier == "edge" else "device_unavailable"
    if isinstance(observed.device, Failure):
        reason = observed.device.reason
    return Step(Kind.ANSWER, "edge", "edge", reason)


def _device_answer(policy: Policy, request: Request, device: Answer, edge: Failure | None) -> Step:
    """The device answered: reply with it, ask the edge, or reply with it for want of the edge."""
    if request.tier == "device":
        return Step(Kind.ANSWER, "device", "device", "requested")
    confident = (device.confidence or 0.0) >= threshold_of(policy, request, device.threshold)
    if confident and request.tier == "auto":
        return Step(Kind.ANSWER, "device", "device", "confident")
    if edge is None:
        return Step(Kind.ASK_EDGE, "edge", "escalated", "low_confidence")
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
    chat = observed.chat or _edge_barred(policy, conditions, request)
    if chat is None:
        return Step(Kind.ASK_EDGE, "chat", "chat", "out_of_scope")
    if isinstance(chat, Answer):
        return Step(Kind.ANSWER, "chat", "chat", "out_of_scope")
    return _without_edge(step, chat)
