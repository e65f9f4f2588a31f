"""One contract for every tier: whole, in shards, in ranks, in ranks over links, and the fake that other tests use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.errors import AbandonedError, PromptError, PromptTooLongError
from models.runtime.local import LocalTier
from models.runtime.tier import Chat, Completion, JsonForm, Limits, SkillQuery, Tier, Token
from tests import rank_rigs, shard_rigs
from tests.fakes import FakeTier, card
from tests.tiny_models import SHAPE, quiet, write_adapter, write_gguf

N = SHAPE.n_layers
HE = Chat(({"role": "user", "content": "he"},))
SHORT = Limits(max_tokens=8)
SEEDED = Limits(max_tokens=10, temperature=0.9, seed=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tier")
    source = GgufSource(write_gguf(folder / "tiny.gguf"))
    build(source, folder / "tier", "fp32", write_adapter(folder / "adapter", source), quiet)
    return folder / "tier"


MAKERS: dict[str, Callable[[Path, ExitStack], Tier]] = {
    "whole": lambda path, _: LocalTier.open(path, "edge", threads=1),
    "shards": lambda path, _: shard_rigs.in_process(path, (0, 1, N)),
    "shards over links": lambda path, stack: stack.enter_context(shard_rigs.linked(path, (0, 2, N))).tier,
    "2 ranks": lambda path, stack: stack.enter_context(rank_rigs.in_threads(path, 2)),
    "4 ranks": lambda path, stack: stack.enter_context(rank_rigs.in_threads(path, 4)),
    "2 ranks over links": lambda path, stack: stack.enter_context(rank_rigs.linked(path, 2)).tier,
    "3 ranks over links": lambda path, stack: stack.enter_context(rank_rigs.linked(path, 3)).tier,
}


@pytest.fixture(scope="module", params=MAKERS)
def real(request: pytest.FixtureRequest, path: Path) -> Iterator[Tier]:
    with ExitStack() as stack:
        yield MAKERS[request.param](path, stack)


@pytest.fixture(scope="module", params=[*MAKERS, "fake"])
def tier(request: pytest.FixtureRequest, path: Path) -> Iterator[Tier]:
    with ExitStack() as stack:
        yield FakeTier(card("edge")) if request.param == "fake" else MAKERS[request.param](path, stack)


def skill_of(tier: Tier) -> str:
    assert tier.card.skills is not None
    return tier.card.skills.skills[0].name


def answer(tier: Tier, prompt: Any, limits: Limits = SHORT) -> list[Token]:
    return list(tier.generate(prompt, limits))


def test_it_says_what_it_is(tier: Tier) -> None:
    said = tier.card
    assert (said.name, said.chats) == ("edge", True)
    assert said.context > 0
    assert said.model_id
    assert said.model_version
    assert tier.count_tokens(HE) > 0
    tier.stats()


def test_the_last_token_and_no_other_says_why_it_ended(tier: Tier) -> None:
    for prompt in (HE, SkillQuery(skill_of(tier), "switch it")):
        tokens = answer(tier, prompt)
        assert tokens[-1].finish_reason in {"stop", "length"}
        assert all(token.finish_reason is None for token in tokens[:-1])
        assert all(token.logprob <= 0 and 0 <= token.margin <= 1 for token in tokens)


def test_a_skill_is_answered_with_a_frame(tier: Tier) -> None:
    tokens = answer(tier, SkillQuery(skill_of(tier), "switch it"))
    assert set(json.loads("".join(token.text for token in tokens))) == {"intent", "slots"}


def test_bad_prompts_are_refused_before_the_first_token(real: Tier) -> None:
    with pytest.raises(PromptTooLongError):
        real.generate(Completion("b" * 200), Limits())
    with pytest.raises(PromptError):
        real.generate(Completion(""), Limits())
    with pytest.raises(PromptError):
        real.generate(SkillQuery("wizardry", "hi"), Limits())


def test_it_says_no_more_than_it_may(real: Tier) -> None:
    assert len(answer(real, Completion("the"), Limits(max_tokens=3))) <= 3
    long = answer(real, Completion("b" * 90), Limits(max_tokens=50))
    assert len(long) <= SHAPE.context - real.count_tokens(Completion("b" * 90))


def test_a_seed_gives_the_same_answer_alone_and_in_company(real: Tier) -> None:
    wanted = answer(real, HE, SEEDED)
    with ThreadPoolExecutor(5) as pool:
        assert all(tokens == wanted for tokens in pool.map(lambda _: answer(real, HE, SEEDED), range(10)))


def test_alternatives_are_reported_best_first(real: Tier) -> None:
    for token in answer(real, HE, Limits(max_tokens=4, top_logprobs=3)):
        assert [p for _, p in token.top] == sorted((p for _, p in token.top), reverse=True)
        assert len(token.top) == 3


def test_a_form_is_kept_to(real: Tier) -> None:
    form = JsonForm('{"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}')
    text = "".join(token.text for token in answer(real, HE, Limits(max_tokens=40, json=form)))
    assert set(json.loads(text)) <= {"a", "b"}


def test_a_stop_string_is_not_shown(real: Tier) -> None:
    text = "".join(token.text for token in answer(real, HE, SEEDED))
    assert len(text) > 3
    tokens = answer(real, HE, Limits(**{**vars(SEEDED), "stop": (text[2:4],)}))
    assert "".join(token.text for token in tokens) == text[: text.find(text[2:4])]
    assert tokens[-1].finish_reason == "stop"


def test_an_answer_that_is_closed_frees_its_session(tier: Tier) -> None:
    for _ in range(8):  # more than there are sessions
        with closing(tier.generate(HE, SEEDED)) as tokens:  # type: ignore[type-var]
            next(tokens)
    assert answer(tier, HE, SEEDED)


def test_nobody_waits(real: Tier) -> None:
    with pytest.raises(AbandonedError):
        answer(real, HE, Limits(gone=lambda: True))
    assert answer(real, HE)


@pytest.fixture(scope="module")
def whole(path: Path) -> Tier:
    return LocalTier.open(path, "edge", threads=1)


@pytest.mark.parametrize(
    "prompt", [HE, Completion("the then he"), Completion("b" * 80), SkillQuery("radio", "play it")]
)
def test_in_fp32_it_says_what_the_whole_says(real: Tier, whole: Tier, prompt: Any) -> None:
    limits = Limits(max_tokens=12)
    assert [(t.id, t.text) for t in answer(real, prompt, limits)] == [
        (t.id, t.text) for t in answer(whole, prompt, limits)
    ]
