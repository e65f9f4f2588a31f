"""Loading, augmenting and batching examples."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from models.build import grammar
from models.build.augment import Crossing, Neighbours, SlotSwapper, spans
from models.build.batches import Encoder, add_noise, batches
from models.build.datasets import Example, load, log_prior, skill_set
from models.build.tokenizers import byte_level_bpe, cut_vocabulary
from models.errors import DataError
from models.skills import OUT_OF_SCOPE, Skill

DATA = Path(__file__).parents[2] / "shared" / "data"
EXAMPLES = grammar.make(300, seed=2)
SKILLS = skill_set(EXAMPLES)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("o", "n"), ("l", "a"), ("la", "m"), ("lam", "p")]
    return byte_level_bpe([*alphabet, *[a + b for a, b in merges]], merges, (), "smollm")


def test_missing_data_is_one_sentence_that_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.json is missing"):
        load(tmp_path, "train")


def test_malformed_data_names_the_skill(tmp_path: Path) -> None:
    (tmp_path / "clinc150").mkdir()
    (tmp_path / "clinc150" / "data.json").write_text("{}")
    with pytest.raises(DataError, match="'assistant'"):
        load(tmp_path, "train", ["assistant"])


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")
def test_the_real_sets_have_their_published_sizes_and_disjoint_splits() -> None:
    train, held, test = (load(DATA, split) for split in ("train", "validation", "test"))
    assert [sum(e.skill == s for e in train) for s in ("assistant", "home")] == [15100, 13084]
    assert sum(e.skill == "banking" for e in [*train, *held]) == 10003
    assert not {e.text for e in train if e.skill == "banking"} & {e.text for e in held if e.skill == "banking"}
    assert len(skill_set(train)["assistant"].intents) == 151
    assert len(test) == 2250 + 500 + 350 + 1540


def test_the_prior_of_an_intent_is_how_often_it_was_seen_against_the_mean() -> None:
    desk = Skill("desk", ("rare", "often", "never", OUT_OF_SCOPE))
    seen = [Example("desk", "w", intent) for intent in ("rare", "often", "often", "often", *[OUT_OF_SCOPE] * 9)]
    assert log_prior(desk, seen) == pytest.approx([math.log(0.5), math.log(1.5), 0.0, 0.0])


def test_swapping_slots_keeps_intent_and_order_of_labels() -> None:
    swapper, rng = SlotSwapper(EXAMPLES), random.Random(1)
    for example in (e for e in EXAMPLES if e.tags):
        swapped = swapper.swap(example, 1.0, rng)
        assert [n for n, _ in spans(swapped)] == [n for n, _ in spans(example)]
        assert len(swapped.text.split()) == len(swapped.tags)
        assert swapped.intent == example.intent


def test_crossing_joins_siblings_only() -> None:
    crossing, rng = Crossing(EXAMPLES), random.Random(1)
    example = next(e for e in EXAMPLES if e.intent == "parking")
    vocabulary = {w for e in EXAMPLES if e.intent == "parking" for w in e.text.split()}
    assert all(set(crossing.cross(example, rng).text.split()) <= vocabulary for _ in range(20))


def test_neighbours_replace_unlabelled_words_only(tokenizer: Tokenizer) -> None:
    table = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 4)).astype(np.float32)
    near = Neighbours(["the", "t", "x"], tokenizer, table, least=-1.0)
    example = Example("room", "the lamp the", "Switch", ("O", "B-thing", "B-thing"))
    words = near.replace(example, 1.0, random.Random(3)).text.split()
    assert words[0] != "the"
    assert words[1:] == ["lamp", "the"]


def test_a_cut_tokenizer_is_byte_safe_and_knows_its_source_ids(tokenizer: Tokenizer) -> None:
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    small, taken = cut_vocabulary(tokenizer, [" the"] * 5 + ["lamp"], 259)
    assert small.get_vocab_size() == len(taken) == 259
    assert [vocab[i] for i in taken] == [small.id_to_token(i) for i in range(259)]
    assert small.encode(" the").tokens == ["Ġthe"]
    assert small.decode(small.encode(" thé läмp 灯").ids) == " thé läмp 灯"


def test_batches_hold_every_row_once_within_the_budget(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, SKILLS, tokenizer.get_vocab_size())
    rows = [encoder.row(e, key) for key, e in enumerate(EXAMPLES)]
    made = list(batches(rows, 400, random.Random(5)))
    assert sorted(k for b in made for k in b.keys) == list(range(len(EXAMPLES)))
    assert all(b.ids.size <= 400 or len(b.ids) == 1 for b in made)


def test_tags_are_read_at_the_last_token_of_each_echoed_word(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, SKILLS, tokenizer.get_vocab_size())
    example = next(e for e in EXAMPLES if e.tags)
    row = encoder.row(example)
    pieces = [tokenizer.decode([row.ids[at]]) for at in row.tag_at]
    assert all(word.endswith(piece.strip()) for word, piece in zip(example.text.split(), pieces, strict=True))


def test_noise_is_the_same_in_both_copies_and_spares_the_frame_of_the_prompt(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab_size()
    encoder = Encoder(tokenizer, SKILLS, vocab)
    batch = next(iter(batches([encoder.row(e) for e in EXAMPLES if e.tags], 300)))
    noisy = add_noise(batch, 0.5, vocab, np.random.default_rng(0))
    assert (noisy.ids != batch.ids).any()
    for ids, at in zip(noisy.ids, noisy.answer_at, strict=True):
        assert ids[0] >= vocab
        assert ids[at] >= vocab
        assert list(ids[1:at]) == list(ids[at + 1 : 2 * at])
