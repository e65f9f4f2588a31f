"""Weighted voting: by example, and what holds whatever is voted."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.votes import FADE, PRIOR_BAD, PRIOR_GOOD, Ballot, Election, Outcome, Standing, learn

NODES = ("a", "b", "c", "d", "e")
EVEN = dict.fromkeys(NODES, 0.8)


def says(node: str, intent: str, confidence: float | None = 0.9, **slots: Any) -> Ballot:
    return Ballot.of_frame(node, {"intent": intent, "slots": slots}, confidence)


def held(*ballots: Ballot, nodes: int = 3, quorum: int = 2, silent: str = "") -> Outcome | None:
    election = Election(dict.fromkeys(NODES[:nodes], 0.8), quorum)
    for ballot in ballots:
        election = election.cast(ballot)
    for node in silent:
        election = election.drop(node)
    return election.outcome()


def frame_of(outcome: Outcome | None) -> Any:
    assert outcome is not None
    assert outcome.result is not None
    return outcome.result.frame


def test_two_that_agree_need_no_third() -> None:
    outcome = held(says("a", "play"), says("b", "play"))
    assert outcome is not None
    assert (outcome.reason, outcome.degraded) == ("decided", False)
    assert frame_of(outcome) == {"intent": "play", "slots": {}}


def test_one_of_three_is_not_enough() -> None:
    assert held(says("a", "play", 1.0)) is None


def test_without_the_quorum_a_settled_answer_waits_and_then_says_so() -> None:
    assert held(says("a", "play"), says("b", "play"), quorum=3) is None
    outcome = held(says("a", "play"), says("b", "play"), quorum=3, silent="c")
    assert outcome is not None
    assert (outcome.reason, outcome.degraded) == ("no_quorum", True)
    assert frame_of(outcome)["intent"] == "play"


def test_slots_are_decided_among_those_with_the_intent() -> None:
    outcome = held(
        says("a", "play", artist="abba", service="spotify"),
        says("b", "play", artist="abba"),
        says("c", "stop", artist="blur", service="spotify"),
    )
    assert frame_of(outcome) == {"intent": "play", "slots": {"artist": "abba"}}


def test_a_frame_may_be_one_that_no_node_gave() -> None:
    outcome = held(
        says("a", "play", artist="abba", year="1975"),
        says("b", "play", artist="abba", year="1976"),
        says("c", "play", artist="blur", year="1976"),
    )
    assert frame_of(outcome)["slots"] == {"artist": "abba", "year": "1976"}


def test_the_slots_keep_an_election_open_when_the_intent_is_settled() -> None:
    assert held(says("a", "play", artist="abba"), says("b", "play", artist="blur")) is None


def test_a_text_against_frames_is_one_more_answer() -> None:
    outcome = held(Ballot.of_text("a", "hello", 1.0), says("b", "play"), says("c", "play"))
    assert frame_of(outcome)["intent"] == "play"
    alone = held(Ballot.of_text("a", "hello", None), nodes=1, quorum=1)
    assert alone is not None
    assert alone.result is not None
    assert (alone.result.frame, alone.result.confidence) == (None, None)


def test_slots_may_hold_any_json() -> None:
    outcome = held(says("a", "play", at={"h": 6}, days=[1, 2]), says("b", "play", days=[1, 2], at={"h": 6}))
    assert frame_of(outcome)["slots"] == {"at": {"h": 6}, "days": [1, 2]}


def test_equal_weights_go_to_what_sorts_first() -> None:
    assert frame_of(held(says("a", "stop"), says("b", "play"), nodes=2))["intent"] == "play"
    assert frame_of(held(says("b", "stop"), says("a", "play"), nodes=2))["intent"] == "play"


def test_the_confidence_is_the_opinion_pool_of_the_weakest_field() -> None:
    outcome = held(says("a", "play", 0.9, x="1"), says("b", "play", 0.6, x="1"), says("c", "stop", 0.8))
    assert outcome is not None
    assert outcome.result is not None
    assert outcome.result.confidence == pytest.approx((0.9 + 0.6) / 3, abs=1e-5)
    split = held(says("a", "play", 0.9, x="1"), says("b", "play", 0.6, x="2"), says("c", "play", 0.8, x="1"))
    assert split is not None
    assert split.result is not None
    assert split.result.confidence == pytest.approx((0.9 + 0.8) / 3, abs=1e-5)


def test_nobody_there() -> None:
    assert held(silent="abc") == Outcome(None, "no_votes", degraded=True)
    assert Election(EVEN, 2).outcome() is None
    assert Election(EVEN, 2).outcome(expired=True) == Outcome(None, "no_votes", degraded=True)


def test_at_the_deadline_the_answer_ahead_is_flagged() -> None:
    election = Election(EVEN, 2).cast(says("a", "play")).cast(says("b", "stop", 0.95))
    assert election.outcome() is None
    outcome = election.outcome(expired=True)
    assert outcome is not None
    assert (outcome.reason, outcome.degraded, frame_of(outcome)["intent"]) == ("deadline", True, "stop")


@pytest.mark.parametrize(
    "frame", [{}, {"intent": 3}, {"intent": "a", "slots": []}, {"intent": "a", "slots": {}, "and": 1}, {"intent": None}]
)
def test_a_malformed_frame_is_no_vote(frame: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="frame"):
        Ballot.of_frame("a", frame, 0.9)


@pytest.mark.parametrize("confidence", [math.nan, -0.1, 1.1, math.inf])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        says("a", "play", confidence)


confidences = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.floats(0, 1))
slots = st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(["1", "2", ["3"]]), max_size=2)
heads = st.sampled_from(["p", "q", "r"])


@st.composite
def ballots(draw: st.DrawFn, node: str) -> Ballot:
    if draw(st.integers(0, 9)) == 0:
        return Ballot.of_text(node, draw(heads), draw(confidences))
    return Ballot.of_frame(node, {"intent": draw(heads), "slots": draw(slots)}, draw(confidences))


@st.composite
def elections(draw: st.DrawFn) -> tuple[Election, list[Ballot | str]]:
    """An empty election and what each node will do: vote, or fall silent (its name); in a drawn order."""
    nodes = NODES[: draw(st.integers(1, 5))]
    reliable = {node: draw(st.sampled_from([0.16, 0.5, 0.8, 0.96]) | st.floats(0, 1)) for node in nodes}
    acts = [node if draw(st.integers(0, 5)) == 0 else draw(ballots(node)) for node in nodes]
    return Election(reliable, draw(st.integers(1, len(nodes)))), draw(st.permutations(acts))


def after(election: Election, acts: list[Ballot | str]) -> Election:
    for act in acts:
        election = election.drop(act) if isinstance(act, str) else election.cast(act)
    return election


def decision(outcome: Outcome) -> Any:
    result = outcome.result
    return (result and (result.head, dict(result.fields)), outcome.degraded)


@given(elections())
def test_an_early_decision_is_the_decision_after_all_votes(case: tuple[Election, list[Ballot | str]]) -> None:
    election, acts = case
    last = after(election, acts).outcome()
    assert last is not None
    for count in range(len(acts)):
        early = after(election, acts[:count]).outcome()
        if early is not None:
            assert decision(early) == decision(last)


@given(elections(), st.data())
def test_it_is_not_decided_later_than_it_could_be(
    case: tuple[Election, list[Ballot | str]], data: st.DataObject
) -> None:
    """Whatever one more node says, an election that is open with one vote to come was open for a reason.

    With one node to come, `open` must mean that two of its possible votes end differently.
    """
    election, acts = case
    before = after(election, acts[:-1])
    if before.outcome() is not None or not before.ballots:
        return
    (node,) = before.pending
    seen = list(before.ballots)
    said = [Ballot(node, b.head, {**b.fields, **change}, 1.0) for b in seen for change in _changes(seen)]
    said += [Ballot(node, head, {}, 1.0) for head in ("", "~")]
    ends = {repr(decision(before.cast(ballot).outcome())) for ballot in said}  # type: ignore[arg-type]
    ends.add(repr(decision(before.drop(node).outcome())))  # type: ignore[arg-type]
    assert len(ends) > 1


def _changes(seen: list[Ballot]) -> list[dict[str, str]]:
    names = sorted({name for ballot in seen for name in ballot.fields})
    values = sorted({value for ballot in seen for value in ballot.fields.values()})
    return [{}, *({name: value} for name in names for value in (*values, '"', "~"))]


@given(elections(), st.randoms())
def test_the_order_changes_nothing(case: tuple[Election, list[Ballot | str]], random: Any) -> None:
    election, acts = case
    shuffled = list(acts)
    random.shuffle(shuffled)
    assert after(election, shuffled).outcome() == after(election, acts).outcome()


@given(elections())
def test_there_is_exactly_one_end_and_its_confidence_is_a_probability(
    case: tuple[Election, list[Ballot | str]],
) -> None:
    election, acts = case
    ends = [after(election, acts[:count]).outcome(expired=count == len(acts)) for count in range(len(acts) + 1)]
    assert ends[-1] is not None
    for end in ends:
        if end is not None and end.result is not None and end.result.confidence is not None:
            assert 0 <= end.result.confidence <= 1
            assert set(end.result.backers) <= set(election.reliability)


@given(elections(), st.data())
def test_a_second_vote_and_a_strangers_vote_change_nothing(
    case: tuple[Election, list[Ballot | str]], data: st.DataObject
) -> None:
    election, acts = case
    done = after(election, acts)
    assert done.cast(data.draw(ballots(data.draw(st.sampled_from([*election.reliability, "stranger"]))))) == done
    assert done.drop("stranger") == done


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=300))
def test_a_reliability_stays_in_bounds(observed: list[tuple[float, bool]]) -> None:
    memory = 1 / (1 - FADE)
    standing = Standing()
    for share, whole in observed:
        standing = standing.after(share, 1 - share if whole else 0.0)
        total = PRIOR_GOOD + PRIOR_BAD + memory
        assert PRIOR_GOOD / total - 1e-9 <= standing.reliability <= (PRIOR_GOOD + memory) / total + 1e-9


@given(
    st.integers(3, 5),
    st.lists(st.tuples(st.sampled_from(["lie", "truth", "silence"]), st.floats(0, 1), st.floats(0, 1)), max_size=60),
    st.sampled_from(["first", "last"]),
)
def test_one_liar_never_wins_against_three_or_more_that_agree(
    honest: int, story: list[tuple[str, float, float]], when: str
) -> None:
    """Whatever it did before, and however sure it claims to be. The honest vote in time, however unsure they are."""
    names = [f"honest{number}" for number in range(honest)]
    standings = {name: Standing() for name in [*names, "liar"]}
    for act, claimed, sure in [*story, ("lie", 1.0, 0.0)]:
        election = Election({name: standing.reliability for name, standing in standings.items()}, 2)
        honest_votes: list[Ballot | str] = [says(name, "right", sure, x="1") for name in names]
        lie: Ballot | str = (
            "liar" if act == "silence" else says("liar", "right" if act == "truth" else "wrong", claimed)
        )
        acts = [lie, *honest_votes] if when == "first" else [*honest_votes, lie]
        election = after(election, acts)
        outcome = election.outcome()
        assert frame_of(outcome) == {"intent": "right", "slots": {"x": "1"}}
        assert outcome is not None
        standings = learn(standings, election, outcome, failed=["liar"] if act == "silence" else [])


def test_a_node_that_lies_or_lags_or_fails_loses_weight_and_can_win_it_back() -> None:
    standings = {name: Standing() for name in "abcd"}

    def rounds(count: int, cast: list[Ballot], failed: list[str]) -> dict[str, Standing]:
        learned = standings
        for _ in range(count):
            election = after(Election({n: s.reliability for n, s in learned.items()}, 2), [*cast, *failed])
            outcome = election.outcome(expired=True)
            assert outcome is not None
            learned = learn(learned, election, outcome, failed)
        return learned

    standings = rounds(20, [says("a", "x"), says("b", "x"), says("c", "y")], ["d"])
    assert standings["a"].reliability > 0.9
    assert standings["c"].reliability < 0.4
    assert standings["d"].reliability < 0.4
    standings = rounds(20, [says("a", "x"), says("b", "x")], [])
    assert standings["c"].reliability < 0.4, "it missed the deadline"
    standings = rounds(40, [says(name, "x") for name in "abcd"], [])
    assert standings["c"].reliability > 0.8


def test_to_be_cut_short_costs_a_little() -> None:
    standings = {name: Standing() for name in "abc"}
    election = after(Election(dict.fromkeys("abc", 0.8), 2), [says("a", "x"), says("b", "x")])
    outcome = election.outcome()
    assert outcome is not None
    assert outcome.reason == "decided"
    learned = learn(standings, election, outcome, failed=[])
    assert 0.7 < learned["c"].reliability < 0.8 < learned["a"].reliability


def test_what_was_no_choice_teaches_nothing() -> None:
    standings = {name: Standing() for name in "ab"}
    alone = after(Election(dict.fromkeys("ab", 0.8), 1), [says("a", "x"), "b"])
    texts = after(Election(dict.fromkeys("ab", 0.8), 1), [Ballot.of_text("a", "x", 0.9), Ballot.of_text("b", "y", 0.9)])
    for election in (alone, texts):
        outcome = election.outcome()
        assert outcome is not None
        assert learn(standings, election, outcome, failed=[]) == standings


def test_a_vote_that_was_right_in_part_is_credited_in_part() -> None:
    standings = {name: Standing() for name in "abc"}
    cast: list[Ballot | str] = [says("a", "x", s="1"), says("b", "x", s="1"), says("c", "x", s="2")]
    election = after(Election(dict.fromkeys("abc", 0.8), 2), cast)
    outcome = election.outcome()
    assert outcome is not None
    assert learn(standings, election, outcome, failed=[])["c"] == Standing(0.5, 0.5)
