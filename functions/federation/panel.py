"""Put one question to all nodes at once and stop as soon as the outcome is certain."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from functions.federation.nodes import AskTier, NodeFailedError, NodeReply, kept_back
from functions.serving.ask import Ask
from functions.serving.errors import RefusedError
from routing.votes import Election, Outcome


@dataclass
class Heard:
    """All that was heard in one election. `failed` says why, by node; `cut_short` were cancelled or late."""

    election: Election
    replies: dict[str, NodeReply] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, RefusedError] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=lambda: Outcome(None, "no_votes", degraded=True))
    seconds: float = 0.0

    def tell(self, outcomes: Counter[tuple[str, str]]) -> None:
        """Count what became of each node's vote."""
        for node in self.election.reliability:
            late = "cut_short" if self.outcome.reason == "decided" else "late"
            unheard = self.failed.get(node) or ("refused" if node in self.refusals else late)
            outcomes[node, "voted" if node in self.replies else unheard] += 1


async def ask_all(
    nodes: Sequence[AskTier], reliability: Mapping[str, float], quorum: int, ask: Ask, expires: float
) -> Heard:
    """Ask every node; returns when the election has an outcome, at `expires` on the monotonic clock at the latest.

    Whoever is still at work then is cancelled.
    """
    began = time.monotonic()
    limit_s = kept_back(expires - began)
    heard = Heard(Election(reliability, quorum))
    tasks = {asyncio.create_task(node.ask(ask, limit_s)): node.name for node in nodes}
    waiting = set(tasks)
    try:
        while (outcome := heard.election.outcome()) is None:
            left_s = began + limit_s - time.monotonic()
            done, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                _hear(heard, tasks[task], task)
            if not done:
                outcome = heard.election.outcome(expired=True)
                break
    finally:
        for task in waiting:
            task.add_done_callback(_forget)
            task.cancel()
    assert outcome is not None, "an election that expired has an outcome"  # noqa: S101  # a bug, not bad input
    heard.outcome, heard.seconds = outcome, time.monotonic() - began
    return heard


def _hear(heard: Heard, node: str, task: asyncio.Task[NodeReply]) -> None:
    try:
        reply = task.result()
    except NodeFailedError as failure:
        heard.failed[node] = failure.reason
        heard.election = heard.election.drop(node)
    except RefusedError as refusal:
        heard.refusals[node] = refusal
        heard.election = heard.election.drop(node)
    else:
        heard.replies[node] = reply
        heard.election = heard.election.cast(reply.ballot)


def _forget(task: asyncio.Task[NodeReply]) -> None:
    """Look at what a cancelled task ended with: an error nobody looks at would be logged."""
    if not task.cancelled():
        task.exception()
