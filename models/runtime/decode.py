"""The token loop: pick, turn into text, stop. Knows the model only as a function from new ids to logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.runtime.sampling import Draws, Pick, pick
from models.runtime.tier import Limits, Token

Detokenise = Callable[[Sequence[int]], str]
Step = Callable[[Sequence[int]], NDArray[np.float32]]
Choose = Callable[[Sequence[int], "Guide", Limits, Draws], Pick]
"""Reads ids that the model has not read yet and picks what follows, among what the guide allows."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns ids into text as they come; a character whose bytes are spread over tokens is held until it is whole."""

    def __init__(self, detokenise: Detokenise) -> None:
        self._detokenise = detokenise
        self._ids: list[int] = []
        self._context = 0  # where the ids that give the last piece its surroundings begin
        self._shown = 0  # ids already given out

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is certain now."""
        self._ids.append(token_id)
        return self._take(hold=True)

    def flush(self) -> str:
        """Return what was held, with broken characters shown as U+FFFD."""
        return self._take(hold=False)

    def _take(self, *, hold: bool) -> str:
        before = self._detokenise(self._ids[self._context : self._shown])
        text = self._detokenise(self._ids[self._context :])
        if hold and text.endswith(_BROKEN):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]


class StopFilter:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns what can be shown and whether a stop string was met (it is not shown)."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """Return what was held."""
        shown, self._held = self._held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Vocabulary:
    """What the loop needs of a tokenizer."""

    detokenise: Detokenise
    eos_ids: Collection[int]


class Guide(Protocol):
    """What an answer may say next; it goes along with the answer, token by token."""

    @property
    def complete(self) -> bool:
        """Whether nothing more may be said."""

    def forced(self) -> Sequence[int]:
        """Ids that must come next, whatever the model would say; they count as taken."""

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits (V,) with −inf for what may not come next."""

    def take(self, token_id: int) -> None:
        """Go on past an id that was chosen from what `masked` left."""

    def allowed(self, ids: Sequence[int]) -> int:
        """How many of the first of `ids` may come next, one after the other; nothing is taken."""

    def ahead(self, ids: Sequence[int]) -> Iterator[bytes | None]:
        """What may come next, now and after each of `ids`, should the answer go on with them; nothing is taken.

        A bit for each id of the vocabulary, most significant first; no bits: anything; None: nothing is chosen there,
        since it is forced. Ends early where the answer cannot go on with them.
        """


class Free:
    """A guide that lets the model say anything."""

    complete = False

    def forced(self) -> Sequence[int]:
        """Nothing."""
        return ()

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits as they are."""
        return logits

    def take(self, token_id: int) -> None:
        """Nothing to note."""

    def allowed(self, ids: Sequence[int]) -> int:
        """All of them."""
        return len(ids)

    def ahead(self, ids: Sequence[int]) -> Iterator[bytes | None]:
        """Anything."""
        return repeat(b"", 1 + len(ids))


FREE = Free()


def decode(
    step: Step,
    prompt: Sequence[int],
    vocabulary: Vocabulary,
    limits: Limits,
    room: int,
    guide: Guide = FREE,
) -> Iterator[Token]:
    """Yield tokens until an end token, a stop string, `limits.max_tokens` or `room`, whichever comes first.

    `step` takes the ids that the model has not read yet and returns logits (V,) for the next; `room` is how many
    tokens the context still holds after the prompt. Close the iterator to cancel.
    """

    def choose(new: Sequence[int], guide: Guide, limits: Limits, draws: Draws) -> Pick:
        return pick(guide.masked(step(new)), limits, draws)

    return decode_by(choose, prompt, vocabulary, limits, room, guide)


def decode_by(
    choose: Choose, prompt: Sequence[int], vocabulary: Vocabulary, limits: Limits, room: int, guide: Guide = FREE
) -> Iterator[Token]:
    """Like `decode`, for whoever picks tokens where the logits are."""
    stream, stops = TextStream(vocabulary.detokenise), StopFilter(limits.stop)
    budget = min(limits.max_tokens, room)
    for count, (chosen, last) in enumerate(islice(_picks(choose, prompt, limits, guide), budget), 1):
        ended = chosen.id in vocabulary.eos_ids
        text, stopped = stops.push("" if ended else stream.push(chosen.id))
        finish = "stop" if ended or stopped or last else "length" if count == budget else None
        if finish and not stopped:
            rest, stopped = stops.push(stream.flush())
            text += rest + stops.flush()
            finish = "stop" if stopped else finish
        yield _token(text, chosen, finish, vocabulary.detokenise)
        if finish:
            return


def _picks(choose: Choose, prompt: Sequence[int], limits: Limits, guide: Guide) -> Iterator[tuple[Pick, bool]]:
    """Yield picks without end, each with whether the guide lets nothing follow it.

    Forced ones cost no step: they wait, and the next step reads them together.
    """
    draws = Draws(limits.seed)
    new = list(prompt)
    while True:
        forced = guide.forced()
        for count, token_id in enumerate(forced, 1):
            yield _forced_pick(token_id, limits), guide.complete and count == len(forced)
        new += forced
        chosen = choose(new, guide, limits, draws)
        guide.take(chosen.id)
        new = [chosen.id]
        yield chosen, guide.complete


def _forced_pick(token_id: int, limits: Limits) -> Pick:
    return Pick(token_id, 0.0, 1.0, ((token_id, 0.0),) if limits.top_logprobs else ())


def _token(text: str, chosen: Pick, finish: str | None, detokenise: Detokenise) -> Token:
    top = tuple((detokenise((token_id,)), logprob) for token_id, logprob in chosen.top)
    return Token(text, chosen.logprob, chosen.margin, chosen.id, top, finish)
