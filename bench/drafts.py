"""`edgecascade bench drafts`: what a draft of the answer, or a lookup of repeated text, saves, and whether it shows.

Each query is asked of the tier alone and then with a draft, one after the other, so that a busy machine slows both. A
draft is the tier's own answer with some words replaced, or what another tier says. With `exact` the tier is measured
once more as it is without `EXACT_DRAFTS`, which makes single steps slower: the gain over that is what a user sees.

In shards each piece of an answer waits for every hop, so a draft saves hops too. Here shards are called, and a hop's
delay is waited for: computing is measured, the network modelled.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.errors import BenchError
from bench.sharded import even_cut, n_layers
from models.runtime.inprocess import InProcessLink
from models.runtime.links import Answer, Link, LinkSession, Opening, Piece
from models.runtime.local import LocalTier
from models.runtime.pipeline import Replicas, open_head
from models.runtime.sessions import EngineOptions
from models.runtime.stage import Stage
from models.runtime.tier import Chat, Limits, Token

OWN, NONE = "own", "none"
_WRONG_WORDS = ("lantern", "however", "seven", "never", "blue", "Thursday", "of")


@dataclass(frozen=True)
class Plan:
    """What is measured. `drafts` is 'own', 'none' or the folder of the tier that writes them.

    `corrupt`: share of a draft's words that are replaced; `lookup_tokens` are for the tier that is given drafts, which
    is cut into `shards`, `hop_ms` away from each other.
    """

    tier: Path
    drafts: str = OWN
    corrupt: float = 0.1
    lookup_tokens: int = 0
    exact: bool = False
    max_tokens: int = 32
    threads: int = 2
    shards: int = 1
    hop_ms: float = 0.0


@dataclass(frozen=True)
class Asked:
    """One query: seconds alone, with a draft, and alone without `EXACT_DRAFTS`; tokens; what came of the draft.

    Of shards also how often an answer was waited for at a hop, alone and with a draft.
    """

    alone_s: float
    drafted_s: float
    plain_s: float
    tokens: int
    same: bool
    proposed: int
    accepted: int
    alone_hops: int = 0
    drafted_hops: int = 0


class Bench:
    """The opened tiers of a plan; raises `BenchError` where a tier writes no text."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._rng, self._hops = plan, random.Random(1), Hops(plan.hop_ms / 1e3)
        self._alone = self._open(plan.tier, exact=plan.exact)
        self._plain = self._open(plan.tier) if plan.exact else self._alone
        lookup = plan.lookup_tokens
        self._drafted = self._open(plan.tier, exact=plan.exact, lookup_tokens=lookup) if lookup else self._alone
        self._drafter = None if plan.drafts in {OWN, NONE} else self._open(Path(plan.drafts))

    def ask(self, text: str) -> Asked:
        """Ask one query in all ways."""
        chat, stats = Chat(({"role": "user", "content": text},)), self._drafted.stats
        plain_s, _ = self._answer(self._plain, chat)
        begun = self._hops.count
        alone_s, alone = self._answer(self._alone, chat)
        alone_hops = self._hops.count - begun
        draft, before, begun = self._draft(chat, alone), stats(), self._hops.count
        drafted_s, drafted = self._answer(self._drafted, chat, draft)
        after, drafted_hops = stats(), self._hops.count - begun
        proposed, accepted = (
            getattr(after, f"{source}_{what}_tokens") - getattr(before, f"{source}_{what}_tokens")
            for what in ("proposed", "accepted")
            for source in ("lookup" if self._plan.drafts == NONE else "draft",)
        )
        same = [token.id for token in alone] == [token.id for token in drafted]
        hops = alone_hops, drafted_hops
        return Asked(alone_s, drafted_s, plain_s, len(drafted), same, proposed, accepted, *hops)

    def _open(self, path: Path, *, exact: bool = False, lookup_tokens: int = 0) -> LocalTier:
        options = EngineOptions(self._plan.threads, sequences=1, exact_drafts=exact)
        tier = (
            LocalTier.open(
                path, "drafts", options.threads, sequences=1, exact_drafts=exact, lookup_tokens=lookup_tokens
            )
            if self._plan.shards == 1 or path != self._plan.tier
            else in_shards(path, options, lookup_tokens, self._plan.shards, self._hops)
        )
        if not tier.card.chats:
            raise BenchError(f"{path} writes no text; name a tier that chats")
        return tier

    def _answer(self, tier: LocalTier, chat: Chat, draft: str = "") -> tuple[float, list[Token]]:
        begun = time.perf_counter()
        tokens = list(tier.generate(chat, Limits(max_tokens=self._plan.max_tokens, draft=draft)))
        return time.perf_counter() - begun, tokens

    def _draft(self, chat: Chat, alone: Sequence[Token]) -> str:
        if self._plan.drafts == NONE:
            return ""
        said = alone if self._drafter is None else self._answer(self._drafter, chat)[1]
        return corrupted("".join(token.text for token in said), self._plan.corrupt, self._rng)


