"""The token loop: pick, turn into text, stop. Knows the model only as a function from new ids to logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.runtime.sampling import Pick, pick
from models.runtime.tier import Limits, Token

Detokenise = Callable[[Sequence[int]], str]
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
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """Return what was held."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Vocabulary:
    """What the loop needs of a tokenizer."""

    detokenise: Detokenise
    eos_ids: Collection[int]


def decode(
    step: Callable[[Sequence[int]], NDArray[np.float32]],
    prompt: Sequence[int],
    vocabulary: Vocabulary,
    limits: Limits,
    room: int,
) -> Iterator[Token]:
    """Yield tokens until an end token, a stop string, `limits.max_tokens` or `room`, whichever comes first.

    `step` takes the ids that the model has not read yet and returns logits (V,) for the next; `room` is how many
    tokens the context still holds after the prompt. Close the iterator to cancel.
    """
    rng = np.random.default_rng(limits.seed)
    stream, stops = TextStream(vocabulary.detokenise), StopFilter(limits.stop)
    budget = min(limits.max_tokens, room)
    new: Sequence[int] = prompt
    for count in range(1, budget + 1):
        chosen = pick(step(new), limits, rng)
        new = (chosen.id,)
        ended = chosen.id in vocabulary.eos_ids
        text, stopped = stops.push("" if ended else stream.push(chosen.id))
        finish = "stop" if ended or stopped else "length" if count == budget else None
        if finish and not stopped:
            rest, stopped = stops.push(stream.flush())
            text += rest + stops.flush()
            finish = "stop" if stopped else finish
        yield _token(text, chosen, finish, vocabulary.detokenise)
        if finish:
            return


def _token(text: str, chosen: Pick, finish: str | None, detokenise: Detokenise) -> Token:
    top = tuple((detokenise((token_id,)), logprob) for token_id, logprob in chosen.top)
    return Token(text, chosen.logprob, chosen.margin, chosen.id, top, finish)
