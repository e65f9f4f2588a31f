"""Tensor parallel: ranks run the same layers, each with some heads and columns, and add up what comes of them.

After each layer's attention and after its MLP the ranks exchange partial sums, so that all carry the same stream; the
vocabulary is split too, and its logits are joined. A rank opens slices of the one artifact everybody has. Passes go
one sequence at a time, earliest deadline first. Knows tokens as numbers only. T new tokens, C width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.artifact.names import FRAMES, PLAIN
from models.artifact.shape import LlamaShape
from models.artifact.store import Artifact
from models.errors import RankLostError
from models.runtime.descent import Descent, WholeDescent
from models.runtime.engine import Embeddings, check_room, chunks
from models.runtime.exchange import Threads
from models.runtime.links import Opening, Want
from models.runtime.local import LocalTier, SkillReader, TextWriter, card_of
from models.runtime.ranked import RankLayers, ranks_of
from models.runtime.sessions import EngineOptions
from models.runtime.tier import NO_EXIT, TierStats
from models.runtime.turns import Turns

Floats = NDArray[np.float32]


class GroupSession(Protocol):
    """One request's tokens at all ranks; not for two threads at once."""

    @property
    def length(self) -> int:
        """Tokens read so far."""

    def read(self, states: Floats, want: Want) -> Floats:
        """Read embedded tokens (T, C); logits (1, V) after the last or normalised states (T, C), as wanted.

        Raises `ShardsLostError` if a rank is lost for good.
        """

    def reset(self) -> None:
        """Forget everything."""


class Group(Protocol):
    """All ranks of a model, rank 0 in this process; `layers` is what that one holds."""

    @property
    def layers(self) -> RankLayers:
        """Rank 0."""

    def session(self, opening: Opening) -> AbstractContextManager[GroupSession]:
        """Lend an empty session; waits while all are in use."""


class TensorDecoder:
    """What `SkillReader` and `TextWriter` need of a model: one graph variant, run by a group of ranks; no exits."""

    def __init__(self, group: Group, embeddings: Embeddings, variant: str) -> None:
        self.group, self.embeddings, self._variant = group, embeddings, variant
        self.shape: LlamaShape = group.layers.manifest.architecture
        self.context = group.layers.context
        self.scale = np.float32(self.shape.embedding_scale)
        self.reach = 0

    @contextmanager
    def sequence(self, deadline: float = math.inf, gone: Callable[[], bool] | None = None) -> Iterator[TensorSequence]:
        """Lend an empty sequence; waits while all are in use. Passes of the earlier `deadline` go first."""
        with self.group.session(Opening(self._variant, deadline)) as session:
            yield TensorSequence(self, session, gone)


class TensorSequence:
    """One growing token sequence."""

    def __init__(self, decoder: TensorDecoder, session: GroupSession, gone: Callable[[], bool] | None) -> None:
        self._decoder, self._session, self._gone = decoder, session, gone

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self._session.length

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._decoder.context - self._session.length

    def reset(self) -> None:
        """Forget everything."""
        self._session.reset()

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read ids and return logits (V,) for the next token; raises `PromptTooLongError`, `ShardsLostError`."""
        check_room(ids, self._decoder.context, self.room)
        *before, last = chunks(ids, self._gone)
        for chunk in before:
            self._read(chunk, Want.NOTHING)
        logits: Floats = self._read(last, Want.TOKEN)[0]
        return logits

    def hidden(self, ids: Sequence[int]) -> Floats:
        """Read ids and return the model's normalised states (T, C) at each of them."""
        check_room(ids, self._decoder.context, self.room)
        return np.concatenate([self._read(chunk, Want.STATES) for chunk in chunks(ids, self._gone)])

    def descent(self, pieces: Sequence[Sequence[int]]) -> Descent:
        """Begin to read pieces of ids, all of it at once: nothing stops between layers here."""
        return WholeDescent(self.hidden, pieces)

    def _read(self, ids: Sequence[int], want: Want) -> Floats:
        return self._session.read(self._decoder.embeddings.rows(ids) * self._decoder.scale, want)


# ---- ranks that are threads of this process ----


class ThreadGroup:
    """A `Group` whose ranks are threads of this process."""

    def __init__(self, ranks: Sequence[RankLayers], meeting: Threads) -> None:
        self.ranks, self._meeting, self.turns = tuple(ranks), meeting, Turns()
        self._pool = ThreadPoolExecutor(len(ranks), "rank")

    @classmethod
    def open(cls, artifact: Artifact, count: int, options: EngineOptions) -> ThreadGroup:
        """Open an artifact for so many ranks; raises `ArtifactError` where it cannot be split, with the reason."""
        ranks = [RankLayers(artifact, rank, options) for rank in ranks_of(artifact, count)]
        return cls(ranks, Threads(count))

    @property
    def layers(self) -> RankLayers:
        """Rank 0."""
        return self.ranks[0]

    def close(self) -> None:
        """End the ranks' threads."""
        self._pool.shutdown()

    @contextmanager
    def session(self, opening: Opening) -> Iterator[_ThreadSession]:
        """Lend an empty session; waits while all are in use."""
        with self.layers.places.lend() as slot:
            yield _ThreadSession(self, slot, opening)

    def run(self, variant: str, slot: int, states: Floats, length: int, want: Want) -> Floats:
        """Let all ranks read states (T, C); only for whoever has the turn."""
        works = [self._pool.submit(self._rank, rank, variant, slot, states, length, want) for rank in self.ranks]
        wait(works)
        self._meeting.reset()
        errors = [error for work in works if (error := work.exception())]
        if errors:  # the one that failed first, not those that then waited in vain
            raise next((error for error in errors if not isinstance(error, RankLostError)), errors[0])
        return works[0].result()

    def _rank(self, rank: RankLayers, variant: str, slot: int, states: Floats, length: int, want: Want) -> Floats:
        try:
            return rank.run(variant, slot, states, length, want, self._meeting.end(rank.rank.number))
        except BaseException:
            self._meeting.abort()  # the others would wait for ever
            raise


class _ThreadSession:
    def __init__(self, group: ThreadGroup, slot: int, opening: Opening) -> None:
        self._group, self._slot, self._opening, self.length = group, slot, opening, 0

    def read(self, states: Floats, want: Want) -> Floats:
        found: list[Floats] = []

        def run(_: object) -> None:
            found.append(self._group.run(self._opening.variant, self._slot, states, self.length, want))

        self._group.turns.take(self, self._opening.expires, run)
        self.length += len(states)
        return found[0]

    def reset(self) -> None:
        self.length = 0


# ---- the tier ----


def open_tier(artifact: Artifact, name: str, group: Group) -> LocalTier:
    """A tier that answers like one that holds the whole model; raises `ArtifactError`."""
    m, layers = artifact.manifest, group.layers
    embeddings = Embeddings(artifact.embeddings(), artifact.labels().get("inputs"), m.architecture.width)
    tokenizer = Tokenizer.from_str(artifact.tokenizer_json())
    decoders = {variant: TensorDecoder(group, embeddings, variant) for variant in layers.variants}
    beside = decoders.get(FRAMES) or decoders[PLAIN]
    reader = SkillReader(artifact, beside, tokenizer, m.skills, NO_EXIT) if m.skills else None
    writer = TextWriter(artifact, decoders[PLAIN], tokenizer)
    return LocalTier(card_of(name, m, layers.context, layers.provider), reader, writer, TierStats)
