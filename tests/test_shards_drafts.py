"""Drafts, lookups and prefixes in shards: what they save, and that links may die at any piece of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.runtime.inprocess import InProcessLink
from models.runtime.local import LocalTier
from models.runtime.pipeline import Replicas, open_head
from models.runtime.stage import Stage
from models.runtime.tier import Completion, JsonForm, Limits, Tier, Token
from tests.shard_rigs import OPTIONS, FlakyLink, linked
from tests.tiny_models import SHAPE, quiet, write_gguf

N, CONTEXT = SHAPE.n_layers, 768
CUTS = [(0, 1, N), (0, 2, N), (0, 1, 2, N)]
MB = 1 << 20
LONG_PROMPT = "the then he that " * 12
FORM = JsonForm('{"type": "array", "items": {"enum": ["abc", "b"]}, "minItems": 2, "maxItems": 6}')
KINDS = ["fp32", "int4", "prefill"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    source = GgufSource(
        write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", shape=replace(SHAPE, context=CONTEXT))
    )

    @cache
    def built(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind) / "tier"
        build(source, folder, "fp32" if kind == "fp32" else "int4", None, quiet, prefill=kind == "prefill")
        return folder

    return built


@pytest.fixture(scope="module")
def whole(paths: Callable[[str], Path]) -> Callable[[str, bool], LocalTier]:
    @cache
    def opened(kind: str, exact: bool) -> LocalTier:
        return LocalTier.open(paths(kind), "edge", threads=1, exact_drafts=exact)

    return opened


class Chain:
    """Shards that call each other through two links each, of which one dies when the dice say so."""

    def __init__(self, path: Path, cuts: Sequence[int], *, exact: bool, lookup: int = 0, cache_bytes: int = MB) -> None:
        options = replace(OPTIONS, exact_drafts=exact, prefix_cache_bytes=cache_bytes)
        self.rate, self.rng, self.pieces = 0.0, random.Random(), 0
        self.stages: list[Stage] = []
        beyond: Replicas | None = None
        for start, stop in reversed(list(pairwise(cuts[1:]))):
            replicas = [Stage.open(path, range(start, stop), options) for _ in range(2)]
            self.stages += replicas
            links = [
                FlakyLink(InProcessLink(stage, beyond), self.dies if n else self.lives, f"{start}, replica {n}")
                for n, stage in enumerate(replicas)
            ]
            beyond = Replicas(lambda links=links: links)  # type: ignore[misc]
        assert beyond is not None
        self.replicas = beyond
        self.tier = open_head(path, "edge", cuts[1], beyond, options, lookup_tokens=lookup)

    def lives(self, _: int) -> bool:
        self.pieces += 1
        return False

    def dies(self, _: int) -> bool:
        self.pieces += 1
        return self.rng.random() < self.rate


def said(tier: Tier, limits: Limits, text: str) -> list[Token]:
    return [replace(token, draft=None) for token in tier.generate(Completion(text), limits)]


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


@pytest.fixture(scope="module")
def chains(paths: Callable[[str], Path]) -> Callable[[str, tuple[int, ...], bool], Chain]:
    return cache(lambda kind, cuts, exact: Chain(paths(kind), cuts, exact=exact, lookup=4 if exact else 0))


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    cuts=st.sampled_from(CUTS),
    exact=st.booleans(),
    draft=st.text("the 'Zé{\n", max_size=60),
    keep=st.integers(0, 60),
    prompt=st.integers(1, len(LONG_PROMPT)),
    rate=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 1.0]),
    form=st.sampled_from([None, FORM]),
)
def test_no_draft_no_cut_no_prefix_and_no_loss_changes_an_answer(
    whole: Callable[[str, bool], LocalTier],
    chains: Callable[[str, tuple[int, ...], bool], Chain],
    kind: str,
    cuts: tuple[int, ...],
    exact: bool,
    draft: str,
    keep: int,
    prompt: int,
    rate: float,
    seed: int,
    temperature: float,
    form: JsonForm | None,
) -> None:
    """To the bit: with exact drafts as the model alone says it, otherwise as the whole says it with this draft."""
    chain, limits = chains(kind, cuts, exact), Limits(max_tokens=24, temperature=temperature, seed=1, json=form)
    alone = said(whole(kind, exact), limits, LONG_PROMPT[:prompt])
    drafted = replace(limits, draft=text_of(alone)[:keep] + draft)
    wanted = alone if exact else said(whole(kind, exact), drafted, LONG_PROMPT[:prompt])
    chain.rng, chain.rate = random.Random(seed), rate
    assert said(chain.tier, drafted, LONG_PROMPT[:prompt]) == wanted
    assert all(stage.open_sessions == 0 for stage in chain.stages)


@pytest.fixture
def chain(paths: Callable[[str], Path]) -> Chain:
    return Chain(paths("int4"), (0, 1, 2, N), exact=True)


def pieces(chain: Chain, limits: Limits, prompt: str = "the then") -> int:
    before = chain.pieces
    said(chain.tier, limits, prompt)
    return chain.pieces - before


def test_a_right_draft_saves_hops(chain: Chain) -> None:
    """In JSON tokens are forced whose text the tokenizer cuts alike, so that a text says its ids."""
    many = JsonForm('{"type": "array", "items": {"enum": ["abc", "b"]}, "minItems": 12, "maxItems": 12}')
    limits = Limits(max_tokens=200, json=many)
    answer = said(chain.tier, limits, "the then")
    drafted = replace(limits, draft=text_of(answer))
    assert pieces(chain, drafted) < pieces(chain, limits) / 2
    stats = chain.tier.stats()
    assert 5 < stats.draft_accepted_tokens <= stats.draft_proposed_tokens


def test_lookups_are_proposed_while_nobody_else_asks(paths: Callable[[str], Path]) -> None:
    chain = Chain(paths("int4"), (0, 1, N), exact=True, lookup=4)
    said(chain.tier, Limits(max_tokens=40), "the then the then the then")
    stats = chain.tier.stats()
    assert stats.lookup_proposed_tokens >= stats.lookup_accepted_tokens >= 0
    assert stats.lookup_proposed_tokens > 0


# ---- prefixes ----


def reused(stages: Sequence[Stage]) -> list[int]:
    return [stage.prefix_stats.reused_tokens for stage in stages]


LIMITS = Limits(max_tokens=6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeats", [5, 9, 10, 11, 30, 36])
def test_a_prompt_that_begins_alike_is_not_read_again_and_says_the_same(
    paths: Callable[[str], Path], whole: Callable[[str, bool], LocalTier], kind: str, repeats: int
) -> None:
    chain, prompt = Chain(paths(kind), (0, 1, N), exact=False), "the then he that " * repeats
    wanted = said(whole(kind, False), LIMITS, prompt)
    for _ in range(4):
        assert said(chain.tier, LIMITS, prompt) == wanted
    n_tokens = chain.tier.count_tokens(Completion(prompt))
    assert chain.tier.stats().prefix_reused_tokens == 3 * max(0, (n_tokens - 25) // 64 * 64)
    assert said(chain.tier, LIMITS, prompt + "he") == said(whole(kind, False), LIMITS, prompt + "he")


def test_a_shard_that_holds_nothing_is_sent_what_the_one_before_it_made(paths: Callable[[str], Path]) -> None:
    """Each replica is new to the prompt once; then it holds it too."""
    chain = Chain(paths("int4"), (0, 1, 2, N), exact=False)
    wanted = said(chain.tier, LIMITS, LONG_PROMPT)
    for _ in range(8):
        assert said(chain.tier, LIMITS, LONG_PROMPT) == wanted
    assert all(count > 0 for count in reused(chain.stages))
    assert all(stage.prefix_stats.held_bytes > 0 for stage in chain.stages)


def test_a_prefix_is_bounded_in_bytes(paths: Callable[[str], Path]) -> None:
    chain = Chain(paths("int4"), (0, 1, N), exact=False, cache_bytes=120_000)
    for start in range(20):
        said(chain.tier, LIMITS, f"{start} {LONG_PROMPT}")
    for stats in (stage.prefix_stats for stage in chain.stages):
        assert 0 < stats.held_bytes <= 120_000
        assert stats.evicted_blocks > 0
    assert chain.tier.stats().prefix_evicted_blocks > 0


def test_without_room_for_it_there_is_no_prefix(paths: Callable[[str], Path]) -> None:
    chain = Chain(paths("int4"), (0, 1, N), exact=False, cache_bytes=0)
    for _ in range(2):
        said(chain.tier, LIMITS, LONG_PROMPT)
    assert reused(chain.stages) == [0, 0]
    assert chain.tier.stats().prefix_reused_tokens == 0


@pytest.fixture(scope="module")
def remote(paths: Callable[[str], Path]) -> Iterator[Tier]:
    with linked(paths("int4"), (0, 1, N), 2, options=replace(OPTIONS, prefix_cache_bytes=MB)) as rig:
        yield rig.tier


def test_prefixes_travel_by_their_keys(remote: Tier, whole: Callable[[str, bool], LocalTier]) -> None:
    wanted = said(whole("int4", False), LIMITS, LONG_PROMPT)
    for _ in range(5):
        assert said(remote, LIMITS, LONG_PROMPT) == wanted
    assert remote.stats().prefix_reused_tokens > 0


@pytest.mark.parametrize("stopped_after", [0, 3, 11])
def test_a_shard_that_goes_in_the_middle_of_a_draft_costs_no_bit(
    paths: Callable[[str], Path], whole: Callable[[str, bool], LocalTier], stopped_after: int
) -> None:
    """The one at work is stopped without grace; another replica is sent all pieces again, rewound ones too."""
    limits = Limits(max_tokens=30, temperature=0.8, seed=3)
    alone = said(whole("int4", False), limits, "the then")
    drafted = replace(limits, draft=text_of(alone)[:14] + " the then he")
    wanted = said(whole("int4", False), drafted, "the then")
    options = replace(OPTIONS, prefix_cache_bytes=MB)
    with linked(paths("int4"), (0, 1, 2, N), 2, options=options, lookup_tokens=0) as rig:
        found = []
        for number, token in enumerate(rig.tier.generate(Completion("the then"), drafted)):
            found.append(replace(token, draft=None))
            if number == stopped_after:
                for victim in [served for served in rig.shards.values() if served.service.open_sessions]:
                    victim.server.stop(0.0)
        assert found == wanted
        assert rig.replicas.stats.resumed > 0
