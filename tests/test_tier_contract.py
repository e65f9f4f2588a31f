"""One contract for every tier: a whole model, shards that call each other or talk gRPC, ranks alike, and the fake.

What `models.runtime.tier` promises is asked of each. Tiers that run the same passes must moreover give the same tokens,
and their probabilities, to the bit: whatever the draft, wherever they are cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.build.adapter import write_exits
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.errors import AbandonedError, PromptError, PromptTooLongError
from models.runtime.local import LocalTier
from models.runtime.sessions import EngineOptions
from models.runtime.tier import (
    TUNED_EXITS,
    Chat,
    Completion,
    DraftUse,
    JsonForm,
    Limits,
    Prompt,
    SkillQuery,
    Tier,
    Token,
)
from tests import rank_rigs
from tests.fakes import FakeTier, card
from tests.shard_rigs import OPTIONS, in_process, linked
from tests.tiny_models import SHAPE, quiet, random_exits, write_adapter, write_gguf

N = SHAPE.n_layers
EXACT = replace(OPTIONS, exact_drafts=True)
LOOKUP = 4
Open = Callable[[Path], AbstractContextManager[Tier]]


def whole(path: Path, **how: float | None) -> AbstractContextManager[Tier]:
    return nullcontext(LocalTier.open(path, "edge", threads=1, **how))  # type: ignore[arg-type]


def shards(path: Path, *cuts: int, options: EngineOptions = OPTIONS, lookup: int = 0) -> AbstractContextManager[Tier]:
    return nullcontext(in_process(path, cuts, options, lookup_tokens=lookup))


def leaving(path: Path, threshold: float | None) -> AbstractContextManager[Tier]:
    """Shards, the first of which has exits."""
    return nullcontext(in_process(path, (0, 2, N), exit_threshold=threshold))


@contextmanager
def over_grpc(path: Path, options: EngineOptions, lookup: int = 0) -> Iterator[Tier]:
    with linked(path, (0, 1, 2, N), replicas=2, options=options, lookup_tokens=lookup) as rig:
        yield rig.tier


@contextmanager
def linked_ranks(path: Path, count: int) -> Iterator[Tier]:
    with rank_rigs.linked(path, count) as rig:
        yield rig.tier


ALIKE: dict[str, Open] = {
    "whole": whole,
    "shards": lambda path: shards(path, 0, 1, N),
    "shards, each layer": lambda path: shards(path, 0, 1, 2, N),
    "shards, gRPC": lambda path: over_grpc(path, OPTIONS),
    "exits that are never sure": lambda path: whole(path, exit_threshold=1),
    "shards, exits that are never sure": lambda path: leaving(path, 1.0),
}
EXACTLY_ALIKE: dict[str, Open] = {
    "exact": lambda path: whole(path, exact_drafts=True, lookup_tokens=LOOKUP, prefix_cache_bytes=1 << 22),
    "exact shards": lambda path: shards(path, 0, 2, N, options=EXACT, lookup=LOOKUP),
    "exact shards, gRPC": lambda path: over_grpc(path, replace(EXACT, prefix_cache_bytes=1 << 22), LOOKUP),
}
TIERS: dict[str, Open] = {
    **ALIKE,
    **EXACTLY_ALIKE,
    "early exits": lambda path: whole(path, exit_threshold=TUNED_EXITS),
    "early exits, shards": lambda path: leaving(path, TUNED_EXITS),
    "2 ranks": lambda path: rank_rigs.in_threads(path, 2),
    "2 ranks, gRPC": lambda path: linked_ranks(path, 2),
    "fake": lambda _: nullcontext(FakeTier(card("edge"))),
}
FP32: dict[str, Open] = {  # more ranks than blocks of scales allow
    "4 ranks": lambda path: rank_rigs.in_threads(path, 4),
    "3 ranks, gRPC": lambda path: linked_ranks(path, 3),
}
ASKED = Chat(({"role": "user", "content": "the then he"},))
LIMITS = Limits(max_tokens=14, top_logprobs=2)
SEEDED = Limits(max_tokens=10, temperature=0.9, seed=3)
FORM = JsonForm('{"type": "array", "items": {"enum": ["abc", "b"]}, "minItems": 2, "maxItems": 6}')


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tier")
    source = GgufSource(write_gguf(folder / "tiny.gguf", Kind.Q4_1))
    adapter = write_adapter(folder / "adapter", source)
    write_exits(adapter, *random_exits())
    build(source, folder / "tier", "int4", adapter, quiet)
    return folder / "tier"


@pytest.fixture(scope="module")
def tiers(path: Path) -> Iterator[Callable[[str], Tier]]:
    """Opens each tier once."""
    opened: dict[str, Tier] = {}
    with ExitStack() as stack:

        def find(name: str) -> Tier:
            if name not in opened:
                opened[name] = stack.enter_context(TIERS[name](path))
            return opened[name]

        yield find


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, tiers: Callable[[str], Tier]) -> Tier:
    return tiers(request.param)


REAL = [name for name in TIERS if name != "fake"]


@pytest.fixture(params=REAL)
def real(request: pytest.FixtureRequest, tiers: Callable[[str], Tier]) -> Tier:
    return tiers(request.param)


def said(tier: Tier, limits: Limits = LIMITS, prompt: Prompt = ASKED) -> list[Token]:
    return list(tier.generate(prompt, limits))


def bare(tokens: Sequence[Token]) -> list[Token]:
    return [replace(token, draft=None) for token in tokens]


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


# ---- what every tier promises ----


def test_it_says_what_it_is(tier: Tier) -> None:
    assert tier.card.name == "edge"
    assert tier.card.context > 0
    assert tier.card.chats
    assert 0 < tier.count_tokens(ASKED) < tier.card.context


def test_an_answer_ends_once_with_the_reason(tier: Tier) -> None:
    tokens = said(tier)
    assert 0 < len(tokens) <= LIMITS.max_tokens
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert tokens[-1].finish_reason in {"stop", "length"}
    (only,) = said(tier, Limits(max_tokens=1))
    assert only.finish_reason == "length"


def test_tokens_say_how_sure_they_are(tier: Tier) -> None:
    for token in said(tier):
        assert -math.inf < token.logprob <= 1e-6
        assert 0 <= token.margin <= 1
        assert len(token.top) == LIMITS.top_logprobs
        assert token.draft is None, "there was none"


def test_the_same_question_has_the_same_answer(tier: Tier) -> None:
    for limits in (LIMITS, replace(LIMITS, temperature=1.2, top_p=0.9, seed=7)):
        assert said(tier, limits) == said(tier, limits)


@pytest.mark.parametrize("prompt", [Chat(({"role": "user", "content": "the " * 2000},)), Completion("the " * 2000)])
def test_what_is_too_long_is_refused_before_the_first_token(tier: Tier, prompt: Prompt) -> None:
    with pytest.raises(PromptTooLongError):
        tier.generate(prompt, LIMITS)


def test_nothing_is_no_prompt(tier: Tier) -> None:
    with pytest.raises(PromptError):
        tier.generate(Completion(""), LIMITS)


def test_a_skill_is_answered_by_a_frame_or_refused(tier: Tier) -> None:
    if tier.card.skills is None:
        with pytest.raises(PromptError, match="has no skills"):
            tier.generate(SkillQuery("lamp", "switch it"), LIMITS)
        return
    for skill in tier.card.skills.skills:
        frame = json.loads(text_of(said(tier, prompt=SkillQuery(skill.name, "switch it"))))
        assert frame["intent"] in skill.intents
        assert set(frame) == {"intent", "slots"}


def test_alternatives_are_reported_best_first(tier: Tier) -> None:
    for token in said(tier):
        assert [p for _, p in token.top] == sorted((p for _, p in token.top), reverse=True)


def test_it_says_no_more_than_there_is_room_for(real: Tier) -> None:
    long = Completion("b" * 90)
    assert len(said(real, Limits(max_tokens=50), long)) <= SHAPE.context - real.count_tokens(long)


def test_a_form_is_kept_to(real: Tier) -> None:
    form = JsonForm('{"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}')
    assert set(json.loads(text_of(said(real, Limits(max_tokens=40, json=form))))) <= {"a", "b"}


def test_a_stop_string_is_not_shown(real: Tier) -> None:
    text = text_of(said(real, SEEDED))
    assert len(text) > 3
    tokens = said(real, replace(SEEDED, stop=(text[2:4],)))
    assert text_of(tokens) == text[: text.find(text[2:4])]
    assert tokens[-1].finish_reason == "stop"


def test_nobody_waits(real: Tier) -> None:
    with pytest.raises(AbandonedError):
        said(real, Limits(gone=lambda: True))
    assert said(real)


@pytest.fixture(scope="module")
def exact_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp32")
    source = GgufSource(write_gguf(folder / "tiny.gguf"))
    adapter = write_adapter(folder / "adapter", source)
    write_exits(adapter, *random_exits(thresholds={}))  # which no skill may leave by
    build(source, folder / "tier", "fp32", adapter, quiet)
    return folder / "tier"


@pytest.mark.parametrize("name", [*REAL, *FP32])
def test_in_fp32_it_says_what_the_whole_says(exact_path: Path, name: str) -> None:
    alone = LocalTier.open(exact_path, "edge", threads=1)
    with {**TIERS, **FP32}[name](exact_path) as tier:
        for prompt in (ASKED, Completion("the then he"), Completion("b" * 80), SkillQuery("radio", "play it")):
            wanted = [(token.id, token.text) for token in said(alone, prompt=prompt)]
            assert [(token.id, token.text) for token in said(tier, prompt=prompt)] == wanted


def test_answers_that_are_left_leave_their_place(tier: Tier) -> None:
    for _ in range(8):
        with closing(tier.generate(ASKED, LIMITS)) as tokens:  # type: ignore[type-var]
            next(tokens)
    assert said(tier)


def test_several_at_once_answer_as_alone(tier: Tier) -> None:
    alone = said(tier)
    with ThreadPoolExecutor(3) as pool:
        together = list(
            pool.map(lambda n: said(tier, replace(LIMITS, draft=text_of(alone) if n % 2 else "")), range(6))
        )
    assert [text_of(tokens) for tokens in together] == [text_of(alone)] * 6


@pytest.mark.parametrize("draft", ["own", "the then", "\n {", "own and more"])
def test_a_draft_does_not_show_in_the_answer(tier: Tier, draft: str) -> None:
    alone, before = said(tier), tier.stats()
    drafted = said(tier, replace(LIMITS, draft=draft.replace("own", text_of(alone))))
    assert text_of(drafted) == text_of(alone)
    assert drafted[-1].finish_reason == alone[-1].finish_reason
    use, after = drafted[-1].draft, tier.stats()
    if use is not None:
        assert 0 <= use.accepted <= use.proposed
    if not isinstance(tier, FakeTier):
        counted = after.draft_proposed_tokens - before.draft_proposed_tokens
        assert counted == (use or DraftUse()).proposed
        assert after.draft_accepted_tokens - before.draft_accepted_tokens == (use or DraftUse()).accepted


# ---- what tiers over the same passes have in common ----


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("draft", ["", "own", "the then"])
def test_a_draft_is_read_by_the_same_passes_wherever_it_is_cut(
    tiers: Callable[[str], Tier], name: str, draft: str
) -> None:
    """So that even without exact drafts, where a draft may change a rounding, a cut changes none."""
    reference = tiers("whole")
    for limits in (LIMITS, replace(LIMITS, temperature=1.0, seed=3), replace(LIMITS, json=FORM)):
        drafted = replace(limits, draft=draft.replace("own", text_of(said(reference, limits))))
        assert said(tiers(name), drafted) == said(reference, drafted)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    draft=st.text("the 'Zé{\n", max_size=30),
    keep=st.integers(0, 40),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("e",), ("t", "zz")]),
    form=st.sampled_from([None, FORM]),
    max_tokens=st.integers(1, 30),
    name=st.sampled_from(sorted(EXACTLY_ALIKE)),
)
def test_with_exact_drafts_no_draft_and_no_cut_changes_a_bit(
    tiers: Callable[[str], Tier], draft: str, keep: int, form: JsonForm | None, name: str, **how: object
) -> None:
    """Right, wrong, empty and too long drafts, with lookups, drawn and formed answers."""
    limits = Limits(json=form, top_logprobs=2, **how)  # type: ignore[arg-type]
    alone = said(tiers("exact"), limits)
    found = said(tiers(name), replace(limits, draft=text_of(alone)[:keep] + draft))
    assert bare(found) == alone
