"""Reading frames out of label logits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.build import grammar
from models.build.datasets import skill_set
from models.errors import ArtifactError
from models.runtime import frames
from models.runtime.confidence import Confidence, features
from models.skills import OUT_OF_SCOPE

SKILLS = skill_set(grammar.make(200, seed=1))
ROOM, DESK = SKILLS["room"], SKILLS["desk"]
LOGITS = st.floats(-30, 30, width=32)


@given(arrays(np.float32, SKILLS.n_rows, elements=LOGITS))
def test_the_choice_is_the_best_row_of_its_own_skill(logits: np.ndarray) -> None:
    choice = frames.intent(logits, SKILLS, "desk")
    own = logits[SKILLS.intent_rows("desk")]
    assert own[DESK.intents.index(choice.label)] == pytest.approx(own.max(), abs=1e-6)
    assert choice.logprob <= 0
    assert 0 <= choice.margin <= 1


@given(arrays(np.float32, len(DESK.intents), elements=LOGITS), st.floats(-5, 5), st.floats(-30, 30))
def test_rejecting_more_readily_only_ever_turns_answers_into_rejections(
    scores: np.ndarray, bias: float, floor: float
) -> None:
    mild = frames.choose_intent(scores, DESK, frames.IntentRule(bias, floor)).label
    strict = frames.choose_intent(scores, DESK, frames.IntentRule(bias + 1, floor + 1)).label
    assert strict in {mild, OUT_OF_SCOPE}


def test_a_query_with_low_logits_everywhere_falls_under_the_floor() -> None:
    scores = np.array([0.3, 0.1, 0.0, 0.2], np.float32)
    assert frames.choose_intent(scores, DESK, frames.IntentRule(0.0, 5.0)).label == OUT_OF_SCOPE
    assert frames.choose_intent(scores + 20, DESK, frames.IntentRule(0.0, 5.0)).label == DESK.intents[0]


def test_the_prior_is_taken_off_before_the_choice() -> None:
    scores = np.zeros(len(DESK.intents))
    scores[0] = 1.0
    prior = (2.0, *[0.0] * (len(DESK.intents) - 1))
    rule = frames.IntentRule.from_manifest({"desk": {"prior": list(prior)}}, DESK)
    assert rule.prior == prior
    with pytest.raises(ArtifactError, match="'prior' has 1 values"):
        frames.IntentRule.from_manifest({DESK.name: {"prior": [0.5]}}, DESK)
    assert frames.choose_intent(scores, DESK, rule).label == DESK.intents[1]
    assert frames.choose_intent(scores, DESK).label == DESK.intents[0]


@given(arrays(np.float32, st.tuples(st.integers(1, 9), st.just(len(ROOM.tags))), elements=LOGITS))
def test_tags_obey_bio_and_the_slots_of_the_intent(logits: np.ndarray) -> None:
    found = [choice.label for choice in frames.tags(logits, ROOM, "Switch")]
    assert len(found) == len(logits)
    for before, tag in zip(["O", *found], found, strict=False):
        assert tag == "O" or tag[2:] in ROOM.slots["Switch"]
        assert not tag.startswith("I-") or before[2:] == tag[2:]


def brute_force(logits: np.ndarray, names: tuple[str, ...]) -> float:
    """Best total of any path that BIO allows, by trying all of them."""
    best = {tag: float(s) if not tag.startswith("I-") else -1e9 for tag, s in zip(names, logits[0], strict=True)}
    for row in logits[1:]:
        best = {
            tag: float(s) + max(v for old, v in best.items() if not tag.startswith("I-") or old[2:] == tag[2:])
            for tag, s in zip(names, row, strict=True)
        }
    return max(best.values())


@given(arrays(np.float32, (4, len(ROOM.tags)), elements=st.floats(-5, 5, width=32)))
def test_the_path_is_the_best_that_the_rules_allow(logits: np.ndarray) -> None:
    closed = [i for i, n in enumerate(ROOM.tags) if n != "O" and n[2:] not in ROOM.slots["SetLevel"]]
    scores = frames.log_softmax(np.where(np.isin(np.arange(len(ROOM.tags)), closed), -1e9, logits.astype(float)))
    total = sum(choice.logprob for choice in frames.tags(logits, ROOM, "SetLevel"))
    assert total == pytest.approx(brute_force(scores, ROOM.tags), abs=1e-6)


def test_features_of_one_step_hold_constants_for_tags() -> None:
    one = features([frames.Choice("x", -0.1, 0.8)])
    assert one[1:] == (0.8, pytest.approx(13.8155, abs=1e-3), 0.0, 1.0, 0.0, 0.0)


def test_a_tier_without_calibration_claims_no_confidence_and_never_stays_local() -> None:
    nothing = Confidence.from_manifest({})
    assert nothing.final("desk", "refund", [frames.Choice("refund", -0.1, 0.8)]) is None
    assert nothing.threshold("desk") == 1.0
