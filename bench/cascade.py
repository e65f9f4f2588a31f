"""`bench cascade`: the same queries through every way to join the tiers, and what each is worth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.arms import EDGE_IN_TIME, ORACLE_IN_TIME, SEQUENTIAL, Arm
from bench.bundle import Start
from bench.client import Client, Reply
from bench.errors import ServiceError
from bench.evaluate import Answered, Asks, ask_all, outcome
from bench.metrics import Outcome, Row, mean, oracle, percentile, row, share
from bench.queries import Query
from bench.slow_tiers import TIERS, WARM_UP, Site, Stage, staged

MOST_MS = 10_000.0
"""A deadline that hurries nobody, for trials."""
DRAWS = 20
"""How often the random router goes through the queries: one draw would be luck."""


@dataclass(frozen=True)
class Way:
    """An arm with the deadline that its requests carry; None: none."""

    name: str
    arm: Arm
    deadline_ms: float | None = None


def ways(arms: Sequence[Arm], deadline_ms: float, deadlines_ms: Sequence[float] = ()) -> list[Way]:
    """Each arm once as it is meant, and those that route once more under each of the other deadlines."""
    meant = [Way(arm.name, arm, deadline_ms if arm.hurried else None) for arm in arms]
    routing = [arm for arm in arms if arm.model == "auto"]
    return meant + [Way(f"{arm.name}@{ms:g}", arm, ms) for arm in routing for ms in deadlines_ms]


@dataclass(frozen=True)
class Figures:
    """One row. `row` as everywhere; router times are what a reply's parts leave unexplained.

    `gap_closed`: how far accuracy lies from a random router with the same share local (0) to the oracle (1).
    `late`: share of replies that came after the deadline; `degraded`: share flagged so. `same_as_edge`: share of the
    replies whose source is the edge that say word for word what the edge alone says.
    """

    row: Row
    deadline_ms: float | None = None
    gap_closed: float | None = None
    router_p50_ms: float | None = None
    router_p99_ms: float | None = None
    degraded: float | None = None
    late: float | None = None
    same_as_edge: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, flat."""
        values = asdict(self)
        return {**values.pop("row"), **values}


class Asker:
    """Asks each way's own dispatcher; a refusal counts as an answer that is not right."""

    def __init__(self, clients: Mapping[str, Client], chosen: Sequence[Way]) -> None:
        self._clients = clients
        self._ways = {way.name: way for way in chosen}

    def ask(self, skill: str, text: str, model: str = "auto") -> Reply:
        """`model` is a way's name; raises `ServiceError` where nobody is there."""
        way = self._ways[model]
        client = self._clients[way.arm.dispatcher]
        began = client.clock()
        try:
            return client.ask(skill, text, way.arm.model, deadline_ms=way.deadline_ms)
        except ServiceError as error:
            if error.status not in {429, 503}:
                raise
            return refused(error.status, 1e3 * (client.clock() - began))


def refused(status: int, latency_ms: float) -> Reply:
    """A refusal, as a reply that answers nothing."""
    return Reply("", None, "refused", "refused", str(status), True, None, None, latency_ms, 0, None, "")  # noqa: FBT003


@dataclass(frozen=True)
class Compared:
    """Every answer by way, in the order of the queries; bytes on the edges' links as counted by the proxies."""

    ways: Mapping[str, Way]
    answered: Sequence[Answered]
    link_bytes: int

    @property
    def reported_bytes(self) -> int:
        """What the replies say crossed the link."""
        return sum(reply.network_bytes for a in self.answered for reply in a.replies.values())


@contextmanager
def stage_for(start: Start, site: Site, arms: Sequence[Arm]) -> Iterator[tuple[Stage, Mapping[str, Client]]]:
    """The tiers, and a dispatcher with a client for each arm."""
    dispatchers = {arm.dispatcher: arm.variant for arm in arms}
    edges = {arm.dispatcher: arm.edge for arm in arms if arm.edge}
    with staged(start, site, dispatchers, edges) as stage, ExitStack() as opened:
        yield stage, {name: opened.enter_context(Client(stage.running.urls[name])) for name in dispatchers}


