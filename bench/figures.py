"""What a run of `bench engine` comes to: medians, who may be compared with whom, and the line of JSON.

Ratios are ours to theirs. Two classes, so that no row is fast by being worse: at the file's own quality our row may
lose at most `ALLOWED_KL` nats more than llama.cpp does on that file; in the class of Q4_0 it may lose as much as
llama.cpp's Q4_0, give or take the `ROUNDING` by which two kernels on equal weights differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.memory import GB

ALLOWED_KL = 0.01
ROUNDING = 0.001
ALLOWED_IN_PIECES = 0.05
ALIKE = 0.05
"""Rows whose speeds differ by less, as a share, decode alike."""
SHORT, LONG = 128, 1024
"""Tokens in context when decoding is timed."""
PROMPTS = (128, 512)
"""Prompt lengths whose prefill is reported."""


@dataclass
class Measured:
    """All that was measured of one row, as it came in; seconds and bytes."""

    peer: str
    setting: str
    about: str
    skipped: str = ""
    cold_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)
    prefill_s: dict[int, list[float]] = field(default_factory=dict)
    decode_s: dict[int, list[float]] = field(default_factory=dict)
    weight_bytes: int = 0
    peak_bytes: int = 0
    together_ratios: list[float] = field(default_factory=list)
    kl: float | None = None
    kl_pieces: float | None = None
    perplexity: float | None = None
    top1: float | None = None

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.peer} {self.setting}".strip()

    def add_speed(self, answer: Mapping[str, Mapping[Any, float]]) -> None:
        """Take one turn's answer in."""
        for mine, theirs in ((self.prefill_s, answer["prefill_s"]), (self.decode_s, answer["decode_s"])):
            for length, seconds in theirs.items():
                mine.setdefault(int(length), []).append(seconds)


@dataclass(frozen=True)
class Row:
    """One row's medians; None where nothing was measured. Rates are tokens a second."""

    peer: str
    setting: str
    about: str
    skipped: str
    decode_short: float | None
    decode_long: float | None
    prefill_128: float | None
    prefill_512: float | None
    cold_s: float | None
    warm_s: float | None
    peak_bytes: int | None
    kl: float | None
    kl_pieces: float | None
    perplexity: float | None
    top1: float | None
    weight_bytes: int | None
    bandwidth_share: float | None
    together_ratio: float | None

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.peer} {self.setting}".strip()


def row(found: Measured, ceiling_gb_per_s: float | None) -> Row:
    """Sum a row up; its share of the ceiling counts the weights alone, read once a token at the short context."""
    decode = {length: rate(1, seconds) for length, seconds in found.decode_s.items()}
    prefill = {length: rate(length, seconds) for length, seconds in found.prefill_s.items()}
    short = decode.get(SHORT)
    moved = short * found.weight_bytes / GB if short else None
    return Row(
        peer=found.peer,
        setting=found.setting,
        about=found.about,
        skipped=found.skipped,
        decode_short=short,
        decode_long=decode.get(LONG),
        prefill_128=prefill.get(PROMPTS[0]),
        prefill_512=prefill.get(PROMPTS[1]),
        cold_s=middle(found.cold_s),
        warm_s=middle(found.warm_s),
        peak_bytes=found.peak_bytes or None,
        kl=found.kl,
        kl_pieces=found.kl_pieces,
        perplexity=found.perplexity,
        top1=found.top1,
        weight_bytes=found.weight_bytes or None,
        bandwidth_share=ratio(moved, ceiling_gb_per_s),
        together_ratio=middle(found.together_ratios),
    )


