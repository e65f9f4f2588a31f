"""`bench sites`: a device site and an edge site, and the link between them cut under load.

Does the device site answer everything, and say so? Does escalation resume by itself once they are joined again?
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.bundle import StartSite
from bench.chaos import Shot, recovered, shoot, untruth
from bench.client import Client
from bench.errors import BenchError
from bench.faults import FaultProxy
from bench.metrics import percentile
from bench.queries import Query
from bench.steady import Timed, between, steadily

PHASES = ("joined", "cut", "joined again")
_TIMEOUT_S = 70.0
_EDGE = "edge"


@dataclass(frozen=True)
class Plan:
    """Requests a second, how long each phase lasts, and the deadline that requests carry."""

    rate: float = 10.0
    seconds: float = 8.0
    deadline_ms: float = 2000.0


@dataclass(frozen=True)
class Phase:
    """What came of the requests sent in one phase; `lies` are those of requests that were sent and done in it.

    `flagged`: answers that say that they are not what they could be.
    """

    name: str
    sent: int
    answered: int
    flagged: int
    sources: Mapping[str, int]
    reasons: Mapping[str, int]
    p50_ms: float | None
    p99_ms: float | None
    lies: Mapping[str, int]


@dataclass(frozen=True)
class Outcome:
    """All phases; `resumed_s`: from the moment the link was there again to the first answer of the edge."""

    phases: Sequence[Phase]
    resumed_s: float | None

    @property
    def failings(self) -> list[str]:
        """What of the issue's demands does not hold."""
        first, cut, last = self.phases
        holds = {
            "every request is answered": all(phase.answered == phase.sent for phase in self.phases),
            "the edge is asked while the sites are joined": bool(first.sources.get(_EDGE)),
            "nothing comes from the edge while the link is cut": not cut.sources.get(_EDGE),
            "what the cut costs is flagged": cut.flagged > 0 and not cut.lies,
            "the edge is asked again": self.resumed_s is not None and bool(last.sources.get(_EDGE)),
        }
        return [what for what, holding in holds.items() if not holding]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready figures with their verdict."""
        failings = self.failings
        return {
            "phases": [asdict(phase) for phase in self.phases],
            "resumed_s": self.resumed_s,
            "verdict": {"failings": failings, "passed": not failings},
        }


def run(
    start: StartSite,
    queries: Sequence[Query],
    plan: Plan,
    report: Callable[[float, float, str], None] = lambda _done, _total, _text: None,
) -> Outcome:
    """Join the sites by a proxy, and cut and mend it while requests arrive; raises `BenchError`."""
    with (
        start(_EDGE, {}) as edge,
        FaultProxy(edge) as link,
        start("device", {"EDGE_URL": f"{link.url}/function/edge"}) as device,
        Client(device, timeout_s=_TIMEOUT_S) as client,
    ):
        if recovered(client, queries, _EDGE) is None:
            raise BenchError("the edge site does not answer, and the link was not cut yet")

        def ask(number: int) -> Shot:
            return shoot(client, queries[number % len(queries)], plan.deadline_ms)

        bounds = [time.monotonic()]
        with steadily(ask, plan.rate) as steady:
            for number, (name, change) in enumerate(zip(PHASES, (None, link.stop, link.resume), strict=True)):
                report(number, len(PHASES), name)
                if change is not None:
                    change()
                    bounds.append(time.monotonic())
                time.sleep(plan.seconds)
    return summed(steady.timed, [*bounds, float("inf")])


def summed(timed: Sequence[Timed], bounds: Sequence[float]) -> Outcome:
    """Sum the phases up; they begin at `bounds`, the last of which is the end."""
    phases = []
    for name, since_s, until_s in zip(PHASES, bounds, bounds[1:], strict=False):
        shots = [t.shot for t in timed if since_s <= t.sent_s < until_s]
        within = between(timed, since_s, until_s)
        broken = _EDGE if name == "cut" else ""
        phases.append(_phase(name, shots, [said for s in within if s.reply and (said := untruth(broken, s.reply))]))
    mended = bounds[2]
    of_edge = [t.done_s - mended for t in timed if t.sent_s >= mended and t.shot.reply and t.shot.reply.source == _EDGE]
    return Outcome(phases, min(of_edge, default=None))


def _phase(name: str, shots: Sequence[Shot], lies: Sequence[str]) -> Phase:
    replies = [shot.reply for shot in shots if shot.reply is not None]
    latencies = [shot.latency_ms for shot in shots]
    return Phase(
        name=name,
        sent=len(shots),
        answered=len(replies),
        flagged=sum(reply.degraded for reply in replies),
        sources=dict(Counter(reply.source for reply in replies)),
        reasons=dict(Counter(reply.reason for reply in replies if reply.degraded)),
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        lies=dict(Counter(lies)) if name == "cut" else {},
    )
