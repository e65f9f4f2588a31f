"""Reading ahead on a made-up model: whatever is proposed, the answer is the one without; proposals only save passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.runtime.decode import FREE, Guide, Vocabulary, decode
from models.runtime.drafts import FIRST_PIECE, PIECE, AnswerDraft, PromptLookup, Proposer, ReadAhead, best_length
from models.runtime.tier import Limits, Token

V, END = 5, 0
IDS = st.lists(st.integers(0, V - 1), max_size=40)
PROMPT = (1, 2, 3)
THIRTY = Limits(max_tokens=30)


def logits_after(ids: Sequence[int]) -> np.ndarray:
    """A language of five tokens whose next one hangs on the last two."""
    return _logits(ids[-1] + V * (ids[-2] if len(ids) > 1 else 0)).copy()


@cache
def _logits(seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=1.5, size=V).astype(np.float32)
    logits[END] -= 2
    return logits


class Sequence5:
    """A `Verifier` over that language that counts its passes; it knows only what it has read and not forgotten."""

    def __init__(self, room: int = 1000, *, alone: bool = True) -> None:
        self.ids: list[int] = []
        self.context, self.alone, self.passes = room + len(PROMPT), alone, 0

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def room(self) -> int:
        return self.context - self.length

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.verify(ids, ())[0]

    def verify(self, ids: Sequence[int], draft: Sequence[int]) -> np.ndarray:
        assert ids, "a pass without a token"
        assert len(ids) + len(draft) <= self.room, "more than there is room for"
        self.passes += 1
        self.ids += [*ids, *draft]
        end = len(self.ids) - len(draft)
        return np.array([logits_after(self.ids[: end + k]) for k in range(len(draft) + 1)])

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.ids[length:]


def say(
    proposers: Sequence[Proposer],
    limits: Limits = THIRTY,
    sequence: Sequence5 | None = None,
    guide: Guide = FREE,
) -> tuple[list[Token], int]:
    """The answer and the passes it took."""
    sequence = sequence or Sequence5()
    room = sequence.room - len(PROMPT)
    ahead = ReadAhead(sequence, PROMPT, proposers, guide, min(limits.max_tokens, room))
    words = Vocabulary(lambda ids: "".join("_abcd"[i] for i in ids), {END})
    return list(decode(ahead.step, PROMPT, words, limits, room, guide)), sequence.passes


def ids_of(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


LIMITS = st.builds(
    Limits,
    max_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 1.0]),
    top_p=st.sampled_from([0.6, 1.0]),
    seed=st.integers(0, 99),
    stop=st.lists(st.text("abcd", min_size=1, max_size=3), max_size=2).map(tuple),
)


@given(IDS, st.integers(0, 6), LIMITS, st.integers(3, 60))
def test_no_proposal_changes_an_answer(draft: list[int], lookup: int, limits: Limits, room: int) -> None:
    """Greedy or drawn by a seed, cut by stop strings, length or context: every token and all that is said of it."""
    alone, passes = say((), limits, Sequence5(room))
    drafted = AnswerDraft(draft)
    ahead, fewer = say((drafted, PromptLookup(lookup, (*draft, *PROMPT))), limits, Sequence5(room))
    assert ahead == alone
    assert fewer <= passes
    assert 0 <= drafted.accepted <= drafted.proposed <= len(draft)


@given(st.integers(0, 99), st.integers(2, 40), st.sampled_from([0.0, 1.0]))
def test_a_right_draft_takes_few_passes(seed: int, max_tokens: int, temperature: float) -> None:
    limits = Limits(max_tokens=max_tokens, seed=seed, temperature=temperature)
    alone, passes = say((), limits)
    drafted = AnswerDraft(ids_of(alone))
    again, fewer = say((drafted,), limits)
    assert again == alone
    assert passes == len(alone)
    assert fewer <= 4, "pieces of 8, 8, 16 and 32 tokens"
    assert drafted.accepted == len(alone) - fewer, "a pass gives a token of its own"


def test_what_follows_the_first_disagreement_is_not_proposed_again() -> None:
    alone, _ = say(())
    right = ids_of(alone)[:6]
    wrong = 1 + right[5] % (V - 1)
    drafted = AnswerDraft([*right[:5], wrong, *ids_of(alone)[6:]])
    again, _ = say((drafted,))
    assert again == alone
    assert (drafted.proposed, drafted.accepted) == (FIRST_PIECE, 5)


def test_a_draft_goes_in_pieces_that_grow_with_what_agreed() -> None:
    drafted = AnswerDraft(list(range(100)))
    said, pieces = list[int](), list[int]()
    while piece := drafted.propose(said, 1000):
        pieces.append(len(piece))
        said += piece
    assert pieces == [8, 8, 16, PIECE, PIECE, 4]
    assert not drafted.propose([5], 1000)
    assert drafted.propose([], 3) == [0, 1, 2]


def test_drawn_answers_keep_their_distribution() -> None:
    """Chi-square over all answers of three tokens, 4,000 seeds; the 0.1 % quantile at 124 degrees of freedom is 179."""
    limits = Limits(max_tokens=3, temperature=1.0)
    draft = ids_of(say((), limits)[0])
    drafts = [AnswerDraft([2, 2, 2]) if seed % 2 else AnswerDraft(draft) for seed in range(4000)]
    answers = (say((one,), Limits(max_tokens=3, temperature=1.0, seed=s))[0] for s, one in enumerate(drafts))
    counts = Counter(tuple(ids_of(answer)) for answer in answers)
    expected = _probabilities(3)
    assert set(counts) <= set(expected)
    chi_square = sum((counts[ids] - 4000 * p) ** 2 / (4000 * p) for ids, p in expected.items() if p > 0)
    assert chi_square < 179
    accepted, proposed = sum(d.accepted > 0 for d in drafts), len(drafts)
    assert 0 < accepted < proposed, "some drafts were taken and some were not"


def _probabilities(length: int) -> dict[tuple[int, ...], float]:
    """Of all answers of up to `length` tokens."""
    found: dict[tuple[int, ...], float] = {}
    for answer in product(range(V), repeat=length):
        ended = answer.index(END) + 1 if END in answer else length
        p = 1.0
        for at in range(ended):
            weights = np.exp(logits_after([*PROMPT, *answer[:at]]).astype(np.float64))
            p *= weights[answer[at]] / weights.sum()
        found[answer[:ended]] = p
    return found


def test_a_proposal_without_chance_is_taken_with_its_probability() -> None:
    """The rule of speculative sampling: x with p(x), otherwise what is left of p; three standard deviations."""
    p = np.exp(logits_after(PROMPT).astype(np.float64))
    p /= p.sum()
    x, n = int(p.argmax()), 3000
    drafts = [AnswerDraft([x]) for _ in range(n)]
    answers = [
        ids_of(say((one,), Limits(max_tokens=2, temperature=1.0, seed=seed))[0]) for seed, one in enumerate(drafts)
    ]
    assert abs(sum(d.accepted for d in drafts) / n - p[x]) < 3 * np.sqrt(p[x] * (1 - p[x]) / n)
    refused = [answer[0] for answer, one in zip(answers, drafts, strict=True) if not one.accepted]
    assert x not in refused
    for y in set(range(V)) - {x}:
        left = p[y] / (1 - p[x])
        assert abs(refused.count(y) / len(refused) - left) < 3.3 * np.sqrt(left * (1 - left) / len(refused))


class NoTwo:
    """A guide that never lets 2 be said and forces 4 after 3."""

    complete = False

    def __init__(self) -> None:
        self._last = 0

    def forced(self) -> Sequence[int]:
        forced = [4] if self._last == 3 else []
        self._last = 4 if forced else self._last
        return forced

    def masked(self, logits: np.ndarray) -> np.ndarray:
        return np.where(np.arange(V) == 2, np.float32(-np.inf), logits)

    def take(self, token_id: int) -> None:
        self._last = token_id

    def allowed(self, ids: Sequence[int]) -> int:
        return list(ids).index(2) if 2 in ids else len(ids)


@given(IDS, st.integers(0, 9))
def test_a_guide_holds_with_any_draft(draft: list[int], seed: int) -> None:
    limits = Limits(max_tokens=30, temperature=1.0, seed=seed)
    alone, _ = say((), limits, guide=NoTwo())
    drafted = AnswerDraft(draft)
    again, _ = say((drafted,), limits, guide=NoTwo())
    assert again == alone
    assert drafted.proposed <= (draft.index(2) if 2 in draft else len(draft)), "what breaks the form was not cut"


def test_a_lookup_proposes_what_followed_the_last_time() -> None:
    lookup = PromptLookup(4, (7, 8, 9, 1, 2, 3, 7, 8, 9, 4, 5))
    assert not lookup.propose([], 10)
    assert lookup.propose([7, 8, 9], 10)[:1] == [4], "the latest place first"
    assert lookup.propose([7, 8, 9, 1, 2], 10)[:1] == [3]
    assert not lookup.propose([7, 8, 9, 1, 2, 6], 10)
    assert len(PromptLookup(4, (1, 2, 3, 4, 1, 2)).propose([], 1)) == 1


@pytest.mark.parametrize(("rate", "most", "length"), [(0.0, 9, 0), (0.1, 9, 0), (0.5, 9, 1), (0.8, 9, 4), (1.0, 9, 9)])
def test_a_lookup_is_as_long_as_pays(rate: float, most: int, length: int) -> None:
    assert best_length(rate, most) == length
    assert best_length(rate, 0) == 0


def test_a_lookup_that_errs_falls_silent_and_tries_again_later() -> None:
    lookup, said, lengths = PromptLookup(8, (1, 2) * 8), list[int](), list[int]()
    for _ in range(60):
        proposed = lookup.propose(said, 8)
        lengths.append(len(proposed))
        lookup.proposed += len(proposed)  # and none was accepted
        said += [1, 2]
    assert lengths[0] > 0
    assert 0 in lengths
    silent = lengths.index(0)
    assert any(lengths[silent:]), "it never tried again"


def test_lookups_keep_out_of_company() -> None:
    """Passes of single tokens are shared with other answers; one that reads ahead would not be."""
    alone, _ = say(())
    for company in (True, False):
        lookup, drafted = PromptLookup(4, PROMPT * 3), AnswerDraft(ids_of(alone))
        assert say((drafted, lookup), sequence=Sequence5(alone=not company))[0] == alone
        assert drafted.accepted
        again = PromptLookup(4, (*ids_of(alone), *PROMPT))
        say((again,), sequence=Sequence5(alone=not company))
        assert bool(again.proposed) is not company
