"""Dispatch one request: let `routing` choose a step, take it, until the step is an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from functions.dispatcher import canned
from functions.dispatcher.ledger import Ledger
from functions.dispatcher.tier_client import TierClient, TierFailedError
from functions.dispatcher.wire import TierReply
from functions.serving.ask import CHAT, Ask, Clocked, Message, Shape
from functions.serving.errors import RefusedError
from functions.serving.events import End, Event, Events, Piece, Report, Start, Usage
from functions.serving.replies import ModelEntry, ModelFacts
from routing import Answer, Conditions, Failure, Kind, Observed, Policy, Request, Step, route, threshold_of

MODELS = ("auto", "device", "edge")
_OUT_OF_SCOPE = "out_of_scope"


@dataclass(frozen=True)
class Dispatcher:
    """The two tiers and the policy between them."""

    policy: Policy
    device: TierClient
    edge: TierClient
    node_id: str
    clock: Callable[[], float] = time.monotonic

    def check(self, ask: Ask) -> None:
        """Refuse a model that is none of ours."""
        if ask.model not in MODELS:
            message = f"there is no such model; use {', '.join(MODELS)}"
            raise RefusedError(404, message, param="model", code="model_not_found")

    def events(self, ask: Ask, clocked: Clocked) -> Events:
        """Choose, call, choose again, reply."""
        run = _Run(self, ask, clocked)
        step = run.choose()
        while not step.is_last:
            run.take(step)
            step = run.choose()
        return run.reply(step)

    def models(self) -> list[ModelEntry]:
        """The tiers as they describe themselves, and `auto`, which can do what either can."""
        facts = {client.name: _facts(client) for client in (self.device, self.edge)}
        skills = list(dict.fromkeys(skill for one in facts.values() for skill in one.skills))
        auto = ModelFacts(
            available=True,
            skills=skills,
            thresholds=facts[self.device.name].thresholds,
            model="auto",
            model_version="",
            context=None,
            quantisation=None,
        )
        return [
            ModelEntry(id=name, object="model", created=0, owned_by="edgecascade", edgecascade=one)
            for name, one in {"auto": auto, **facts}.items()
        ]


class _Run:
    """One request on its way through the tiers."""

    def __init__(self, dispatcher: Dispatcher, ask: Ask, clocked: Clocked) -> None:
        self._dispatcher = dispatcher
        self._ask = ask
        self._clocked = clocked
        self._request = _request(ask)
        self._observed = Observed()
        self._answers: dict[str, TierReply | Events] = {}
        self._refusal: RefusedError | None = None
        self._ledger = Ledger(clocked, dispatcher.clock)

    def choose(self) -> Step:
        """The next step as things stand now."""
        tiers = self._dispatcher
        remaining_ms = 1e3 * (self._clocked.expires - tiers.clock())
        conditions = Conditions(tiers.device.is_up(), tiers.edge.is_up(), remaining_ms)
        return route(tiers.policy, conditions, self._request, self._observed)

    def take(self, step: Step) -> None:
        """Ask the tier that the step names, and note what came of it."""
        client = self._dispatcher.device if step.uses == "device" else self._dispatcher.edge
        try:
            outcome: Answer | Failure = self._call(client, step.uses)
        except TierFailedError as failure:
            outcome = Failure(failure.reason)
        except RefusedError as refusal:
            self._refusal = _in_the_callers_words(refusal, self._ask)
            outcome = Failure(f"{client.name}_refused")
        self._observed = replace(self._observed, **{step.uses: outcome})

    def reply(self, step: Step) -> Iterator[Event]:
        """The events of the last step; raises what a tier refused if no tier answered."""
        if step.kind is Kind.FALL_BACK:
            if self._refusal is not None:
                raise self._refusal
            return self._canned(step)
        answer = self._answers[step.uses]
        return self._whole(step, answer) if isinstance(answer, TierReply) else self._live(step, answer)

    def _call(self, client: TierClient, uses: str) -> Answer:
        ask = _as_chat(self._ask) if uses == "chat" else self._ask
        remaining_s = self._clocked.expires - self._dispatcher.clock()
        traffic = self._ledger.open(client.name)
        if ask.stream and ask.skill == CHAT:
            events = client.stream(ask, remaining_s, traffic)
            next(events)  # the tier has its first token: from here on this is the answer
            self._ledger.first_token()
            self._answers[uses] = events
            return Answer()
        reply = client.ask(ask, remaining_s, traffic)
        self._ledger.close(reply.report)
        self._answers[uses] = reply
        return _outcome(reply.report)

    def _whole(self, step: Step, answer: TierReply) -> Iterator[Event]:
        report = self._report(step, answer.report)
        yield Start(answer.model, report)
        yield Piece(answer.text, answer.logprobs, answer.calls)
        yield End(answer.finish_reason, answer.usage, report)

    def _live(self, step: Step, events: Events) -> Iterator[Event]:
        """Pass a stream through; where it breaks, what was sent stands, flagged."""
        source = "device" if step.uses == "device" else "edge"
        begun = Report(source=source, route=step.route, reason=step.reason, node_id=self._dispatcher.node_id)
        yield Start(source, begun)
        pieces = 0
        try:
            for event in events:
                if isinstance(event, Piece):
                    pieces += 1
                    yield event
                if isinstance(event, End):
                    self._ledger.close(event.report)
                    yield replace(event, report=self._report(step, event.report))
        except TierFailedError as failure:
            broken = begun.model_copy(update={"degraded": True, "reason": failure.reason})
            if not pieces:
                yield self._said(failure.reason)
            yield End("length", Usage.of(0, pieces), self._report(step, broken))
        finally:
            _close(events)

    def _canned(self, step: Step) -> Iterator[Event]:
        said = Report(source="canned", route=step.route, reason=step.reason, node_id=self._dispatcher.node_id)
        report = self._report(step, said)
        yield Start(canned.MODEL, report)
        yield self._said(step.reason)
        yield End("stop", Usage(), report)

    def _said(self, reason: str) -> Piece:
        """A canned message; where JSON was asked for it is a refusal, so that nobody parses it."""
        return Piece(canned.text_for(reason), refuses=self._ask.json is not None)

    def _report(self, step: Step, said: Report) -> Report:
        """What the tier said of itself, with the dispatcher's route, reason and costs."""
        cut_short = said.degraded and not step.degraded
        calibrated = self._observed.device.threshold if isinstance(self._observed.device, Answer) else None
        judged = said.frame is not None
        return said.model_copy(
            update={
                "route": step.route,
                "reason": said.reason if cut_short else step.reason,
                "degraded": said.degraded or step.degraded,
                "threshold": threshold_of(self._dispatcher.policy, self._request, calibrated) if judged else None,
                **self._ledger.totals(),
            }
        )


