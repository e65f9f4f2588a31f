"""Decides what happens next to a request, and does nothing else: no clock, no network, no state."""

from routing.drafts import Acceptance, worth_drafting
from routing.policy import Policy
from routing.route import route, threshold_of
from routing.values import CHAT, Answer, Conditions, Failure, Kind, Observed, Outcome, Pending, Request, Step

__all__ = [
    "CHAT",
    "Acceptance",
    "Answer",
    "Conditions",
    "Failure",
    "Kind",
    "Observed",
    "Outcome",
    "Pending",
    "Policy",
    "Request",
    "Step",
    "route",
    "threshold_of",
    "worth_drafting",
]
