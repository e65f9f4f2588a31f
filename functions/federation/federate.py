"""Answer a request by a vote of the nodes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError

from functions.federation.loop import Loop
from functions.federation.nodes import AskTier, NodeReply
from functions.federation.panel import Heard, ask_all
from functions.serving.ask import CHAT, Ask, Clocked
from functions.serving.errors import ClientLeftError, OverloadedError, RefusedError
from functions.serving.events import End, Event, Joules, NetworkBytes, Piece, Report, Start, Timing
from functions.serving.parse import DATA_CLASS_HEADER
from functions.serving.replies import ModelEntry, ModelFacts
from routing.votes import Result, Standing, learn

NAME = "federation"
MODELS = ("auto", NAME)
_LOOK_EVERY_S = 0.05


class FederationReport(Report):
    """A report that also tells, in a header, how many of how many voted."""

    votes: str = ""

    def headers(self) -> dict[str, str]:
        """The votes beside the rest."""
        return {**super().headers(), "X-Edgecascade-Votes": self.votes}


class Standings:
    """What was learned of each node, shared by all requests; forgotten when the process ends."""

    def __init__(self, names: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._standings: Mapping[str, Standing] = {name: Standing() for name in names}
        self._votes: Counter[tuple[str, str]] = Counter()

    @property
    def reliability(self) -> dict[str, float]:
        """By node, between 0 and 1."""
        return {name: standing.reliability for name, standing in self._standings.items()}

    @property
    def votes(self) -> dict[tuple[str, str], int]:
        """How often each node's vote became what."""
        with self._lock:
            return dict(self._votes)

    def learn(self, heard: Heard) -> None:
        """Take in one election."""
        with self._lock:
            self._standings = learn(self._standings, heard.election, heard.outcome, heard.failed)
            heard.tell(self._votes)


class Federation:
    """The nodes, what is known of them, and the loop that asks them."""

    def __init__(
        self,
        nodes: Sequence[AskTier],
        quorum: int,
        node_id: str,
        loop: Loop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.standings = Standings([node.name for node in nodes])
        self._nodes = nodes
        self._quorum = quorum
        self._node_id = node_id
        self._loop = loop
        self._clock = clock

    def check(self, ask: Ask) -> None:
        """Refuse what must not be federated, and what has no vote."""
        if ask.local_only:
            message = "this request is local-only and a federation asks other nodes; ask your own device tier"
            raise RefusedError(403, message, param=DATA_CLASS_HEADER, code="local_only")
        if ask.model not in MODELS:
            message = f"there is no such model; use {' or '.join(MODELS)}"
            raise RefusedError(404, message, param="model", code="model_not_found")
        fields = {"logprobs": ask.sampling.top_logprobs is not None}
        if ask.skill == CHAT:
            fields |= {"tools": ask.tools is not None, "response_format": ask.json is not None}
        for name, is_set in fields.items():
            if is_set:
                message = f"{name}: nodes do not vote on that; leave it out or ask one tier"
                raise RefusedError(422, message, param=name, code="invalid_value")

    def events(self, ask: Ask, clocked: Clocked) -> Iterator[Event]:
        """Vote, learn, reply; the answer comes in one piece, streamed or not."""
        work = ask_all(self._nodes, self.standings.reliability, self._quorum, ask, clocked.expires)
        heard = _wait(self._loop.run(work), clocked)
        self.standings.learn(heard)
        if heard.outcome.result is None:
            raise _unanswered(heard, ask)
        return self._reply(heard, heard.outcome.result, clocked)

    def models(self) -> list[ModelEntry]:
        """The federation, which can do what any of its nodes can."""
        described = self._loop.run(_describe(self._nodes)).result()
        facts = [one for one in described if one is not None]
        versions = dict.fromkeys(one.model_version for one in facts)
        own = ModelFacts(
            available=bool(facts),
            skills=list(dict.fromkeys(skill for one in facts for skill in one.skills)),
            thresholds={},
            model=NAME,
            model_version=",".join(versions),
            context=min((one.context for one in facts if one.context is not None), default=None),
            quantisation=None,
        )
        return [
            ModelEntry(id=name, object="model", created=0, owned_by="edgecascade", edgecascade=own) for name in MODELS
        ]

    def _reply(self, heard: Heard, result: Result, clocked: Clocked) -> Iterator[Event]:
        best = heard.replies[result.backers[0]]
        report = self._report(heard, result, best, clocked)
        text = best.text if result.frame is None else json.dumps(result.frame, ensure_ascii=False)
        yield Start(NAME, report)
        yield Piece(text)
        yield End(best.finish_reason, best.usage, report)

    def _report(self, heard: Heard, result: Result, best: NodeReply, clocked: Clocked) -> Report:
        """The vote as a report; prefill, decode and version are those of the heaviest vote for the answer."""
        replies = heard.replies.values()
        told = best.report.timing_ms
        return FederationReport(
            source=NAME,
            route=NAME,
            reason=heard.outcome.reason,
            degraded=heard.outcome.degraded,
            confidence=result.confidence,
            frame=result.frame,
            model_version=best.report.model_version,
            node_id=self._node_id,
            timing_ms=Timing(
                total=1e3 * (self._clock() - clocked.started),
                queue=1e3 * clocked.queued_s,
                network=max(0.0, 1e3 * heard.seconds - told.total),
                prefill=told.prefill,
                decode=told.decode,
                first_token=1e3 * (self._clock() - clocked.started),
            ),
            network_bytes=NetworkBytes(
                sent=sum(reply.network.sent for reply in replies),
                received=sum(reply.network.received for reply in replies),
            ),
            joules=_joules([reply.report for reply in replies]),
            votes=f"{result.votes}/{result.of}",
        )


def _wait(future: Future[Heard], clocked: Clocked) -> Heard:
    """The outcome; raises `ClientLeftError`, with all nodes cancelled, once nobody waits for it."""
    while True:
        try:
            return future.result(timeout=_LOOK_EVERY_S)
        except NotYetError:
            if clocked.gone is not None and clocked.gone():
                future.cancel()
                raise ClientLeftError from None


def _unanswered(heard: Heard, ask: Ask) -> Exception:
    """Without a single vote: what a node refused, else that nobody was there."""
    nodes = heard.election.reliability
    refusal = next((heard.refusals[node] for node in nodes if node in heard.refusals), None)
    if refusal is not None:
        return RefusedError(refusal.status, refusal.message, param=ask.field(refusal.param), code=refusal.code)
    message = f"none of the {len(nodes)} nodes answered in time; come back later"
    return OverloadedError(503, message, code="no_votes", retry_after_s=1)


async def _describe(nodes: Sequence[AskTier]) -> list[ModelFacts | None]:
    return await asyncio.gather(*(node.describe() for node in nodes))


def _joules(reports: Sequence[Report]) -> Joules | None:
    spent = [report.joules for report in reports if report.joules is not None]
    if not spent:
        return None
    names = dict.fromkeys(one.source for one in spent)
    return Joules(value=sum(one.value for one in spent), kind=spent[0].kind, source="; ".join(names))
