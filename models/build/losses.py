"""What a build cost: the packed model against the source, layer by layer, on texts and on utterances.

The source's fp32 weights in the same graph are what losses are measured against; that graph itself is held against
the source model run by somebody else (`reference`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.artifact.names import FRAMES, PLAIN
from models.artifact.shape import LlamaShape
from models.build.layerwise import LayerwiseDecoder, LayerwiseHead
from models.build.quantise import Array
from models.build.reference import Expected
from models.build.source import Floats, SkillHead
from models.errors import SourceError
from models.runtime.engine import Embeddings
from models.runtime.frames import log_softmax
from models.skills import encode

Losses = dict[str, Any]
LOGIT_TOLERANCE = 0.01
"""How far a logit may be from the reference's, as a share of the standard deviation of all logits compared."""
LONGEST = 1024
"""Tokens of a text that are looked at."""

PROSE = """\
The harbour wakes before the town does. Fishing boats come in while the street lamps are still lit, and the gulls \
know their names. By the time the bakery opens, half of the catch is on its way inland, packed in ice.
A bridge is never finished. Salt, frost and the weight of lorries work on it every night, so somebody has to walk \
along it with a hammer and listen. A dull sound means that the steel has come loose from the concrete.
To repair a bicycle tyre you need two levers, a patch and some patience. First let out the air, then lift one side of \
the tyre over the rim. Find the hole by holding the tube under water and watching for bubbles.
Water expands when it freezes, which is why a full bottle bursts in the freezer. Most other liquids shrink. The reason \
lies in the way its molecules arrange themselves in a lattice with wide gaps between them.
She had kept every letter in a tin box under the stairs. Years later her grandchildren read them aloud, one each \
evening, and learned that the quiet woman they remembered had once crossed a desert with a theatre company.
Question: what should I pack for two days in the mountains? Answer: a warm layer, a rain jacket, more water than you \
think, a paper map, and something sweet for the last hour of the climb.
"""
"""Texts, one a line, to measure on where none are given."""
UTTERANCES = """\
what is the balance of my savings account
wake me up at half past six tomorrow
play some jazz by miles davis
how long will the drive to the airport take
my card has not arrived yet
add this song to my road trip playlist
will it rain in oslo on friday
book a table for four at an italian place
why was i charged twice
how do i change my pin
rate this novel four out of five
tell me a joke about penguins
"""
"""Utterances, one a line, that every skill is asked."""


@dataclass(frozen=True)
class Probe:
    """Token sequences to measure on: `tokens` by the vocabulary head, `intents` (skill, ids) by the labels."""

    tokens: Sequence[Sequence[int]] = ()
    intents: Sequence[tuple[str, Sequence[int]]] = ()


def probe(
    tokenizer: Tokenizer, head: SkillHead | None, shape: LlamaShape, texts: Sequence[Sequence[int]], *, lm_head: bool
) -> Probe:
    """Take `texts`, or the built-in prose, and, with a label head, the utterances of each skill."""
    longest = min(LONGEST, shape.context)
    ids = texts or [tokenizer.encode(text, add_special_tokens=False).ids for text in PROSE.splitlines()]
    return Probe(
        [some[:longest] for some in ids if some] if lm_head else (),
        _prompts(head, tokenizer, shape.vocab_size) if head else (),
    )


@dataclass
class Side:
    """One of two models compared: first the probe's texts, then its intents, then texts of its own."""

    shape: LlamaShape
    probe: Probe
    split: bool
    exact: bool
    extra: Sequence[Sequence[int]] = ()
    decoder: LayerwiseDecoder = field(init=False)

    def __post_init__(self) -> None:
        aside = FRAMES if self.split else PLAIN
        texts = [(PLAIN, ids) for ids in self.probe.tokens] + [(aside, ids) for _, ids in self.probe.intents]
        texts += [(PLAIN, ids) for ids in self.extra]
        self.decoder = LayerwiseDecoder(self.shape, texts, exact=self.exact)

    def embed(self, table: Mapping[str, Array], inputs: Floats | None) -> None:
        """Begin with the embeddings."""
        self.decoder.embed(Embeddings(table, inputs, self.shape.width))

    def layer(self, n: int, tensors: Mapping[str, Array], final_norm: Floats) -> None:
        """Pass a layer."""
        self.decoder.layer(n, tensors, final_norm)

    def tokens(self) -> list[Floats]:
        """Final states (T, C) of each text."""
        return self.decoder.hidden[: len(self.probe.tokens)]

    def intents(self) -> list[Floats]:
        """Final states (T, C) of each utterance."""
        at = len(self.probe.tokens)
        return self.decoder.hidden[at : at + len(self.probe.intents)]

    def own(self) -> list[Floats]:
        """Final states (T, C) of the texts of its own."""
        return self.decoder.hidden[len(self.probe.tokens) + len(self.probe.intents) :]


