"""Sentence patterns with slots: a small language whose matching takes bounded time, unlike regular expressions.

    take off [to {altitude_m:number} (m|metres)]

`word` matches itself, `[…]` may be left out, `(…|…)` is one of several, and a slot is one of

    {name}              one word                    {name:number}     a number, in digits or English words
    {name:a|b|c}        one of these words          {name:text}       one or more words, as few as will do

A pattern becomes a position automaton (Glushkov 1961, "The abstract theory of automata"): one state for each word of
the pattern, so a text of n words and a pattern of m take O(n·m·m) steps, and it can be decided whether two patterns
match a common text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

MAX_WORDS = 64
"""Longer texts match nothing."""
MAX_POSITIONS = 48
_MAX_DEPTH = 4
_MAX_DIGITS = 12
_PUNCTUATION = ",;.:!?"

# Each alternative begins with another character, so there is nothing to backtrack into.
_TOKEN = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?|[^\W\d_][^\W_]*(?:['’\-][^\W_]+)*|[,;.:!?]")
_SYMBOL = re.compile(r"\{[^{}]*\}|[\[\]()|]|[^\s\[\](){}|]+|\S")
_NAME = re.compile(r"[a-z][a-z0-9_]*")

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBER_WORDS = {word: value for value, word in enumerate(_SMALL)} | {
    word: 10 * value for value, word in enumerate(_TENS, 2)
}
_THOUSAND = 1000


class PatternError(Exception):
    """A pattern that is not one; the message says what is wrong with it."""


@dataclass(frozen=True)
class Word:
    """A word of a text: as written, as it is compared, and its value if it is a number."""

    written: str
    norm: str
    number: float | None = None

    @property
    def is_mark(self) -> bool:
        """True for a punctuation mark."""
        return self.norm in _PUNCTUATION


def words(text: str) -> tuple[Word, ...]:
    """Split a text into words and punctuation marks; numbers in English words ("twenty five") become one."""
    found = _TOKEN.findall(unicodedata.normalize("NFKC", text))
    split = [part for token in found for part in _unhyphenated(token)]
    return tuple(_spelt_out(split))


def _unhyphenated(token: str) -> list[str]:
    """`twenty-five` is two words, `co-pilot` is one."""
    parts = token.split("-")
    return parts if len(parts) > 1 and all(part.casefold() in _NUMBER_WORDS for part in parts) else [token]


def _spelt_out(tokens: Sequence[str]) -> Iterator[Word]:
    index = 0
    while index < len(tokens):
        value, end = _number_at(tokens, index)
        if end > index:
            yield Word(" ".join(tokens[index:end]), str(value), float(value))
            index = end
        else:
            yield _word(tokens[index])
            index += 1


def _word(token: str) -> Word:
    digits = token.lstrip("+-")
    if not digits[:1].isdigit() or len(digits) > _MAX_DIGITS:
        return Word(token, token.casefold())
    value = float(token)
    return Word(token, str(int(value)) if value.is_integer() else str(value), value)


def _number_at(tokens: Sequence[str], begin: int) -> tuple[int, int]:
    """The number spelt out from `begin` on, and the index behind it; what is added next must be less than `room`."""
    total, part, room, index = 0, 0, _THOUSAND, begin
    while index < len(tokens):
        word = tokens[index].casefold()
        value = _NUMBER_WORDS.get(word)
        if value is not None and value < room and (value or index == begin):
            part, room = part + value, 10 if word in _TENS else 1
        elif word == "hundred" and 0 < part < 10:  # noqa: PLR2004  # one to nine hundred
            part, room = 100 * part, 100
        elif word == "thousand" and part and not total:
            total, part, room = _THOUSAND * part, 0, _THOUSAND
        elif not (word == "and" and room == 100 and _adds(tokens, index + 1)):  # noqa: PLR2004  # … hundred and …
            break
        index += 1
    return total + part, index


def _adds(tokens: Sequence[str], index: int) -> bool:
    return index < len(tokens) and _NUMBER_WORDS.get(tokens[index].casefold(), 0) > 0


Kind = Literal["literal", "choice", "number", "word", "text"]


@dataclass(frozen=True)
class Position:
    """One place of a pattern, and what may stand there; `norms` for a literal or a choice."""

    kind: Kind
    slot: str = ""
    norms: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """True where words may stand that the pattern does not name."""
        return not self.norms

    def accepts(self, word: Word) -> bool:
        """Whether the word may stand here."""
        if self.kind == "number":
            return word.number is not None
        return self.is_open or word.norm in self.norms

    def common(self, other: Position) -> str | None:
        """A word that may stand here and there, or None."""
        if self.norms and other.norms:
            return next((norm for norm in self.norms if norm in other.norms), None)
        is_number = "number" in {self.kind, other.kind}
        named = self.norms or other.norms or ("1" if is_number else "something",)
        return next((norm for norm in named if not is_number or _word(norm).number is not None), None)


@dataclass(frozen=True)
class Pattern:
    """A pattern as an automaton: positions, those that may come first, follow each, and end a text."""

    source: str
    positions: tuple[Position, ...]
    first: tuple[int, ...]
    follow: tuple[tuple[int, ...], ...]
    final: frozenset[int]

    @classmethod
    def parse(cls, source: str) -> Pattern:
        """Read a pattern; raises `PatternError`."""
        return _Parser(source).pattern()

    @cached_property
    def slots(self) -> dict[str, Position]:
        """The slots by name."""
        return {position.slot: position for position in self.positions if position.slot}

    def always_fills(self, slot: str) -> bool:
        """Whether no text matches without filling the slot."""
        others = {i for i, position in enumerate(self.positions) if position.slot != slot}
        return not self._passes_through(others)

    def match(self, text: Sequence[Word]) -> dict[str, str | float] | None:
        """The values of the slots, if all of the text matches; numbers as floats, choices as the pattern has them."""
        if not 0 < len(text) <= MAX_WORDS:
            return None
        norms = {word.norm for word in text}
        if any(norms.isdisjoint(needed) for needed in self._needed):
            return None
        path = self._path(text)
        if path is None:
            return None
        parts: dict[str, list[Word]] = {}
        for place, word in zip(path, text, strict=True):
            if self.positions[place].slot:
                parts.setdefault(self.positions[place].slot, []).append(word)
        return {slot: _value(self.slots[slot].kind, found) for slot, found in parts.items()}

    def overlap(self, other: Pattern) -> str | None:
        """A text that both match, or None if there is none."""
        pairs = [(p, q) for p in self.first for q in other.first]
        said: dict[tuple[int, int], tuple[str, tuple[int, int] | None]] = {}
        reached: dict[tuple[int, int], tuple[int, int] | None] = dict.fromkeys(pairs)
        for pair in pairs:  # grows while it is walked: breadth first, so the shortest text is found
            p, q = pair
            word = self.positions[p].common(other.positions[q])
            if word is None:
                continue
            said[pair] = word, reached[pair]
            if p in self.final and q in other.final:
                return _text(said, pair)
            for after in ((p2, q2) for p2 in self.follow[p] for q2 in other.follow[q]):
                if after not in reached:
                    reached[after] = pair
                    pairs.append(after)
        return None

    @cached_property
    def _needed(self) -> tuple[frozenset[str], ...]:
        """Words of which each text that matches has at least one, for each place that every way leads through."""
        places = range(len(self.positions))
        named = [place for place in places if self.positions[place].norms]
        return tuple(frozenset(self.positions[p].norms) for p in named if not self._passes_through({*places} - {p}))

    def _path(self, text: Sequence[Word]) -> list[int] | None:
        """The positions that the words of the text stand at, by the first way through."""
        dead: set[tuple[int, int]] = set()
        ways, path = [iter(self.first)], list[int]()
        while ways:
            at = len(ways) - 1
            place = next((p for p in ways[-1] if (at, p) not in dead and self.positions[p].accepts(text[at])), None)
            if place is None:
                ways.pop()
                if path:
                    dead.add((len(path) - 1, path.pop()))
            elif at + 1 < len(text):
                path.append(place)
                ways.append(iter(self.follow[place]))
            elif place in self.final:
                return [*path, place]
            else:
                dead.add((at, place))
        return None

    def _passes_through(self, allowed: set[int]) -> bool:
        """Whether a text can match with these positions alone."""
        seen, pending = set[int](), [p for p in self.first if p in allowed]
        while pending:
            place = pending.pop()
            if place in self.final:
                return True
            if place not in seen:
                seen.add(place)
                pending.extend(p for p in self.follow[place] if p in allowed)
        return False

    def check(self) -> None:
        """Raise `PatternError` where a slot could be filled twice, or no word of the pattern's own is needed."""
        for place, position in enumerate(self.positions):
            if position.slot and any(self.positions[later].slot == position.slot for later in self._after(place)):
                raise PatternError(f"slot '{position.slot}' can be filled twice")
        if self._passes_through({i for i, position in enumerate(self.positions) if position.is_open}):
            raise PatternError("it would match any text; give it a word of its own that may not be left out")

    def _after(self, place: int) -> set[int]:
        seen, pending = set[int](), list(self.follow[place])
        while pending:
            later = pending.pop()
            if later not in seen:
                seen.add(later)
                pending.extend(self.follow[later])
        return seen - {place}


