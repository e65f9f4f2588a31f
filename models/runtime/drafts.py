"""Read ahead: proposed tokens go through the model together, and those that it would have said itself cost no pass.

The proposals are a draft of the whole answer, or what followed the last words when they stood in the text before
(prompt lookup: A. Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). Knows tokens as numbers only.

Which token comes next is picked from the model's own logits, as without proposals, and a proposal holds if it is the
one that was picked. For a proposal without chance that is the rule of speculative sampling (Leviathan et al. 2023,
arXiv 2211.17192): x is taken with probability min(1, p(x) / 1) = p(x), and otherwise the token has the distribution
p without x. So the distribution is p; and with one draw a token, as without proposals, a seed gives the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from models.runtime.decode import Guide
from models.runtime.sampling import Draws, Pick
from models.runtime.tier import Limits

Floats = NDArray[np.float32]
Row = TypeVar("Row")
Read = Callable[[Sequence[int], Sequence[int]], Sequence[Row]]
"""Reads ids and a draft of what follows; row k, of 1 + len(draft), is for after k of the draft."""

FIRST_PIECE, PIECE = 8, 32
"""Tokens of a draft that are verified at once: as many as agreed before, within these bounds, since what follows the
first disagreement is read in vain, and a token among 32 costs as much as one among 16."""
_WORDS = (3, 2)
"""How many last tokens are looked up, the longest first: one alone says too little."""
_TOKEN_COST = 0.2
"""What a further token adds to a pass, in passes of a single token (docs/decisions/0016)."""
_PRIOR, _MEMORY = 0.5, 0.9
"""What is thought of proposals before there were any, and how much of what was thought outlives one."""


@runtime_checkable
class Rewinds(Protocol):
    """A token sequence that can go back: what drafts need, whoever picks the tokens."""

    @property
    def length(self) -> int:
        """Tokens read."""

    @property
    def room(self) -> int:
        """Tokens that still fit."""

    @property
    def verifies(self) -> bool:
        """Whether the model's graph tells what follows at several positions."""

    @property
    def alone(self) -> bool:
        """Whether nobody else would share a pass of a single token."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


@runtime_checkable
class Verifier(Rewinds, Protocol):
    """A token sequence that a draft can be tried on, with its logits: `models.runtime.engine.TokenSequence`."""

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read ids and return logits (V,) for the next token."""

    def verify(self, ids: Sequence[int], draft: Sequence[int]) -> Floats:
        """Read ids and a draft of what follows; returns logits (1 + len(draft), V), row k for after k of the draft."""


@runtime_checkable
class Chooser(Rewinds, Protocol):
    """A token sequence that picks where its logits are, which it does not show: shards, whose last one picks."""

    def choose(
        self, new: Sequence[int], draft: Sequence[int], guide: Guide, limits: Limits, draws: Draws
    ) -> Sequence[Pick]:
        """Read ids and a draft of what follows; pick after them and after each of the draft. Nothing is drawn."""


class Proposer(Protocol):
    """Somebody who guesses; `proposed` and `accepted` tokens are counted by who asks.

    `in_company`: whether a guess is worth a pass of its own while passes of single tokens could be shared.
    """

    in_company: ClassVar[bool]
    proposed: int
    accepted: int

    def propose(self, said: Sequence[int], most: int) -> Sequence[int]:
        """Up to `most` ids that may follow what was said of the answer; none if there is no good guess."""


@dataclass
class AnswerDraft:
    """A draft of the whole answer; of use until the answer disagrees."""

    in_company: ClassVar[bool] = True
    ids: Sequence[int]
    proposed: int = 0
    accepted: int = 0

    def propose(self, said: Sequence[int], most: int) -> Sequence[int]:
        """What the draft goes on with."""
        agrees = list(self.ids[: len(said)]) == list(said)
        piece = min(max(len(said), FIRST_PIECE), PIECE)
        return self.ids[len(said) :][: min(most, piece)] if agrees else ()


class PromptLookup:
    """What came after the last tokens where they stood before, in `before` or in the answer, the latest place first.

    How many tokens it proposes, `longest` at most, follows from how many were right of late.
    """

    in_company: ClassVar[bool] = False

    def __init__(self, longest: int, before: Sequence[int]) -> None:
        self.proposed = self.accepted = 0
        self._longest, self._text, self._before = longest, list(before), len(before)
        self._after: dict[tuple[int, ...], int] = {}  # where the text goes on after some tokens
        self._noted = 1
        self._rate, self._judged = _PRIOR, (0, 0)

    def propose(self, said: Sequence[int], most: int) -> Sequence[int]:
        """What followed the last tokens."""
        self._learn()
        self._note(said)
        found = next((at for n in _WORDS if (at := self._after.get(tuple(self._text[-n:])))), None)
        if found is None:
            return ()
        count = best_length(self._rate, min(self._longest, most))
        if not count:
            self._learn_that(_PRIOR)  # it may have become better in the meantime
        return self._text[found : found + count]

    def _learn(self) -> None:
        """Look at what came of the last proposal."""
        proposed, accepted = self.proposed - self._judged[0], self.accepted - self._judged[1]
        self._judged = self.proposed, self.accepted
        for _ in range(accepted):
            self._learn_that(1.0)
        if accepted < proposed:
            self._learn_that(0.0)

    def _learn_that(self, rate: float) -> None:
        self._rate = _MEMORY * self._rate + (1 - _MEMORY) * rate

    def _note(self, said: Sequence[int]) -> None:
        """Note after which tokens each stands; the last ones wait for what follows them."""
        self._text += said[len(self._text) - self._before :]
        for at in range(self._noted, len(self._text)):
            for n in _WORDS:
                if at >= n:
                    self._after[tuple(self._text[at - n : at])] = at
        self._noted = len(self._text)


