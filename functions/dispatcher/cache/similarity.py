"""How alike two questions are, without a model: hashed words and letter n-grams, compared by their cosine. Pure.

Words that carry a question's form (articles, pronouns, "where", "how") weigh less than those that carry its matter;
letter n-grams forgive endings and typing errors (Weinberger et al. 2009, "Feature hashing", arXiv 0902.2206).
`docs/decisions/0015` has what was measured, also of the device tier's embeddings; `examples/kiosk/measure.py` measures.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping

ABOVE = 0.85
"""Questions at least this alike are taken for the same: 0.4 % of CLINC150's test half were answered wrongly."""

_WORD = re.compile(r"[^\W_]+")
_FORM_WEIGHT = 0.3
_NGRAM_WEIGHT = 0.5
_NGRAM_LENGTHS = (3, 4)
_MAX_WORDS = 64
# English: articles, auxiliaries, pronouns, prepositions, politeness, and the words that ask.
_FORM_WORDS = frozenset(
    _WORD.findall(
        "a an the is are am be was were do does did can could will would should may i you we they he she it me my your "
        "our us to of in on at for and or with by there here please some any this that these those have has had m re "
        "ll d ve s get find tell want need like where when who whom which what how why much many"
    )
)
_NEGATIONS = frozenset(["no", "not", "never", "none", "without", "nothing", "cannot", "t"])  # `t` as in "don't"
_ENDINGS = (("ies", "y"), ("ing", ""), ("es", ""), ("s", ""), ("ed", ""))
_STEM_LETTERS = 3


def features(text: str) -> Mapping[int, float]:
    """The text as a sparse vector of length 1; empty for a text without a word."""
    weights: Counter[int] = Counter()
    for word in _words(text):
        weights.update(dict(_word_features(word)))
    length = math.sqrt(sum(weight * weight for weight in weights.values()))
    return {feature: weight / length for feature, weight in weights.items()}


def cosine(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """How alike two such vectors are, 0…1."""
    short, long = sorted((one, other), key=len)
    return sum(weight * long.get(feature, 0.0) for feature, weight in short.items())


def must_agree(text: str) -> tuple[str, ...]:
    """What no likeness makes up for: the numbers of a text, and whether it denies."""
    found = _words(text)
    numbers = sorted(word for word in found if any(letter.isdigit() for letter in word))
    return (*numbers, *(["not"] if any(word in _NEGATIONS for word in found) else []))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())[:_MAX_WORDS]


def _word_features(word: str) -> Iterator[tuple[int, float]]:
    if word in _FORM_WORDS:
        yield _hash(f"w{word}"), _FORM_WEIGHT
        return
    stem = _stem(word)
    yield _hash(f"w{stem}"), 1.0
    framed = f"<{stem}>"
    ngrams = {framed[i : i + n] for n in _NGRAM_LENGTHS for i in range(len(framed) - n + 1)}
    for ngram in ngrams:
        yield _hash(f"c{ngram}"), _NGRAM_WEIGHT / math.sqrt(len(ngrams))


def _stem(word: str) -> str:
    for ending, instead in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _STEM_LETTERS:
            return word[: -len(ending)] + instead
    return word


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())