def _text(said: Mapping[tuple[int, int], tuple[str, tuple[int, int] | None]], last: tuple[int, int]) -> str:
    """The words on the way to a pair of positions."""
    words_back, pair = list[str](), last
    while True:
        word, before = said[pair]
        words_back.append(word)
        if before is None:
            return " ".join(reversed(words_back))
        pair = before


def _value(kind: Kind, found: list[Word]) -> str | float:
    if kind == "number" and found[0].number is not None:
        return found[0].number
    return found[0].norm if kind == "choice" else " ".join(word.written for word in found)


@dataclass(frozen=True)
class _Part:
    """A piece of a pattern under construction: the positions it may begin and end with; whether it may be empty."""

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    empty: bool = True


@dataclass
class _Parser:
    """Recursive descent over the symbols of a pattern, building the automaton as it goes."""

    source: str
    _symbols: list[str] = field(init=False)
    _positions: list[Position] = field(default_factory=list)
    _follow: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._symbols = _SYMBOL.findall(self.source)[::-1]

    def pattern(self) -> Pattern:
        whole = self._alternatives(0)
        if self._symbols:
            raise PatternError(f"'{self._symbols[-1]}' closes nothing")
        if whole.empty:
            raise PatternError("it would match an empty text; give it a word that may not be left out")
        for place, position in enumerate(self._positions):
            if position.kind == "text":
                self._follow[place].append(place)  # last: it goes on only where nothing else fits
        follow = tuple(tuple(dict.fromkeys(after)) for after in self._follow)
        made = Pattern(self.source, tuple(self._positions), whole.first, follow, frozenset(whole.last))
        made.check()
        return made

    def _alternatives(self, depth: int) -> _Part:
        if depth > _MAX_DEPTH:
            raise PatternError(f"groups are nested deeper than {_MAX_DEPTH}")
        parts = [self._sequence(depth)]
        while self._symbols and self._symbols[-1] == "|":
            if not depth:
                raise PatternError("'|' stands outside of a group; write (a|b)")
            self._symbols.pop()
            parts.append(self._sequence(depth))
        first = tuple(place for part in parts for place in part.first)
        last = tuple(place for part in parts for place in part.last)
        return _Part(first, last, any(part.empty for part in parts))

    def _sequence(self, depth: int) -> _Part:
        whole = _Part()
        while self._symbols and self._symbols[-1] not in {"|", "]", ")"}:
            whole = self._joined(whole, self._item(depth))
        return whole

    def _item(self, depth: int) -> _Part:
        symbol = self._symbols.pop()
        closing = {"[": "]", "(": ")"}.get(symbol)
        if closing:
            part = self._alternatives(depth + 1)
            if not self._symbols or self._symbols.pop() != closing:
                raise PatternError(f"'{symbol}' is not closed by '{closing}'")
            if not part.first:
                raise PatternError(f"'{symbol}{closing}' is empty")
            return _Part(part.first, part.last, part.empty or symbol == "[")
        return self._placed(_slot(symbol[1:-1]) if symbol.startswith("{") and len(symbol) > 1 else _literal(symbol))

    def _placed(self, position: Position) -> _Part:
        place = len(self._positions)
        if place >= MAX_POSITIONS:
            raise PatternError(f"it has more than {MAX_POSITIONS} words and slots; make two of it")
        self._positions.append(position)
        self._follow.append([])
        return _Part((place,), (place,), empty=False)

    def _joined(self, left: _Part, right: _Part) -> _Part:
        for place in left.last:
            self._follow[place].extend(right.first)
        first = left.first + right.first if left.empty else left.first
        last = left.last + right.last if right.empty else right.last
        return _Part(first, last, left.empty and right.empty)


def _slot(inside: str) -> Position:
    name, colon, kind = (part.strip() for part in inside.partition(":"))
    if not _NAME.fullmatch(name):
        raise PatternError(f"'{{{inside}}}' is no slot; write {{name}}, {{name:number}}, {{name:text}} or {{name:a|b}}")
    if not colon:
        return Position("word", name)
    if kind == "number":
        return Position("number", name)
    if kind == "text":
        return Position("text", name)
    if "|" not in kind:
        raise PatternError(f"slot '{name}' has the unknown kind '{kind}'; use number, text or words like a|b")
    return Position("choice", name, tuple(_literal(choice.strip()).norms[0] for choice in kind.split("|")))


def _literal(symbol: str) -> Position:
    found = words(symbol)
    if len(found) != 1 or found[0].is_mark:
        raise PatternError(f"'{symbol}' is no word; use letters and digits, and [ ] ( | ) {{ }} for groups and slots")
    return Position("literal", norms=(found[0].norm,))