def compare(
    stage: Stage,
    clients: Mapping[str, Client],
    chosen: Sequence[Way],
    queries: Sequence[Query],
    advance: Callable[[], None] = lambda: None,
) -> Compared:
    """Ask every way every query, in turns, after some that do not count; raises `ServiceError`."""
    asker: Asks = Asker(clients, chosen)
    names = [way.name for way in chosen]
    ask_all(asker, queries[:: max(1, len(queries) // WARM_UP)], names)  # dispatchers get to know their tiers
    links = [proxy for name, proxy in stage.proxies.items() if name != "device"]
    before = [link.traffic for link in links]
    answered = ask_all(asker, queries, names, advance)
    crossed = [link.traffic.since(then) for link, then in zip(links, before, strict=True)]
    link_bytes = sum(one.sent_bytes + one.received_bytes for one in crossed)
    return Compared({way.name: way for way in chosen}, answered, link_bytes)


def tier_means(start: Start, arms: Sequence[Arm], queries: Sequence[Query], site: Site) -> dict[str, float]:
    """Mean replies of both tiers, ms, while all arms are asked in turns: alone, a tier finds its caches warmer."""
    with stage_for(start, site, arms) as (stage, clients):
        found = compare(stage, clients, ways(arms, MOST_MS), queries)
    return {name: mean([a.replies[name].latency_ms for a in found.answered]) or 0.0 for name in TIERS}


def rows(found: Compared) -> dict[str, Figures]:
    """A row for each way, one for the random router, and those of oracles with and without a deadline."""
    outcomes = {name: [outcome(a.query, a.replies[name]) for a in found.answered] for name in found.ways}
    figures = {
        name: replace(
            _figures(way, outcomes[name], [a.replies[name] for a in found.answered]),
            same_as_edge=same_as_edge(found.answered, name),
        )
        for name, way in found.ways.items()
    }
    if not {"device", "edge"} <= set(outcomes):
        return figures
    device, edge = outcomes["device"], outcomes["edge"]
    local = figures[SEQUENTIAL].row.share_local if SEQUENTIAL in figures else None
    if local is not None:
        figures["random"] = Figures(row(at_random(device, edge, local)))
    figures["oracle"] = Figures(row([oracle(d, e) for d, e in zip(device, edge, strict=True)]))
    if EDGE_IN_TIME in outcomes:
        deadline_ms = found.ways[EDGE_IN_TIME].deadline_ms or math.inf
        pairs = zip(device, outcomes[EDGE_IN_TIME], strict=True)
        figures[ORACLE_IN_TIME] = Figures(
            row([oracle(in_time(d, deadline_ms), in_time(e, deadline_ms)) for d, e in pairs])
        )
    floor, ceiling = (figures["device"].row, figures["edge"].row), figures["oracle"].row.accuracy
    return {name: replace(f, gap_closed=gap_closed(f.row, *floor, ceiling)) for name, f in figures.items()}


def in_time(outcome: Outcome, deadline_ms: float) -> Outcome:
    """The outcome of one who hung up at the deadline."""
    if outcome.latency_ms <= deadline_ms:
        return outcome
    return replace(outcome, predicted=None, right=False, latency_ms=deadline_ms)


def at_random(
    device: Sequence[Outcome], edge: Sequence[Outcome], share_local: float, draws: int = DRAWS, seed: int = 1
) -> list[Outcome]:
    """What a router that tosses a coin would get: so large a share of the queries from the device, drawn anew."""
    rng, n = random.Random(seed), len(device)
    found = []
    for _ in range(draws):
        local = set(rng.sample(range(n), round(share_local * n)))
        found += [device[i] if i in local else edge[i] for i in range(n)]
    return found


def gap_closed(found: Row, device: Row, edge: Row, ceiling: float | None) -> float | None:
    """(accuracy − random's) / (oracle's − random's), random's at the same share local; None where there is no gap."""
    if None in {found.accuracy, found.share_local, device.accuracy, edge.accuracy, ceiling}:
        return None
    local = found.share_local or 0.0
    floor = local * (device.accuracy or 0.0) + (1 - local) * (edge.accuracy or 0.0)
    gap = (ceiling or 0.0) - floor
    return ((found.accuracy or 0.0) - floor) / gap if gap > 0 else None


def same_as_edge(answered: Sequence[Answered], name: str) -> float | None:
    """Share of a way's replies by the edge whose text is that of the edge alone; None where nothing can be compared."""
    pairs = [(a.replies[name], a.replies["edge"]) for a in answered if "edge" in a.replies]
    return mean(
        [float(reply.text == edge.text) for reply, edge in pairs if reply.source == "edge" and not reply.degraded]
    )


def router_ms(reply: Reply) -> float | None:
    """The reply's total less its parts; None without parts, and where they overlapped (tiers at the same time)."""
    parts = reply.timing_ms
    if not parts.get("total"):
        return None
    left = parts["total"] - sum(parts.get(name, 0.0) for name in ("queue", "network", "prefill", "decode"))
    return left if left >= 0 else None


def _figures(way: Way, outcomes: Sequence[Outcome], replies: Sequence[Reply]) -> Figures:
    router = [ms for reply in replies if (ms := router_ms(reply)) is not None]
    deadline_ms = way.deadline_ms
    return Figures(
        row=row(outcomes),
        deadline_ms=deadline_ms,
        router_p50_ms=percentile(router, 0.50),
        router_p99_ms=percentile(router, 0.99),
        degraded=mean([float(reply.degraded) for reply in replies]),
        late=None if deadline_ms is None else share(outcomes, lambda o: o.latency_ms > deadline_ms),
    )


@dataclass(frozen=True)
class Frontier:
    """One point: an arm under a deadline."""

    arm: str
    deadline_ms: float
    accuracy: float | None
    p99_ms: float | None
    late: float | None


def frontier(found: Compared, figures: Mapping[str, Figures]) -> list[Frontier]:
    """Every row that had a deadline."""
    return [
        Frontier(way.arm.name, way.deadline_ms, f.row.accuracy, f.row.p99_ms, f.late)
        for name, way in found.ways.items()
        if way.deadline_ms is not None and (f := figures[name])
    ]


def verdict(figures: Mapping[str, Figures], p99_ms: float, points: float) -> dict[str, Any]:
    """Which rows have their p99 under a bound and lose at most so many points of accuracy to sequential escalation.

    `points_to_oracle`: what the best row under that bound loses to the oracle that has to keep the deadline too.
    """
    bar = figures[SEQUENTIAL].row.accuracy if SEQUENTIAL in figures else None
    good = [
        name
        for name, f in figures.items()
        if f.deadline_ms is not None
        and bar is not None
        and (f.row.p99_ms or 0.0) < p99_ms
        and 100 * (bar - (f.row.accuracy or 0.0)) <= points
    ]
    best = max(
        (f.row.accuracy or 0.0 for f in figures.values() if f.deadline_ms and (f.row.p99_ms or 0.0) < p99_ms),
        default=0.0,
    )
    limit = figures[ORACLE_IN_TIME].row.accuracy if ORACLE_IN_TIME in figures else None
    return {
        "p99_below_ms": p99_ms,
        "points_lost_at_most": points,
        "rows": good,
        "points_to_oracle": None if limit is None else 100 * (limit - best),
        "passed": bool(good),
    }