@dataclass
class Hops:
    """How long a message takes from shard to shard, and how many answers were waited for."""

    one_way_s: float
    count: int = 0

    def wait(self) -> None:
        """There and back."""
        self.count += 1
        time.sleep(2 * self.one_way_s)


def in_shards(path: Path, options: EngineOptions, lookup_tokens: int, count: int, hops: Hops) -> LocalTier:
    """The tier in so many shards, which call each other; raises `BenchError`."""
    head, *others = even_cut(n_layers(path), count)
    beyond: Replicas | None = None
    for layers in reversed(others):
        beyond = _reached(_Far(InProcessLink(Stage.open(path, layers, options), beyond), hops))
    if beyond is None:
        raise BenchError("one shard is the whole tier")
    return open_head(path, "drafts", head.stop, beyond, options, lookup_tokens=lookup_tokens)


def _reached(link: Link) -> Replicas:
    return Replicas(lambda: [link])


class _Far:
    """A link whose answers take a hop there and back."""

    def __init__(self, link: Link, hops: Hops) -> None:
        self.name, self._link, self._hops = link.name, link, hops

    def open(self, opening: Opening) -> LinkSession:
        """Begin a session."""
        return _FarSession(self._link.open(opening), self._hops)


class _FarSession:
    leaving = False

    def __init__(self, session: LinkSession, hops: Hops) -> None:
        self.held_tokens, self._session, self._hops = session.held_tokens, session, hops

    def send(self, piece: Piece) -> None:
        self._session.send(piece)

    def receive(self) -> Answer:
        self._hops.wait()
        return self._session.receive()

    def close(self) -> None:
        self._session.close()


def corrupted(text: str, share: float, rng: random.Random) -> str:
    """Replace a share of the words."""
    words = [rng.choice(_WRONG_WORDS) if rng.random() < share else word for word in text.split(" ")]
    return " ".join(words)


def measure(plan: Plan, texts: Sequence[str], progress: Callable[[int, int, str], None]) -> list[Asked]:
    """Ask all texts; the first one twice, since the first pass of all takes longer."""
    bench, asked = Bench(plan), list[Asked]()
    bench.ask(texts[0])
    for number, text in enumerate(texts, 1):
        asked.append(bench.ask(text))
        same = sum(one.same for one in asked)
        progress(number, len(texts), f"{same} of {number} the same")
    return asked


def figures(asked: Sequence[Asked]) -> dict[str, float]:
    """What came of it; `speed_up` compares whole answers, prompts included."""
    alone_s, drafted_s, plain_s = (sum(getattr(a, name) for a in asked) for name in ("alone_s", "drafted_s", "plain_s"))
    tokens, proposed, accepted = (sum(getattr(a, name) for a in asked) for name in ("tokens", "proposed", "accepted"))
    return {
        "queries": len(asked),
        "identical": sum(a.same for a in asked),
        "tokens": tokens,
        "proposed": proposed,
        "accepted": accepted,
        "acceptance": accepted / proposed if proposed else 0.0,
        "accepted_share_of_tokens": accepted / tokens,
        "hops_alone": sum(a.alone_hops for a in asked),
        "hops": sum(a.drafted_hops for a in asked),
        "speed_up": alone_s / drafted_s,
        "speed_up_median": median(a.alone_s / a.drafted_s for a in asked),
        "speed_up_over_plain": plain_s / drafted_s,
        "speed_up_over_plain_median": median(a.plain_s / a.drafted_s for a in asked),
        "tokens_per_s": tokens / drafted_s,
        "tokens_per_s_alone": tokens / alone_s,
    }


def report(found: Mapping[str, float], *, as_json: bool) -> None:
    """A table for a person, and JSON last."""
    if not as_json:
        Console(width=100).print(_table(found))
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


def _table(found: Mapping[str, float]) -> Table:
    table = Table("", "")
    table.add_row("identical to the tier alone", f"{found['identical']:.0f} of {found['queries']:.0f}")
    table.add_row("proposed tokens accepted", f"{found['accepted']:.0f} of {found['proposed']:.0f}")
    table.add_row("of the answers' tokens", f"{100 * found['accepted_share_of_tokens']:.0f} %")
    if found["hops_alone"]:
        table.add_row("waits at a hop, alone", f"{found['hops_alone']:.0f}")
        table.add_row("with drafts", f"{found['hops']:.0f}")
    table.add_row("speed-up, all answers (median)", f"{found['speed_up']:.2f} ({found['speed_up_median']:.2f})")
    over = f"{found['speed_up_over_plain']:.2f} ({found['speed_up_over_plain_median']:.2f})"
    table.add_row("over the tier without EXACT_DRAFTS", over)
    return table
