"""Tokenizers: from a GGUF's own vocabulary, and the small one cut out of it for a device tier."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _by_words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Cut as Llama 3 and Qwen do, which differ in how many digits stay together."""
    words = Regex(_WORDS.replace("{DIGITS}", digits))
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


SPLITTERS = {
    "llama-bpe": _by_words("{1,3}"),
    "qwen2": _by_words(""),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], special: Iterable[str], splitter: str
) -> Tokenizer:
    """Assemble a byte-level BPE tokenizer; `tokens[i]` has id i, `splitter` is a key of `SPLITTERS`."""
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = SPLITTERS[splitter]
    tokenizer.decoder = decoders.ByteLevel()
    if splitter == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer


def cut_vocabulary(source: Tokenizer, words: Iterable[str], size: int) -> tuple[Tokenizer, list[int]]:
    """Cut a byte-level BPE down to at most `size` tokens, those that `words` need most; still byte-safe.

    Keeps all byte tokens and the most frequent tokens of `words` with the merges that build them, in their order.
    Returns the tokenizer and, for each of its ids, the id in the source: embeddings can be taken over.
    """
    counts: Counter[str] = Counter()
    for encoding in source.encode_batch(list(words), add_special_tokens=False):
        counts.update(encoding.tokens)
    model = json.loads(source.to_str())["model"]
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    made_by = {left + right: (left, right) for left, right in reversed(merges)}
    kept = set(pre_tokenizers.ByteLevel.alphabet())
    for token, _ in counts.most_common():
        need = _parts(token, made_by) - kept
        if len(kept) + len(need) <= size:
            kept |= need
    tokens = [token for token in sorted(model["vocab"], key=model["vocab"].__getitem__) if token in kept]
    small = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for left, right in merges if {left, right, left + right} <= kept],
        )
    )
    small.pre_tokenizer, small.decoder = source.pre_tokenizer, source.decoder
    return small, [model["vocab"][token] for token in tokens]


def _parts(token: str, made_by: dict[str, tuple[str, str]]) -> set[str]:
    """Return the token and all tokens that merging it passes through."""
    found, waiting = set(), [token]
    while waiting:
        piece = waiting.pop()
        if piece not in found:
            found.add(piece)
            waiting.extend(made_by.get(piece, ()))
    return found