class Tally:
    """Collects mean KL divergence, in nats of the reference from the other, and the share of equal best choices."""

    def __init__(self) -> None:
        self._divergence: list[NDArray[np.float64]] = []
        self._same: list[NDArray[np.bool_]] = []

    def add(self, ours: Floats, reference: Floats) -> None:
        """Compare logits (T, V)."""
        p, q = log_softmax(reference), log_softmax(ours)
        self._divergence.append((np.exp(p) * (p - q)).sum(-1))
        self._same.append(p.argmax(-1) == q.argmax(-1))

    def losses(self, name: str) -> Losses:
        """The figures, by names that begin with `name`."""
        return {
            f"{name}_mean_kl": round(float(np.concatenate(self._divergence).mean()), 6),
            f"{name}_top1_agreement": round(float(np.concatenate(self._same).mean()), 4),
            f"{name}_positions": sum(len(same) for same in self._same),
        }


def token_losses(
    ours: Side, our_head: LayerwiseHead, reference: Side, reference_head: LayerwiseHead, name: str = "token"
) -> Losses:
    """Compare the next-token distributions at every position of the probe's texts."""
    tally = Tally()
    for mine, theirs in zip(ours.tokens(), reference.tokens(), strict=True):
        for a, b in zip(our_head.rows(mine), reference_head.rows(theirs), strict=True):
            tally.add(a, b)
    return tally.losses(name)


def intent_losses(ours: Side, reference: Side, head: SkillHead) -> Losses:
    """Compare the intents' distributions at the end of every utterance."""
    tally = Tally()
    for (skill, _), mine, theirs in zip(ours.probe.intents, ours.intents(), reference.intents(), strict=True):
        labels = head.labels[head.skills.intent_rows(skill)].T
        tally.add(mine[-1:] @ labels, theirs[-1:] @ labels)
    return tally.losses("intent")


def check(reference: str, expected: Sequence[Expected], logits_of: Callable[[int], Floats]) -> dict[str, Any]:
    """Hold our fp32 logits (T, V) against those that the source's own model gives, and say how near they are.

    Raises `SourceError` where a logit is further off than `LOGIT_TOLERANCE`, or where our best token would leave the
    path of the reference's greedy answer. Where two best logits are nearer than the tolerance either may win.
    """
    worst, positions, best, written, greedy = 0.0, 0, 0, 0, 0
    for index, case in enumerate(expected):
        ours = logits_of(index)
        unit = float(case.logits.std()) or 1.0
        worst = max(worst, float(np.abs(ours - case.logits).max()) / unit)
        first_two = np.sort(case.logits, -1)[:, -2:]
        clear = first_two[:, 1] - first_two[:, 0] > 2 * LOGIT_TOLERANCE * unit
        same = ours.argmax(-1) == case.logits.argmax(-1)
        positions, best = positions + len(same), best + int(same.sum())
        answer = slice(case.n_prompt - 1, len(case.ids) - 1)
        if not worst <= LOGIT_TOLERANCE or not same[clear].all():
            raise SourceError(
                f"the graph does not compute what {reference} does: logits differ by {worst:.3g} of their deviation; "
                "nothing was written"
            )
        written, greedy = written + len(same[answer]), greedy + int(same[answer].sum())
    return {
        "against": reference,
        "positions": positions,
        "largest_logit_difference": float(f"{worst:.2g}"),
        "best_tokens_equal": best,
        **({"greedy_tokens": written, "greedy_tokens_equal": greedy} if written else {}),
    }


def _prompts(head: SkillHead, tokenizer: Tokenizer, vocab_size: int) -> list[tuple[str, Sequence[int]]]:
    def ids(word: str) -> Sequence[int]:
        found: Sequence[int] = tokenizer.encode(word, add_special_tokens=False).ids
        return found

    pairs = ((name, text) for name in head.skills.names for text in UTTERANCES.splitlines())
    return [(name, encode(head.skills, name, text, ids, vocab_size).ids) for name, text in pairs]


def describe_check(checked: Mapping[str, Any]) -> str:
    """One line for people."""
    if not checked:
        return "not held against the source: it writes no text of its own"
    difference, best, of = (checked[k] for k in ("largest_logit_difference", "best_tokens_equal", "positions"))
    return f"as {checked['against']} in fp32: logits within {difference:g} σ, best token equal at {best} of {of}"


def describe(found: Mapping[str, Any]) -> str:
    """One line for people."""
    parts = [
        f"{title}: mean KL {found[f'{what}_mean_kl']:.4f}, top-1 agreement {found[f'{what}_top1_agreement']:.3f} "
        f"over {found[f'{what}_positions']} positions"
        for what, title in (("token", "tokens"), ("intent", "intents"), ("pruning", "dropped layers, against all"))
        if f"{what}_mean_kl" in found
    ]
    return "loss against fp32: " + ("; ".join(parts) or "none, this is fp32")
