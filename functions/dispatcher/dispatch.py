"""Dispatch one request: let `routing` choose a step, take it, until the step is an answer."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from functions.dispatcher.bell import Bell, Bells
from functions.dispatcher.budget import Budget
from functions.dispatcher.call import Call, Happening, TierFailedError, poll
from functions.dispatcher.drafting import Drafting
from functions.dispatcher.fallbacks import Fallback, events_of, open_fallback, piece_of, report_of
from functions.dispatcher.ledger import Entry, Ledger
from functions.dispatcher.savings import Savings
from functions.dispatcher.tier_client import TierClient
from functions.dispatcher.wire import TierReply
from functions.serving.ask import CHAT, Ask, Clocked, Message, Shape
from functions.serving.errors import ClientLeftError, RefusedError
from functions.serving.events import End, Event, Events, Piece, Report, Start, Switch, Usage
from functions.serving.replies import ModelEntry, ModelFacts
from routing import (
    Answer,
    Conditions,
    Failure,
    Kind,
    Observed,
    Outcome,
    Pending,
    Policy,
    Request,
    Step,
    route,
    threshold_of,
)
from routing.energy import Figures, Saving
from routing.policy import OnEscalation
from routing.power import Power, PowerMode
from routing.route import TIGHT, is_local_only

MODELS = ("auto", "device", "edge")
_OUT_OF_SCOPE = "out_of_scope"
_REPLY_S = 0.008
_REPLY_SHARE = 0.1
"""Kept back from the deadline, whichever is less: what came before us and what comes after takes time too."""
_LOOK_EVERY_S = 0.25
"""How often one who waits looks whether the caller is still there."""


@dataclass(frozen=True)
class Dispatcher:
    """The two tiers and the policy between them.

    `power` tells how things stand for a request with that battery level, or none; `wake` is to be called when that has
    changed.
    """

    policy: Callable[[], Policy]
    device: TierClient
    edge: TierClient
    node_id: str
    power: Callable[[float | None], Power] = lambda _level: Power()
    fallback: Fallback = field(default_factory=open_fallback)
    clock: Callable[[], float] = time.monotonic
    retries: Budget = field(default_factory=Budget)
    hedges: Budget = field(default_factory=Budget)
    savings: Savings = field(default_factory=lambda: Savings(Figures(), time.monotonic))
    drafting: Drafting = field(default_factory=Drafting)
    bells: Bells = field(default_factory=Bells)

    def check(self, ask: Ask) -> None:
        """Refuse a model that is none of ours."""
        if ask.model not in MODELS:
            message = f"there is no such model; use {', '.join(MODELS)}"
            raise RefusedError(404, message, param="model", code="model_not_found")

    def events(self, ask: Ask, clocked: Clocked) -> Events:
        """Choose, call, choose again, reply."""
        with self.bells.one() as bell:
            run = _Run(self, ask, clocked, bell)
            try:
                step = yield from run.decide()
                yield from run.reply(step)
            finally:
                run.close()

    def wake(self, _power: Power) -> None:
        """Let every request look at the power anew."""
        self.bells.ring()

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

    def __init__(self, dispatcher: Dispatcher, ask: Ask, clocked: Clocked, bell: Bell) -> None:
        self._bell = bell
        self._happened: deque[tuple[Call, Happening]] = deque()
        self._dispatcher = dispatcher
        self._policy = dispatcher.policy()
        self._ask = ask
        self._clocked = clocked
        self._expires = clocked.expires - min(_REPLY_S, _REPLY_SHARE * (clocked.expires - clocked.started))
        self._request = _request(ask)
        self._local_only = is_local_only(self._policy, self._request)
        self._outcomes: dict[str, Outcome | None] = {"device": None, "edge": None, "chat": None}
        self._calls: dict[str, Call] = {}
        self._entries: dict[Call, Entry] = {}
        self._attempts: dict[str, int] = {}
        self._answers: dict[str, TierReply | Call] = {}
        self._refusal: RefusedError | None = None
        self._ledger = Ledger(clocked, dispatcher.clock)
        self._shown = 0  # of the device's answer: its start and so many pieces less one
        self._usual = _usual(dispatcher, ask.skill)
        dispatcher.retries.deposit(self._policy.retry_budget)
        dispatcher.hedges.deposit(self._policy.edge.hedge)

    def decide(self) -> Generator[Event, None, Step]:
        """Take steps until one is the last; gives what may be shown of an answer that is still on its way."""
        step = self._choose()
        while not step.is_last:
            if step.kind is Kind.WAIT:
                self._wait(step.look_again_ms / 1e3)
                yield from self._new()
            else:
                self._put(step)
            step = self._choose()
        return step

    def reply(self, step: Step) -> Iterator[Event]:
        """The events of the last step; raises what a tier refused if no tier answered."""
        if step.kind is Kind.FALL_BACK:
            if self._refusal is not None:
                raise self._refusal
            events = self._fallen_back(step)
        else:
            answer = self._answers[step.uses]
            self._cut_all_but(answer)
            events = self._whole(step, answer) if isinstance(answer, TierReply) else self._live(step, answer)
        return self._continued(step, events) if self._shown else events

    def _continued(self, step: Step, events: Iterator[Event]) -> Iterator[Event]:
        """The rest of an answer of which the device's pieces are shown; another one takes its place, and says so."""
        start = next(events)
        if step.uses == "device":
            yield from (event for event in events if isinstance(event, End))
        elif isinstance(start, Start):
            yield Switch(start.report.model_copy(update={"replaces": "device"}))
            yield from events

    def _new(self) -> Iterator[Event]:
        """What the device said since the last time, where that is shown before it is decided who answers."""
        call = self._calls.get("device")
        if call is None or call.begun is None or not self._shows_early:
            return
        if not self._shown:
            begun = Report(source="device", route="device", reason="first", node_id=self._dispatcher.node_id)
            yield Start(call.begun.model, begun)
            self._shown = 1
        pieces = call.pieces[self._shown - 1 :]
        self._shown += len(pieces)
        yield from pieces

    @property
    def _shows_early(self) -> bool:
        return self._ask.stream and self._policy.stream.on_escalation is OnEscalation.EVENT

    def close(self) -> None:
        """Nothing more is needed. That a tier has not answered when no time is left shows how it does."""
        is_late = self._expires <= self._dispatcher.clock()
        for call in self._entries:
            call.run_out() if is_late else call.cut()

    def _cut_all_but(self, kept: object) -> None:
        for call in self._entries:
            if call is not kept:
                call.cut()

    def _choose(self) -> Step:
        """The next step as things stand now."""
        tiers, power = self._dispatcher, self._power()
        conditions = Conditions(
            device_up=tiers.device.is_up(),
            edge_up=not self._local_only and tiers.edge.is_up(),  # which may send a probe
            remaining_ms=1e3 * (self._expires - tiers.clock()),
            power=power,
            may_hedge=tiers.hedges.available,
            may_retry=tiers.retries.available,
            saving=self._saving if power.mode is PowerMode.SAVE else None,
            **self._usual,
        )
        return route(self._policy, conditions, self._request, self._seen())

    @cached_property
    def _saving(self) -> Saving | None:
        """Chosen once, so that nobody is asked for nothing."""
        device_ms, edge_ms = self._usual["device_ms"], self._usual["edge_ms"]
        remaining_s = self._expires - self._dispatcher.clock()
        device_s, edge_s = (None if ms is None else ms / 1e3 for ms in (device_ms, edge_ms))
        return self._dispatcher.savings.choice(self._ask.skill, device_s, edge_s, remaining_s)

    def _power(self) -> Power:
        return self._dispatcher.power(self._ask.battery_level)

    def _seen(self) -> Observed:
        """What came back, and how long the others have been asked."""
        seen = {
            uses: _pending(self._calls[uses]) if isinstance(outcome, Pending) else outcome
            for uses, outcome in self._outcomes.items()
        }
        return Observed(**seen)

    def _put(self, step: Step) -> None:
        """Ask the tier that the step names, if the budget that it needs still has something."""
        tiers = self._dispatcher
        budget = {"retry": tiers.retries, "hedge": tiers.hedges}.get(step.spends)
        if budget is not None and not budget.take():
            return
        client = tiers.device if step.uses == "device" else tiers.edge
        ask = self._smaller(_as_chat(self._ask) if step.uses == "chat" else self._ask)
        entry = self._ledger.open(client.name)
        now = tiers.clock()
        remaining_s, useful_s = self._clocked.expires - now, self._expires - now
        self._attempts[step.uses] = self._attempts.get(step.uses, 0) + 1
        try:
            stream = self._is_streamed(step, ask)
            draft = self._draft(step)
            call = client.ask(ask, remaining_s, entry.traffic, useful_s=useful_s, stream=stream, draft=draft)
        except TierFailedError as failure:
            self._observe(step.uses, Failure(failure.reason, failure.retriable, self._attempts[step.uses]))
            return
        self._calls[step.uses] = call
        self._entries[call] = entry
        self._observe(step.uses, Pending())
        self._hear(call)

    def _draft(self, step: Step) -> str:
        """The device's answer, where the edge gets done sooner with it."""
        said = self._answers.get("device")
        if step.uses != "edge" or not isinstance(said, TierReply) or not self._policy.edge.draft:
            return ""
        return self._dispatcher.drafting.draft(self._ask.skill, said.text, said.usage.completion_tokens)

    def _is_streamed(self, step: Step, ask: Ask) -> bool:
        """A chat if that is asked for; a frame of the device where its beginning is of use: to show, or to forecast."""
        if ask.skill == CHAT:
            return ask.stream
        if step.uses != "device" or ask.model != "auto":
            return False
        sequential_ms = (self._usual["device_ms"] or 0.0) + (self._usual["edge_ms"] or math.inf)
        is_tight = 1e3 * (self._expires - self._dispatcher.clock()) <= TIGHT * sequential_ms < math.inf
        return self._shows_early or (self._policy.edge.early and is_tight)

    def _smaller(self, ask: Ask) -> Ask:
        """The question, for a shorter answer where power is short."""
        most = self._policy.save.max_tokens
        if self._power().mode is PowerMode.NORMAL or ask.sampling.max_tokens <= most:
            return ask
        return replace(ask, sampling=replace(ask.sampling, max_tokens=most))

    def _wait(self, look_again_s: float) -> None:
        """Until a tier says something, the power changes, or it is time to look again."""
        happened = self._next(self._dispatcher.clock() + look_again_s)
        if happened is not None:
            self._note(*happened)

    def _next(self, until: float) -> tuple[Call, Happening] | None:
        """What happens next; None when it is time, or somebody woke us. Raises `ClientLeftError`."""
        until = min(until, self._expires)
        while not self._happened:
            now = self._dispatcher.clock()
            look = now + _LOOK_EVERY_S
            live = [call for call in self._entries if not call.is_over]
            for call in poll(live, min(until, look), now, self._bell.heard):
                self._hear(call)
            if self._happened:
                break
            if self._bell.answered() or until <= look:
                return None
            if self._clocked.gone is not None and self._clocked.gone():
                raise ClientLeftError
        return self._happened.popleft()

    def _hear(self, call: Call) -> None:
        self._happened.extend((call, told) for told in call.news())

    def _note(self, call: Call, happening: Happening) -> None:
        """See what came of a call; one that was given up for another says nothing any more."""
        uses = next((uses for uses, known in self._calls.items() if known is call), None)
        if uses is not None and isinstance(self._outcomes[uses], Pending):
            self._see(uses, call, happening)

    def _see(self, uses: str, call: Call, happening: Happening) -> None:
        if isinstance(happening, TierReply):
            self._ledger.close(self._entries[call], happening.report)
            self._learn(uses, call, happening)
            self._answers[uses] = happening
            self._observe(uses, _outcome(happening.report))
        elif isinstance(happening, TierFailedError):
            self._observe(uses, Failure(happening.reason, happening.retriable, self._attempts[uses]))
        elif isinstance(happening, RefusedError):
            self._refusal = _in_the_callers_words(happening, self._ask)
            self._observe(uses, Failure(f"{call.name}_refused"))
        elif isinstance(happening, Exception):
            raise happening
        else:  # the first event of a stream: the tier has its first token, from here on this is the answer
            self._ledger.first_token()
            self._answers[uses] = call
            self._observe(uses, Answer())

    def _learn(self, uses: str, call: Call, reply: TierReply) -> None:
        tiers, skill, traffic = self._dispatcher, self._ask.skill, call.traffic
        if uses == "edge":
            tiers.drafting.learn(skill, reply.usage, reply.report, 1e3 * traffic.seconds)
            tiers.savings.edge_answered(skill, traffic.sent, traffic.received, escalated="device" in self._answers)
        elif uses == "device":
            tiers.savings.device_answered(skill)

    def _observe(self, uses: str, outcome: Outcome) -> None:
        self._outcomes[uses] = outcome

    def _whole(self, step: Step, answer: TierReply) -> Iterator[Event]:
        report = self._report(step, answer.report)
        yield Start(answer.model, report)
        yield Piece(answer.text, answer.logprobs, answer.calls)
        yield End(answer.finish_reason, answer.usage, report)

    def _live(self, step: Step, call: Call) -> Iterator[Event]:
        """Pass a stream through; where it breaks, or has to stop, what was sent stands, flagged."""
        source = "device" if step.uses == "device" else "edge"
        begun = Report(source=source, route=step.route, reason=step.reason, node_id=self._dispatcher.node_id)
        yield Start(source, begun)
        pieces, stopped = 0, ""
        while not stopped:
            happening = self._of(call)
            if isinstance(happening, Piece):
                pieces += 1
                yield happening
            elif isinstance(happening, End):
                self._ledger.close(self._entries[call], happening.report)
                yield replace(happening, report=self._report(step, happening.report))
                return
            elif isinstance(happening, TierFailedError):
                stopped = happening.reason
            elif isinstance(happening, Exception):
                raise happening
            elif self._power().mode is PowerMode.CRITICAL:
                stopped = "battery"
            elif self._dispatcher.clock() >= self._expires:
                stopped = "deadline"
        call.cut()
        if not pieces:
            yield piece_of(self._ask, self._dispatcher.fallback.answer(self._ask, stopped))
        broken = begun.model_copy(update={"degraded": True, "reason": stopped})
        yield End("length", Usage.of(0, pieces), self._report(step, broken))

    def _of(self, call: Call) -> Happening | None:
        """What a call tells next; None when there is reason to look up."""
        while (happened := self._next(self._expires)) is not None:
            if happened[0] is call:
                return happened[1]
        return None

    def _fallen_back(self, step: Step) -> Iterator[Event]:
        answer = self._dispatcher.fallback.answer(self._ask, step.reason)
        said = report_of(answer, step.reason, self._dispatcher.node_id)
        return events_of(self._ask, answer, self._report(step, said))

    def _report(self, step: Step, said: Report) -> Report:
        """What the tier said of itself, with the dispatcher's route, reason and costs."""
        cut_short = said.degraded and not step.degraded
        device = self._outcomes["device"]
        calibrated = device.threshold if isinstance(device, Answer) else None
        judged = said.frame is not None
        return said.model_copy(
            update={
                "route": step.route,
                "reason": said.reason if cut_short else step.reason,
                "degraded": said.degraded or step.degraded,
                "threshold": threshold_of(self._policy, self._request, calibrated) if judged else None,
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


def _usual(dispatcher: Dispatcher, skill: str) -> dict[str, float | None]:
    """How long the tiers take lately for the skill, as `Conditions` names it."""
    return {
        "device_ms": _ms(dispatcher.device.takes_s(skill, 0.9)),
        "slow_device_ms": _ms(dispatcher.device.takes_s(skill, 0.95)),
        "edge_ms": _ms(dispatcher.edge.takes_s(skill, 0.9)),
        "least_edge_ms": _ms(dispatcher.edge.takes_s(skill, 0.1, lately=True)),
    }


def _pending(call: Call) -> Pending:
    forecast = call.begun.report if call.begun else None
    confidence, threshold = (forecast.confidence, forecast.threshold) if forecast else (None, None)
    return Pending(1e3 * call.waited_s, confidence, threshold)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