def best_length(rate: float, most: int) -> int:
    """How many tokens to propose, 0 to `most`, if each is right with probability `rate` once those before it are.

    It is the number k with the most tokens a pass, 1 + rate + … + rate^k, for the cost of a pass over 1 + k tokens.
    """
    best, best_value, tokens = 0, 1.0, 1.0
    for count in range(1, most + 1):
        tokens += rate**count
        value = tokens / (1 + _TOKEN_COST * count)
        if value > best_value:
            best, best_value = count, value
    return best


class _Ahead(Generic[Row]):
    """Lets a sequence read what is proposed along with what it must, and keeps what it says of it."""

    def __init__(
        self, sequence: Rewinds, prompt: Sequence[int], proposers: Sequence[Proposer], guide: Guide, most_tokens: int
    ) -> None:
        self._sequence, self._n_prompt, self._proposers = sequence, len(prompt), proposers
        self._guide, self._most_tokens = guide, most_tokens
        self._said: list[int] = []
        self._ahead: Sequence[int] = ()  # read, but not said yet
        self._rows: Sequence[Row] = ()  # for after what was said, and after each of those
        self._proposer: Proposer | None = None

    def advance(self, new: Sequence[int], read: Read[Row]) -> Row:
        """Return the row for after `new`; the first `new` is the prompt, and forced tokens, if any."""
        self._said += new if self._sequence.length else new[self._n_prompt :]
        agreed = agreement(new, self._ahead)
        if self._proposer is not None:
            self._proposer.accepted += agreed
        if agreed == len(new):
            self._ahead, self._rows = self._ahead[agreed:], self._rows[agreed:]
            return self._rows[0]
        if agreed < len(self._ahead):
            self._sequence.rewind(self._sequence.length - len(self._ahead) + agreed)
        self._proposer, self._ahead = self._guess(len(new) - agreed)
        if self._proposer is not None:
            self._proposer.proposed += len(self._ahead)
        self._rows = read(new[agreed:], self._ahead)
        return self._rows[0]

    def _guess(self, n_new: int) -> tuple[Proposer | None, Sequence[int]]:
        most = min(self._most_tokens - len(self._said) - 1, self._sequence.room - n_new)
        for proposer in self._proposers:
            if most > 0 and (proposer.in_company or self._sequence.alone):
                ids = proposer.propose(self._said, most)
                ids = ids[: self._guide.allowed(ids)]
                if ids:
                    return proposer, ids
        return None, ()


class ReadAhead(_Ahead[Floats]):
    """A step for `decode`: reads ahead in a sequence that shows its logits.

    `most_tokens` is the longest the answer can get. Proposals that the guide does not allow are cut.
    """

    def __init__(
        self, sequence: Verifier, prompt: Sequence[int], proposers: Sequence[Proposer], guide: Guide, most_tokens: int
    ) -> None:
        super().__init__(sequence, prompt, proposers, guide, most_tokens)
        self._verifier = sequence

    def step(self, new: Sequence[int]) -> Floats:
        """Return logits (V,) for the token after `new`; the first `new` is the prompt, and forced tokens, if any."""
        return self.advance(new, self._read)

    def _read(self, new: Sequence[int], draft: Sequence[int]) -> Sequence[Floats]:
        return list(self._verifier.verify(new, draft)) if draft else [self._verifier.logits(new)]


class ChooseAhead(_Ahead[Pick]):
    """The same for `decode_by` and a sequence that picks by itself."""

    def __init__(
        self, sequence: Chooser, prompt: Sequence[int], proposers: Sequence[Proposer], guide: Guide, most_tokens: int
    ) -> None:
        super().__init__(sequence, prompt, proposers, guide, most_tokens)
        self._chooser = sequence

    def choose(self, new: Sequence[int], guide: Guide, limits: Limits, draws: Draws) -> Pick:
        """Return what is picked after `new`."""
        picked = self.advance(new, lambda ids, draft: self._chooser.choose(ids, draft, guide, limits, draws))
        if limits.temperature > 0:
            draws.random()  # the one that it was picked with
        return picked


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