def _request(ask: Ask) -> Request:
    return Request(
        skill=ask.skill,
        tier=ask.model,  # type: ignore[arg-type]  # `check` let only these three in
        local_only=ask.local_only,
        chat_when_out_of_scope=ask.chat_when_out_of_scope,
        threshold=ask.threshold,
    )


def _as_chat(ask: Ask) -> Ask:
    """The request as a chat; a skill's utterance becomes what the user says."""
    if ask.skill == CHAT:
        return ask
    return replace(ask, shape=Shape.CHAT, skill=CHAT, messages=(Message("user", ask.text),))


def _in_the_callers_words(refusal: RefusedError, ask: Ask) -> RefusedError:
    return RefusedError(refusal.status, refusal.message, param=ask.field(refusal.param), code=refusal.code)


def _outcome(report: Report) -> Answer:
    intent = (report.frame or {}).get("intent")
    return Answer(report.confidence, report.threshold, intent == _OUT_OF_SCOPE)


def _facts(client: TierClient) -> ModelFacts:
    entry = client.describe()
    if entry is not None:
        return ModelFacts.model_validate(entry["edgecascade"])
    return ModelFacts(
        available=False, skills=[], thresholds={}, model="", model_version="", context=None, quantisation=None
    )


def _close(events: Events) -> None:
    close = getattr(events, "close", None)
    if close is not None:
        close()