def middle(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return median(values) if values else None


def rate(tokens: int, seconds: Sequence[float]) -> float | None:
    """Tokens a second by the median time."""
    taken = middle(seconds)
    return tokens / taken if taken else None


def ratio(a: float | None, b: float | None) -> float | None:
    """A / b, or None where one is missing."""
    return None if a is None or not b else a / b


def fastest(rows: Iterable[Row], peer: str, bar: Row | None = None, more: float = 0.0) -> Row | None:
    """The peer's row that decodes fastest at the short context among those that lose at most `more` nats beyond `bar`.

    Of those that decode alike, the one that reads a prompt fastest. No bar where it was not measured. Over many tokens
    at once only a gross loss counts: there are few positions.
    """
    fit = [r for r in rows if r.peer == peer and r.decode_short is not None]
    if bar is not None:
        fit = [r for r in fit if _within(r.kl, bar.kl, more) and _within(r.kl_pieces, bar.kl_pieces, ALLOWED_IN_PIECES)]
    best = max((r.decode_short or 0.0 for r in fit), default=0.0)
    alike = [r for r in fit if (r.decode_short or 0.0) >= (1 - ALIKE) * best]
    return max(alike, key=lambda r: (r.prefill_512 or 0.0, r.decode_short or 0.0), default=None)


def _within(ours: float | None, theirs: float | None, more: float) -> bool:
    return theirs is None or (ours is not None and ours <= theirs + more)


@dataclass(frozen=True)
class Picks:
    """The rows that are compared: theirs, and ours at the quality of each; None where there is none."""

    file: Row | None
    q4_0: Row | None
    genai: Row | None
    ours_same_file: Row | None
    ours: Row | None


def picks(rows: Sequence[Row]) -> Picks:
    """Pick our fastest row in each class and their fastest one in theirs; a GGUF that is Q4_0 itself is both."""
    by_name = {r.name: r for r in rows}
    q4_0 = by_name.get("llama.cpp Q4_0")
    file = by_name.get("llama.cpp file", q4_0)
    same = fastest(rows, "ours", file, ALLOWED_KL)
    return Picks(file, q4_0, fastest(rows, "genai"), same, fastest(rows, "ours", q4_0, ROUNDING))


def headlines(rows: Sequence[Row]) -> dict[str, float | None]:
    """The figures that the last line always has; null where a row is missing."""
    p = picks(rows)
    return {
        "decode_ratio_same_file": _ratio(p.ours_same_file, p.file, "decode_short"),
        "kl_same_file": p.ours_same_file.kl if p.ours_same_file else None,
        "decode_ratio_llama_cpp": _ratio(p.ours, p.q4_0, "decode_short"),
        "prefill512_ratio_llama_cpp": _ratio(p.ours, p.q4_0, "prefill_512"),
        "decode_ratio_genai": _ratio(p.ours, p.genai, "decode_short"),
        "bandwidth_share": p.ours.bandwidth_share if p.ours else None,
        "memory_ratio_llama_cpp": _ratio(p.ours, p.q4_0, "peak_bytes"),
        "kl_ours": p.ours.kl if p.ours else None,
        "kl_llama_cpp": p.q4_0.kl if p.q4_0 else None,
    }


def _ratio(ours: Row | None, theirs: Row | None, what: str) -> float | None:
    return ratio(getattr(ours, what), getattr(theirs, what)) if ours and theirs else None


def beside(rows: Sequence[Row]) -> dict[str, Any]:
    """What the line says more: which rows were compared, the other ratios of the file's own class, and every row."""
    p = picks(rows)
    return {
        "row_same_file": p.ours_same_file.name if p.ours_same_file else None,
        "row_ours": p.ours.name if p.ours else None,
        "row_genai": p.genai.name if p.genai else None,
        "prefill512_ratio_same_file": _ratio(p.ours_same_file, p.file, "prefill_512"),
        "memory_ratio_same_file": _ratio(p.ours_same_file, p.file, "peak_bytes"),
        "kl_file_llama_cpp": p.file.kl if p.file else None,
        "warm_load_s": p.ours.warm_s if p.ours else None,
        "together_ratio": max((r.together_ratio for r in rows if r.together_ratio), default=None),
        "rows": {r.name: asdict(r) for r in rows},
    }
