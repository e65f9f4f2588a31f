"""Tell what an answer says from what it calls, while it comes in; the format is that of `models.runtime.toolcalls`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace

from functions.serving.events import CallDelta, Piece
from models.runtime.decode import overlap
from models.runtime.toolcalls import BETWEEN, CLOSING, OPENING

_STEPS = (OPENING, BETWEEN, CLOSING)
"""What ends the text, a function's name and its arguments; none of the three can occur in what it ends."""
_TEXT, _NAME, _ARGUMENTS = range(3)


class CallReader:
    """Reads one answer; what may be the beginning of a call is held back."""

    def __init__(self) -> None:
        self._held = ""
        self._step = _TEXT
        self._index = -1  # of the call that is read or was read last

    @property
    def only_whole_calls(self) -> bool:
        """Whether the answer, as far as it is read, ends with a call that is whole."""
        return self._index >= 0 and self._step == _TEXT

    def push(self, piece: Piece) -> Piece:
        """The piece with its text sorted."""
        self._held += piece.text
        return _joined(piece, list(self._sorted()))

    def flush(self) -> str:
        """Text that was held back."""
        return self._held if self._step == _TEXT and self._index < 0 else ""

    def _sorted(self) -> Iterator[str | CallDelta]:
        while True:
            mark = _STEPS[self._step]
            before, met, after = self._held.partition(mark)
            if not met:
                kept = len(before) if self._step == _NAME else overlap(before, mark)
                cut = len(before) - kept
                self._held = before[cut:]
                yield from self._part(before[:cut])
                return
            self._held = after
            yield from self._part(before)
            self._step = (self._step + 1) % len(_STEPS)

    def _part(self, text: str) -> Iterator[str | CallDelta]:
        if self._step == _NAME and text:
            self._index += 1
            yield CallDelta(self._index, id=f"call_{uuid.uuid4().hex}", name=text)
        elif self._step == _ARGUMENTS and text:
            yield CallDelta(self._index, text)
        elif self._step == _TEXT and self._index < 0:  # between calls there is but a line's end
            yield text


def _joined(piece: Piece, parts: list[str | CallDelta]) -> Piece:
    text = "".join(part for part in parts if isinstance(part, str))
    return replace(piece, text=text, calls=tuple(part for part in parts if isinstance(part, CallDelta)))
