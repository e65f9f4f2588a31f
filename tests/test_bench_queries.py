"""The project's own queries: enough, varied, honest, and nobody else's sentences."""

import json
from pathlib import Path

import pytest

from bench.queries import OUT_OF_SCOPE, OWN_QUERIES, count_by_skill, read
from models.build.datasets import SPLITS, load, skill_set

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (SHARED / "clinc150").is_dir(), reason="the published sets are not beside the repository"
)


@pytest.fixture(scope="module")
def queries():
    return read(OWN_QUERIES)


def test_there_are_three_hundred_over_three_skills_with_out_of_scope_among_them(queries):
    assert len(queries) >= 300
    assert min(count_by_skill(queries).values()) >= 80
    assert set(count_by_skill(queries)) == {"assistant", "home", "banking"}
    outside = sum(q.intent == OUT_OF_SCOPE for q in queries) / len(queries)
    assert 0.12 <= outside <= 0.18
    assert len({q.text for q in queries}) == len(queries)


def test_slot_texts_stand_in_their_sentence(queries):
    assert any(q.slots for q in queries)
    for query in queries:
        assert query.skill == "home" or not query.slots
        for value in query.slots.values():
            assert value in query.text


def test_each_line_is_plain_json():
    for line in OWN_QUERIES.read_text("utf-8").splitlines():
        assert set(json.loads(line)) <= {"skill", "text", "intent", "slots"}


@needs_data
def test_labels_are_those_of_the_sets_and_no_sentence_is_theirs(queries):
    skills = skill_set(load(SHARED, "train"))
    theirs = {plain(e.text) for split in SPLITS for e in load(SHARED, split)}
    for query in queries:
        assert query.intent in skills[query.skill].intents
        assert set(query.slots) <= set(skills[query.skill].slots.get(query.intent, ()))
        assert plain(query.text) not in theirs


def plain(text):
    return " ".join("".join(c for c in text.lower() if c.isalnum() or c == " ").split())
