"""What quantisation cost: compare a packed model with the fp32 model of the same source, on texts and on utterances."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.artifact.names import FRAMES, PLAIN
from models.build.graph import head_graph
from models.build.pack import PackedModel
from models.build.source import Floats, SkillHead
from models.runtime.engine import Decoder, Embeddings, EngineOptions
from models.runtime.frames import log_softmax
from models.skills import encode

Losses = dict[str, Any]

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


def losses(
    packed: PackedModel,
    reference: PackedModel,
    tokenizer: Tokenizer,
    head: SkillHead | None,
    texts: Sequence[Sequence[int]],
) -> Losses:
    """Compare on token sequences (`texts`, or the built-in prose) and, with a label head, on utterances of each skill.

    Mean KL divergence in nats of the fp32 distribution from the quantised one, share of equal best choices, and how
    many positions were compared.
    """
    found: Losses = {}
    if packed.lm_head:
        ids = texts or [tokenizer.encode(text, add_special_tokens=False).ids for text in PROSE.splitlines()]
        found |= _compare("token", _token_reader(packed), _token_reader(reference), ids)
    if head:
        prompts = _prompts(head, tokenizer, packed.shape.vocab_size)
        found |= _compare("intent", _intent_reader(packed, head), _intent_reader(reference, head), prompts)
    return found


def _compare(
    name: str, ours: Callable[[Any], Floats], theirs: Callable[[Any], Floats], inputs: Sequence[Any]
) -> Losses:
    divergence: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    for item in inputs:
        p, q = log_softmax(theirs(item)), log_softmax(ours(item))
        divergence.append((np.exp(p) * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    return {
        f"{name}_mean_kl": round(float(np.concatenate(divergence).mean()), 6),
        f"{name}_top1_agreement": round(float(np.concatenate(same).mean()), 4),
        f"{name}_positions": sum(len(s) for s in same),
    }


def _decoder(packed: PackedModel, variant: str, inputs: Floats | None, longest: int = 1024) -> Decoder:
    embeddings = Embeddings(packed.embeddings(), inputs, packed.shape.width)
    return Decoder(packed.shape, packed.segments(variant), embeddings, EngineOptions(context=longest, sequences=1))


def _token_reader(packed: PackedModel) -> Callable[[Sequence[int]], Floats]:
    """Return a function from ids to logits (T, V)."""
    decoder = _decoder(packed, PLAIN, None)
    weights = packed.group("head")
    settings = ort.SessionOptions()
    settings.add_external_initializers(list(weights), [ort.OrtValue.ortvalue_from_numpy(v) for v in weights.values()])
    graph = head_graph(packed.shape, {name: value.shape for name, value in weights.items()})
    head = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])

    def read(ids: Sequence[int]) -> Floats:
        with decoder.sequence() as sequence:
            hidden = sequence.hidden(ids[: decoder.context])
        return np.asarray(head.run(["logits"], {"hidden": hidden[None]})[0][0], np.float32)

    return read


def _intent_reader(packed: PackedModel, head: SkillHead) -> Callable[[tuple[str, Sequence[int]]], Floats]:
    """Return a function from a skill and a prompt to its intent logits (1, n_intents)."""
    decoder = _decoder(packed, FRAMES if packed.split else PLAIN, head.inputs)

    def read(prompt: tuple[str, Sequence[int]]) -> Floats:
        with decoder.sequence() as sequence:
            state = sequence.hidden(prompt[1])[-1:]
        return state @ head.labels[head.skills.intent_rows(prompt[0])].T

    return read


def _prompts(head: SkillHead, tokenizer: Tokenizer, vocab_size: int) -> list[tuple[str, Sequence[int]]]:
    def ids(word: str) -> Sequence[int]:
        found: Sequence[int] = tokenizer.encode(word, add_special_tokens=False).ids
        return found

    pairs = ((name, text) for name in head.skills.names for text in UTTERANCES.splitlines())
    return [(name, encode(head.skills, name, text, ids, vocab_size).ids) for name, text in pairs]


def describe(found: Mapping[str, Any]) -> str:
    """One line for people."""
    parts = [
        f"{what}s: mean KL {found[f'{what}_mean_kl']:.4f}, top-1 agreement {found[f'{what}_top1_agreement']:.3f} "
        f"over {found[f'{what}_positions']} positions"
        for what in ("token", "intent")
        if f"{what}_mean_kl" in found
    ]
    return "loss against fp32: " + ("; ".join(parts) or "none, this is fp32")
