"""What shorter states between two shards cost: their bytes, and how far the next token's distribution moves.

Prose is read token by token through a head shard, and what it hands on through the other, as it is and as it arrives
in each encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bench.errors import BenchError
from functions.edge.wire import Encoding, decode_states, encode_states
from models.artifact.names import PLAIN
from models.artifact.store import Artifact
from models.errors import ArtifactError
from models.runtime.engine import Embeddings
from models.runtime.links import Opening, Want
from models.runtime.sessions import EngineOptions
from models.runtime.stage import Stage

PROSE = Path(__file__).with_name("prose.txt")
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Loss:
    """One encoding: bytes of a token's states, mean KL in nats from fp32's distribution, and how often both agree."""

    states: str
    bytes_per_token: int
    kl: float
    top1_agreement: float


def losses(tier: Path, stop: int, tokens: int, threads: int, report: Report) -> list[Loss]:
    """Cut a tier before layer `stop` and compare; raises `BenchError`."""
    options = EngineOptions(threads, spin=False, sequences=len(Encoding))
    try:
        artifact = Artifact.open(tier)
        stages = [Stage.open(tier, layers, options) for layers in (range(stop), range(stop, _n_layers(artifact)))]
    except ArtifactError as error:
        raise BenchError(str(error)) from error
    head, tail = (stage.lanes[PLAIN] for stage in stages)
    shape = artifact.manifest.architecture
    embeddings = Embeddings(artifact.embeddings(), None, shape.width)
    tokenizer = Tokenizer.from_str(artifact.tokenizer_json())
    ids = tokenizer.encode(PROSE.read_text("utf-8"), add_special_tokens=False).ids[:tokens]
    found: dict[Encoding, list[tuple[float, bool]]] = {encoding: [] for encoding in Encoding}
    opening = Opening(PLAIN, np.inf)
    with ExitStack() as stack:
        near = stack.enter_context(head.session(opening))
        far = {encoding: stack.enter_context(tail.session(opening)) for encoding in Encoding}
        for number, token_id in enumerate(ids):
            states = near.read(embeddings.rows([token_id]), Want.TOKEN)
            logits = {
                encoding: session.read(decode_states(encode_states(states, encoding), shape.width, 1), Want.TOKEN)[0]
                for encoding, session in far.items()
            }
            for encoding, row in logits.items():
                exact = logits[Encoding.FP32]
                found[encoding].append((kl(exact, row), bool(exact.argmax() == row.argmax())))
            report(number + 1, len(ids), "states")
    size = {encoding: len(encode_states(np.ones((1, shape.width), np.float32), encoding).values) for encoding in found}
    return [Loss(e.name.lower(), size[e], *_means(pairs)) for e, pairs in found.items()]


def kl(exact: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Nats from the distribution of some logits (V,) to that of others."""
    p, q = _log_softmax(exact), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _means(pairs: Sequence[tuple[float, bool]]) -> tuple[float, float]:
    return float(np.mean([nats for nats, _ in pairs])), float(np.mean([same for _, same in pairs]))


def _n_layers(artifact: Artifact) -> int:
    return artifact.manifest.architecture.n_layers
