"""Drafts on the engine: bit for bit the logits of one token at a time, where products treat each row alike."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.artifact.names import LOGITS_FROM
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.build.pack import PackedModel, pack
from models.errors import AbandonedError, PromptTooLongError
from models.runtime.engine import CHUNK, Decoder, Embeddings
from models.runtime.local import LocalTier
from models.runtime.sessions import EngineOptions, Segment
from models.runtime.tier import Chat, Completion, DraftUse, JsonForm, Limits, Token, Tool, ToolUse
from tests.tiny_models import NARROW_HEADS, SHAPE, quiet, write_gguf

LONG = replace(SHAPE, context=512)
FORM = JsonForm('{"type": "array", "items": {"enum": ["abc", "b"]}, "minItems": 2, "maxItems": 6}')
PROMPT = Completion("the then that")


@pytest.fixture(scope="module", params=["fp32", "int4", "int8", "narrow heads"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    narrow = request.param == "narrow heads"
    shape = replace(NARROW_HEADS, context=512) if narrow else LONG
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", shape=shape)
    return pack(GgufSource(path), "fp32" if narrow else request.param, None, quiet)


def decoder(packed: PackedModel, **options: int) -> Decoder:
    embeddings = Embeddings(packed.embeddings(), None, packed.shape.width)
    given_options = EngineOptions(threads=1, context=packed.shape.context, exact_drafts=True, **options)
    return Decoder(packed.shape, packed.segments("plain"), embeddings, given_options)


def some_ids(count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 200, count)]


def one_by_one(engine: Decoder, prompt: Sequence[int], draft: Sequence[int]) -> list[np.ndarray]:
    with engine.sequence() as sequence:
        return [sequence.logits(ids).copy() for ids in (prompt, *([i] for i in draft))]


@pytest.mark.parametrize(
    ("n_prompt", "n_draft"), [(1, 1), (1, 9), (1, 16), (3, 14), (7, 30), (129, 20), (CHUNK - 3, 12), (300, 1)]
)
def test_a_verified_draft_gives_the_logits_of_each_position(packed: PackedModel, n_prompt: int, n_draft: int) -> None:
    engine, ids = decoder(packed), some_ids(n_prompt + n_draft)
    prompt, draft = ids[:n_prompt], ids[n_prompt:]
    wanted = one_by_one(engine, prompt, draft)
    with engine.sequence() as sequence:
        found = sequence.verify(prompt, draft)
        assert sequence.length == n_prompt + n_draft
        assert np.array_equal(found, wanted)


def test_a_sequence_goes_on_from_where_it_was_rewound_to(packed: PackedModel) -> None:
    engine, ids, wrong = decoder(packed), some_ids(40), some_ids(20, seed=1)
    wanted = one_by_one(engine, ids[:10], ids[10:])
    with engine.sequence() as sequence:
        sequence.verify(ids[:10], [*ids[10:15], *wrong])
        sequence.rewind(15)
        assert np.array_equal(sequence.verify(ids[15:16], wrong[:3])[0], wanted[6])
        sequence.rewind(16)
        assert np.array_equal(sequence.logits(ids[16:17]), wanted[7])
        assert np.array_equal(sequence.verify(ids[17:18], ids[18:])[-1], wanted[-1])


def test_a_draft_after_a_cached_prompt_is_the_same(packed: PackedModel) -> None:
    engine, ids = decoder(packed, prefix_cache_bytes=1 << 24), some_ids(150)
    wanted = one_by_one(decoder(packed), ids[:129], ids[129:])
    for _ in range(2):
        with engine.sequence() as sequence:
            assert np.array_equal(sequence.verify(ids[:129], ids[129:]), wanted)
    assert engine.prefixes is not None
    assert engine.prefixes.stats.reused_tokens == 128


def test_without_exact_drafts_the_model_is_the_same_but_for_rounding(packed: PackedModel) -> None:
    """Attention rounds otherwise for one token; in 8 bits the activations then round otherwise too."""
    exact = decoder(packed)
    plain = Decoder(
        packed.shape, packed.segments("plain"), exact.embeddings, EngineOptions(threads=1, context=packed.shape.context)
    )
    ids = some_ids(30)
    for a, b in zip(one_by_one(exact, ids[:9], ids[9:]), one_by_one(plain, ids[:9], ids[9:]), strict=True):
        assert np.abs(a - b).max() < 0.1 * a.std()


def test_a_draft_that_does_not_fit_is_refused(packed: PackedModel) -> None:
    with decoder(packed).sequence() as sequence, pytest.raises(PromptTooLongError):
        sequence.verify(some_ids(500), some_ids(20))


def test_a_sequence_knows_whether_it_is_alone(packed: PackedModel) -> None:
    engine = decoder(packed, sequences=2)
    with engine.sequence() as first:
        assert first.alone
        with engine.sequence() as second:
            assert not first.alone
            assert not second.alone
        assert first.alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edge")
    build(GgufSource(write_gguf(folder / "tiny.gguf", shape=LONG)), folder / "edge", "int4", None, quiet)
    return folder / "edge"


@pytest.fixture(scope="module")
def tier(folder: Path) -> LocalTier:
    return LocalTier.open(folder, "edge", threads=1, exact_drafts=True)


@pytest.fixture(scope="module")
def looking(folder: Path) -> LocalTier:
    """The same, which looks up what was said before."""
    return LocalTier.open(folder, "edge", threads=1, exact_drafts=True, lookup_tokens=4, prefix_cache_bytes=1 << 22)


def answer(tier: LocalTier, limits: Limits, prompt: Chat | Completion = PROMPT) -> list[Token]:
    return list(tier.generate(prompt, limits))


def bare(tokens: Sequence[Token]) -> list[Token]:
    """Without what came of the draft."""
    return [replace(token, draft=None) for token in tokens]


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    draft=st.text("the 'Zé{\n", max_size=30),
    keep=st.integers(0, 40),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("e",), ("t", "zz")]),
    form=st.sampled_from([None, FORM]),
    max_tokens=st.integers(1, 40),
)
def test_an_answer_is_the_same_with_any_draft(
    tier: LocalTier, looking: LocalTier, draft: str, keep: int, max_tokens: int, form: JsonForm | None, **how: object
) -> None:
    """A draft is the answer's own beginning and then anything; nothing in the answer tells of it."""
    limits = Limits(max_tokens=max_tokens, json=form, **how)  # type: ignore[arg-type]
    alone = answer(tier, limits)
    drafted = replace(limits, draft=text_of(alone)[:keep] + draft)
    assert bare(answer(tier, drafted)) == alone
    assert bare(answer(looking, drafted)) == alone
    assert bare(answer(looking, limits)) == alone


