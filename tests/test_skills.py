"""Skills: label rows, prompts and the way from tags to slots."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.build import grammar
from models.build.datasets import skill_set
from models.errors import DataError, PromptError
from models.skills import OUTSIDE, Frame, SkillSet, encode, slots_from_tags, split_words

SKILLS = skill_set(grammar.make(200, seed=1))


def test_rows_of_all_skills_tile_the_head_without_gaps() -> None:
    at = 0
    for name in SKILLS.names:
        intents, tags = SKILLS.intent_rows(name), SKILLS.tag_rows(name)
        assert (intents.start, intents.stop) == (at, tags.start)
        at = tags.stop
    assert at == SKILLS.n_rows == len(SKILLS.row_names())


def test_a_skill_set_survives_its_manifest_form() -> None:
    assert SkillSet.from_dict(SKILLS.as_dict()) == SKILLS


def test_a_malformed_skill_is_named() -> None:
    with pytest.raises(DataError, match="'room'"):
        SkillSet.from_dict({"room": {"slots": {}}})


def test_an_unknown_skill_is_refused_with_the_field_and_the_choices() -> None:
    with pytest.raises(PromptError, match="desk, room") as caught:
        SKILLS.index("chess")
    assert caught.value.field == "skill"


def test_prompt_puts_the_skill_first_the_answer_last_and_marks_the_end_of_each_word() -> None:
    prompt = encode(SKILLS, "room", "Stop the Kettle.", lambda word: [ord(c) for c in word], vocab_size=1000)
    assert prompt.words == ("Stop", "the", "Kettle")
    assert prompt.ids[0] == 1000 + SKILLS.index("room")
    assert prompt.ids[-1] == 1000 + len(SKILLS.skills)
    assert prompt.ids[1:-1] == prompt.echo
    assert [chr(prompt.echo[end]) for end in prompt.word_ends] == ["p", "e", "e"]


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_utterance_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="empty"):
        encode(SKILLS, "room", text, lambda _: [1], vocab_size=10)


def test_a_slot_that_occurs_twice_becomes_a_list_in_order() -> None:
    words = ["from", "oslo", "to", "bergen", "by", "way", "of", "red", "lake"]
    tags = ["O", "B-city", "O", "B-city", "O", "O", "O", "B-city", "I-city"]
    assert slots_from_tags(words, tags) == {"city": ["oslo", "bergen", "red lake"]}


@given(st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"]), max_size=12))
def test_every_labelled_word_lands_in_exactly_one_slot(tags: list[str]) -> None:
    words = [f"w{i}" for i in range(len(tags))]
    values = [
        v for value in slots_from_tags(words, tags).values() for v in (value if isinstance(value, list) else [value])
    ]
    kept = [word for value in values for word in value.split()]
    assert sorted(kept) == sorted(w for w, t in zip(words, tags, strict=True) if t != OUTSIDE)


@given(st.text(max_size=60))
def test_words_never_hold_white_space_and_are_never_empty(text: str) -> None:
    assert all(word and not any(c.isspace() for c in word) for word in split_words(text))


def test_frames_with_equal_content_are_equal() -> None:
    assert Frame("x", {"a": "1"}) == Frame("x", {"a": "1"}) != Frame("x", {"a": "2"})