def test_a_right_draft_is_taken_and_saves_passes(tier: LocalTier) -> None:
    """In JSON tokens are forced whose text the tokenizer cuts alike, so that a text says its ids."""
    limits = Limits(max_tokens=60, json=FORM)
    alone, before = answer(tier, limits), tier.stats()
    *_, last = answer(tier, replace(limits, draft=text_of(alone)))
    after = tier.stats()
    assert last.draft is not None
    assert last.draft.accepted > 5
    assert last.draft.accepted >= last.draft.proposed - 1, "the last one needs no further pass"
    assert after.draft_accepted_tokens - before.draft_accepted_tokens == last.draft.accepted
    assert after.draft_proposed_tokens - before.draft_proposed_tokens == last.draft.proposed


def test_what_breaks_the_form_is_not_looked_at(tier: LocalTier) -> None:
    (*_, last) = answer(tier, Limits(max_tokens=60, json=FORM, draft="Once upon a time there was"))
    assert last.draft == DraftUse(0, 0)


def test_a_call_of_a_function_can_be_drafted(tier: LocalTier) -> None:
    limits = Limits(max_tokens=120, tools=ToolUse((Tool("lamp"),), required=True, parallel=False))
    alone = answer(tier, limits)
    drafted = answer(tier, replace(limits, draft=text_of(alone)))
    assert bare(drafted) == alone
    assert text_of(drafted).startswith("<tool_call>")


def test_lookups_are_counted(looking: LocalTier) -> None:
    answer(looking, Limits(max_tokens=60), Completion("the then the then the then"))
    stats = looking.stats()
    assert stats.lookup_proposed_tokens >= stats.lookup_accepted_tokens >= 0
    assert stats.lookup_proposed_tokens > 0


def test_drafts_and_others_share_a_tier(looking: LocalTier, tier: LocalTier) -> None:
    prompts = [Completion(f"the {'then ' * n}") for n in range(8)]
    alone = [answer(tier, Limits(max_tokens=30), prompt) for prompt in prompts]
    limits = [Limits(max_tokens=30, draft=text_of(said) if n % 2 else "") for n, said in enumerate(alone)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda at: answer(looking, limits[at], prompts[at]), range(8)))
    assert [bare(tokens) for tokens in together] == alone


def test_closing_a_drafted_answer_frees_its_sequence(folder: Path) -> None:
    tier = LocalTier.open(folder, "edge", threads=1, sequences=1, lookup_tokens=4)
    for _ in range(3):
        tokens = tier.generate(PROMPT, Limits(draft="the then"))
        next(tokens)
        tokens.close()  # type: ignore[attr-defined]
    assert tier.stats().draft_proposed_tokens > 0
    with pytest.raises(AbandonedError):
        answer(tier, Limits(draft="the then", gone=lambda: True))
    assert answer(tier, Limits(max_tokens=4))


def test_a_draft_in_a_full_context_is_cut(folder: Path) -> None:
    tier = LocalTier.open(folder, "edge", threads=1, exact_drafts=True, context=16)
    alone = answer(tier, Limits(max_tokens=50))
    assert alone[-1].finish_reason == "length"
    assert bare(answer(tier, Limits(max_tokens=50, draft=text_of(alone) + "the" * 50))) == alone


def test_a_graph_of_before_drafts_answers_without(packed: PackedModel) -> None:
    """Such a graph gives the last position's logits only."""

    def older(segment: Segment) -> Segment:
        model = onnx.load_from_string(segment.graph)
        kept = [given for given in model.graph.input if given.name != LOGITS_FROM]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), LOGITS_FROM))
        return replace(segment, graph=model.SerializeToString())

    new = decoder(packed)
    old = Decoder(packed.shape, map(older, packed.segments("plain")), new.embeddings, new.options)
    assert (old.layers.verifies, new.layers.verifies) == (False, True)
    ids = some_ids(12)
    assert np.array_equal(one_by_one(old, ids[:5], ids[5:]), one_by_one(new, ids[:5], ids[5:]))
