"""A tier whose layers are spread over shards: the head embeds and runs the first, the last picks the tokens.

The head opens one session per request on the next shard, that one on its own next, and so on; states go down this
chain and answers come back up. When a link dies, whoever held its near end opens another to a replica of that range
and sends again what it sent before, in the same pieces, so that every pass is the same as it was, and so are its bits.
A draft is one piece more or less: the last shard picks after each of its tokens, and the next piece says with `start`
how many of them held.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from models.artifact.names import FRAMES, PLAIN
from models.artifact.shape import LlamaShape
from models.artifact.store import Artifact
from models.errors import ArtifactError, LinkLostError, ShardsLostError
from models.runtime.decode import Guide
from models.runtime.descent import Descent, LayerDescent
from models.runtime.engine import CHUNK, TILE, Embeddings, check_room, chunks, passes
from models.runtime.exits import cuts_for
from models.runtime.layers import LONG, Floats
from models.runtime.links import GREEDY, Answer, Choice, Link, LinkSession, Opening, Picks, Piece, Want, masked
from models.runtime.local import LocalTier, SkillReader, TextWriter, card_of, stats_of
from models.runtime.prefixes import BLOCK_TOKENS, block_keys
from models.runtime.sampling import Draws, Pick, pick
from models.runtime.sessions import EngineOptions, takes_rows
from models.runtime.stage import Lane, Stage, StageSession
from models.runtime.tally import Tally
from models.runtime.tier import NO_EXIT, Limits, TierStats

if TYPE_CHECKING:
    from models.artifact.keys import KeyWrapper

Clock = Callable[[], float]
_LEFT_ALONE_S = 1.0
"""How long a replica that was lost is asked last."""


_PLACE_S = 0.4
"""How long a session waits for a place at a shard: those before it may be about to leave."""


# ---- replicas: which one, and what happens when it is lost ----


@dataclass(frozen=True)
class ReplicaStats:
    """Since the start: how often a session lost a shard, went on elsewhere, left a shard that stops, ended for good."""

    lost: int = 0
    resumed: int = 0
    moved: int = 0
    ended: int = 0


class Replicas:
    """The shards that serve the next range; `links` are read anew for each session, since they come and go."""

    def __init__(self, links: Callable[[], Sequence[Link]], clock: Clock = time.monotonic) -> None:
        self._links, self._clock = links, clock
        self._lock = threading.Lock()
        self._failed: dict[str, float] = {}
        self._turn = 0
        self.stats = ReplicaStats()
        self.waits = Tally()
        """From a single token's states handed on to the token that came back, all that lies beyond included; but for
        each session's first one, which waits for the prompt."""

    @property
    def name(self) -> str:
        """All of them."""
        return ", ".join(link.name for link in self._links()) or "nobody"

    def open(self, opening: Opening) -> ReplayedSession:
        """Begin a session that survives the loss of a replica; nothing is asked yet."""
        return ReplayedSession(self, opening)

    def in_order(self) -> list[Link]:
        """All replicas in turn, those lost a moment ago last."""
        links = list(self._links())
        with self._lock:
            self._turn += 1
            turn, now = self._turn, self._clock()
            rotated = [links[(turn + n) % len(links)] for n in range(len(links))]
            return sorted(rotated, key=lambda link: now - self._failed.get(link.name, -math.inf) < _LEFT_ALONE_S)

    def failed(self, link: Link) -> None:
        """Note that a replica was lost."""
        with self._lock:
            self._failed[link.name] = self._clock()

    def count(self, *, lost: int = 0, resumed: int = 0, moved: int = 0, ended: int = 0) -> None:
        """Add to the stats."""
        with self._lock:
            s = self.stats
            self.stats = ReplicaStats(s.lost + lost, s.resumed + resumed, s.moved + moved, s.ended + ended)


class ReplayedSession:
    """A session that keeps what it sent, and sends it again to another replica when the one it uses is lost.

    Between two answers a replica that was lost is tried once more, after the others: silence on a busy machine looks
    like death. Whoever refuses, or is lost again, is not. `ShardsLostError` when none is left.
    """

    leaving, held_tokens = False, 0

    def __init__(self, replicas: Replicas, opening: Opening) -> None:
        self._replicas, self._opening = replicas, opening
        self._before: Sequence[Piece] = ()  # what the prefix comes to, should the other end not hold it
        self._sent: list[Piece] = []
        self._doubted: set[str] = set()
        self._tried: set[str] = set()
        self._link: Link | None = None
        self._session: LinkSession | None = None
        self._reason, self._stays = "there is none", False
        self._sent_s, self._prompt_read = math.inf, False

    def begin(self, prefix: Sequence[bytes], made: Floats) -> None:
        """Say which blocks the prompt begins with, and what the layers here made (n, C) of those held: call it first.

        What is sent then goes on behind these.
        """
        self._opening = replace(self._opening, prefix=tuple(prefix))
        self._before = [Piece(made[at : at + CHUNK], at) for at in range(0, len(made), CHUNK)]

    def send(self, piece: Piece) -> None:
        """Hand on a piece; raises `ShardsLostError`."""
        self._sent.append(piece)
        self._sent_s = time.perf_counter() if self._prompt_read and is_step(piece) else math.inf
        if self._session is None:
            self._connect()
            return
        with self._surviving() as session:
            session.send(piece)

    def receive(self) -> Answer:
        """The answer to the last piece; raises `ShardsLostError`."""
        while True:
            with self._surviving() as session:
                answer = session.receive()
                break
        self._sent[-1] = replace(self._sent[-1], again=True)
        self._doubted.clear()
        if not math.isinf(self._sent_s):
            self._replicas.waits.add(time.perf_counter() - self._sent_s)
        self._prompt_read = True
        self._tried.clear()
        if session.leaving and not self._stays:
            self._move()
        return answer

    def close(self) -> None:
        """Let go."""
        if self._session is not None:
            self._session.close()
            self._session = None

    @contextmanager
    def _surviving(self) -> Iterator[LinkSession]:
        """Lend the session; if it is lost meanwhile, connect anew (what was sent is then sent again)."""
        assert self._session is not None  # noqa: S101  # made by the first `send`
        try:
            yield self._session
        except LinkLostError as error:
            self._lost(error)
            self._connect()
            self._replicas.count(resumed=1)

    def _lost(self, error: LinkLostError) -> None:
        self._sent_s, self._prompt_read = math.inf, False  # what a loss takes is no measure of the link
        if self._link is not None:
            self._replicas.failed(self._link)
            (self._tried if self._link.name in self._doubted else self._doubted).add(self._link.name)
        self._reason = str(error)
        self._replicas.count(lost=1)
        self.close()

    def _connect(self) -> None:
        """Open a session on the first replica that takes one and send it everything; raises `ShardsLostError`."""
        for link in self._replicas.in_order():
            if link.name in self._tried:
                continue
            try:
                self._link, self._session = link, self._opened(link)
            except LinkLostError as error:
                self._replicas.failed(link)
                self._tried.add(link.name)
                self._reason = str(error)
            else:
                self._stays = False
                return
        self._replicas.count(ended=1)
        raise ShardsLostError(
            f"no shard that comes next is left ({self._replicas.name}); the last reason: {self._reason}"
        )

    def _opened(self, link: Link) -> LinkSession:
        session = link.open(self._opening)
        try:
            for piece in (*_behind(self._before, session.held_tokens), *self._sent):
                session.send(piece)
        except BaseException:
            session.close()
            raise
        return session

    def _move(self) -> None:
        """Leave a shard that is about to stop, if another takes the session; else stay for as long as it lasts."""
        others = [link for link in self._replicas.in_order() if link is not self._link]
        for link in others:
            with suppress(LinkLostError):
                fresh = self._opened(link)
                self.close()
                self._link, self._session, self._prompt_read = link, fresh, False
                self._replicas.count(moved=1)
                return
        self._stays = True


def _behind(pieces: Sequence[Piece], tokens: int) -> Iterator[Piece]:
    """What pieces hold behind the first `tokens`."""
    for piece in pieces:
        skipped = min(max(0, tokens - piece.start), len(piece.states))
        if skipped < len(piece.states):
            yield replace(piece, states=piece.states[skipped:], start=piece.start + skipped)


# ---- a shard that is no head ----


def is_step(piece: Piece) -> bool:
    """Whether a piece is one step of decoding: the states of a single token, for the token after it."""
    return piece.want is Want.TOKEN and piece.answered and len(piece.states) == 1


class Relay:
    """One session at a shard: its layers read each piece, and the next shard, if there is one, what they make of it.

    `steps` counts how long steps of decoding take here and beyond, but for the first one.
    """

    def __init__(self, here: StageSession, beyond: LinkSession | None, steps: Tally) -> None:
        self._here, self._beyond, self._steps = here, beyond, steps
        self.held_tokens, self._answered = here.length, False

    def take(self, piece: Piece, tell: Callable[[Answer], None]) -> None:
        """Read a piece, and tell the answer if it wants one. Raises `PromptTooLongError` and what the links raise."""
        began = time.perf_counter()

        def answer(found: Answer) -> None:
            if self._answered and is_step(piece):  # before it is told: the caller's link counts it once it has come
                self._steps.add(time.perf_counter() - began)
            self._answered = True
            tell(found)

        self._here.rewind(piece.start)
        if self._beyond is None:
            self._here.read(piece.states, piece.want, len(piece.choices), partial(_answer, piece, answer))
        else:
            self._here.read(piece.states, piece.want, len(piece.choices), partial(_hand_on, piece, self._beyond))
            if piece.answered:
                answer(self._beyond.receive())


def _hand_on(piece: Piece, beyond: LinkSession, states: Floats) -> None:
    beyond.send(replace(piece, states=states))


def _answer(piece: Piece, tell: Callable[[Answer], None], found: Floats) -> None:
    if piece.answered:
        tell(picked(found, piece.choices) if piece.want is Want.TOKEN else found)


def picked(logits: Floats, choices: Sequence[Choice]) -> Picks:
    """Pick by each row of logits (R, V) as the head says."""
    pairs = zip(logits, choices, strict=True)
    return tuple(pick(masked(row, choice.allowed), choice.limits, choice) for row, choice in pairs)


@contextmanager
def relay(stage: Stage, beyond: Replicas | None, opening: Opening) -> Iterator[Relay]:
    """Open a session at a shard; raises `ArtifactError` for a variant it lacks, `LinkLostError` if it is full."""
    lane = stage.lanes.get(opening.variant)
    if lane is None:
        raise ArtifactError(f"this shard has no variant '{opening.variant}'; it has {', '.join(stage.lanes)}")
    with lane.session(opening, _PLACE_S) as here:
        made = here.recall(opening.prefix)
        further = beyond.open(opening) if beyond is not None else None
        try:
            if further is not None:
                further.begin(opening.prefix, made)
            yield Relay(here, further, stage.steps)
        finally:
            if further is not None:
                further.close()


# ---- the head ----


class PipelineDecoder:
    """The head of one variant: what `SkillReader` and `TextWriter` need of a model."""

    def __init__(
        self,
        lane: Lane,
        embeddings: Embeddings,
        variant: str,
        beyond: Replicas,
        *,
        verifies: bool = False,
        exact: bool = False,
    ) -> None:
        self.shape: LlamaShape = lane.shape
        self.context, self.embeddings = lane.layers.context, embeddings
        self.verifies, self.exact = verifies, exact
        self._lane, self._variant, self._beyond = lane, variant, beyond

    @contextmanager
    def sequence(
        self, deadline: float = math.inf, gone: Callable[[], bool] | None = None
    ) -> Iterator[PipelineSequence]:
        """Lend an empty sequence through all shards; waits while all are in use."""
        opening = Opening(self._variant, deadline, exact=self.exact)
        with relay_head(self._lane, self._beyond, opening) as (here, further):
            yield PipelineSequence(self, here, further, gone)

    @property
    def reach(self) -> int:
        """Layers after which its sequences may stop: this shard's."""
        return self._lane.layers.range.stop

    @property
    def has_long(self) -> bool:
        """Whether passes over many tokens have segments of their own."""
        return self._lane.layers.has_long and not self.exact

    @property
    def alone(self) -> bool:
        """Whether at most one sequence is lent."""
        return self._lane.alone

    def prefix(self, ids: Sequence[int]) -> list[bytes]:
        """The keys of the blocks that a prompt begins with, of which shards may hold some.

        So many that the rest is rounded as if all were read: it is read by what reads many tokens, if there is such,
        and fills tiles of the attention as far as it would (docs/decisions/0016).
        """
        if self._lane.prefixes is None:
            return []
        keys = block_keys(ids[: -LONG - 1], salt=b"exact" if self.exact else b"")
        together = max(1, 2 * self.shape.head_dim // BLOCK_TOKENS)
        return keys[: len(keys) // together * together]


@contextmanager
def relay_head(lane: Lane, beyond: Replicas, opening: Opening) -> Iterator[tuple[StageSession, ReplayedSession]]:
    """Open a session at the head and beyond."""
    with lane.session(opening) as here:
        further = beyond.open(replace(opening, place=here.slot, groups=lane.groups))
        try:
            yield here, further
        finally:
            further.close()


class PipelineSequence:
    """One growing token sequence through all shards. Not for two threads at once."""

    def __init__(
        self,
        decoder: PipelineDecoder,
        here: StageSession,
        further: ReplayedSession,
        gone: Callable[[], bool] | None,
    ) -> None:
        self._decoder, self._here, self._further, self._gone = decoder, here, further, gone
        self._ids: list[int] = []

    @property
    def length(self) -> int:
        """Tokens read."""
        return len(self._ids)

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._here.room

    @property
    def reach(self) -> int:
        """Layers that are here."""
        return self._decoder.reach

    @property
    def verifies(self) -> bool:
        """Whether the last shard can pick after several tokens."""
        return self._decoder.verifies

    @property
    def alone(self) -> bool:
        """Whether no other sequence of this head is lent."""
        return self._decoder.alone

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; other shards learn it with the next piece."""
        del self._ids[length:]
        self._here.rewind(length)

    def logits(self, ids: Sequence[int]) -> Floats:
        """Nobody here has them: `choose` is what is offered."""
        raise NotImplementedError

    def choose(
        self, new: Sequence[int], draft: Sequence[int], guide: Guide, limits: Limits, draws: Draws
    ) -> Sequence[Pick]:
        """Read ids and a draft, and let the last shard pick after each of its tokens.

        Raises `ShardsLostError`, `PromptTooLongError`.
        """
        decoder, found = self._decoder, list[Pick]()
        choices = _choices(guide.ahead(draft), 1 + len(draft), limits, draws)
        left = [*new, *draft]
        check_room(left, decoder.context, self.room)
        begins = not self._ids
        if begins:
            self._recall(new)
            left = left[self.length :]
        cut = passes(left, len(choices), self._gone, begins=not self._ids, long=decoder.has_long, exact=decoder.exact)
        for chunk, rows in cut:
            if not rows:
                self._send(chunk, Want.NOTHING)
                continue
            asked = choices[len(found) :][:rows]
            self._send(chunk, Want.TOKEN, asked)
            answer = self._further.receive()
            if isinstance(answer, np.ndarray) or len(answer) != rows:
                raise ShardsLostError("the last shard answered otherwise than with the tokens that were asked for")
            found += answer
        return found

    def hidden(self, ids: Sequence[int]) -> Floats:
        """Read ids and return the model's normalised states (T, C) at each of them."""
        check_room(ids, self._decoder.context, self.room)
        found = []
        for chunk in chunks(ids, self._gone):
            self._send(chunk, Want.STATES)
            found.append(self._received())
        return np.concatenate(found)

    def descent(self, pieces: Sequence[Sequence[int]]) -> Descent:
        """Begin to read pieces of ids, stopping between layers; later shards are asked for all of them or nothing."""
        check_room([token for piece in pieces for token in piece], self._decoder.context, self.room)
        cut = [chunk for piece in pieces for chunk in chunks(piece, self._gone)]
        rows = [self._decoder.embeddings.rows(chunk) for chunk in cut]
        return _ChainDescent(self, self._here, self._here.descent(rows), cut)

    def pass_on(self, ids: Sequence[int], states: Floats) -> Floats:
        """Let the other shards read what this one made of ids; returns the last one's states (T, C)."""
        self._further.send(Piece(states, self.length, Want.STATES))
        self._ids += ids
        return self._received()

    def _received(self) -> Floats:
        states = self._further.receive()
        if not isinstance(states, np.ndarray):
            raise ShardsLostError("the last shard answered with a token where states were asked for")
        return np.asarray(states, np.float32)

    def _recall(self, ids: Sequence[int]) -> None:
        """Go on behind what this shard holds of a prompt; those after it hold as much, or are sent it."""
        prefix = self._decoder.prefix(ids)
        made = self._here.recall(prefix)
        self._further.begin(prefix, made)
        self._ids += ids[: len(made)]

    def _send(self, ids: Sequence[int], want: Want, choices: Sequence[Choice] = ()) -> None:
        if self._decoder.exact and self._ids and len(ids) % TILE == 1:
            ids = [self._ids[-1], *ids]  # once more: it leaves the same keys and values
            self.rewind(self.length - 1)
        piece = Piece(self._decoder.embeddings.rows(ids), self.length, want, tuple(choices))
        self._here.read(piece.states, want, then=partial(_hand_on, piece, self._further))
        self._ids += ids


class _ChainDescent:
    """Down through the head, and from there through all other shards at once."""

    def __init__(
        self, sequence: PipelineSequence, here: StageSession, below: LayerDescent, pieces: Sequence[Sequence[int]]
    ) -> None:
        self._sequence, self._here, self._below, self._pieces = sequence, here, below, pieces
        self._passed = 0

    def to(self, passed: int) -> Floats:
        reach = self._sequence.reach
        if self._passed < reach:
            self._passed = min(passed, reach)
            states = self._here.go_down(self._below, self._passed)
            if passed <= reach:
                return states
        handed = zip(self._pieces, self._below.pieces, strict=True)
        return np.concatenate([self._sequence.pass_on(ids, states) for ids, states in handed])


def _choices(allowed: Iterator[bytes | None], count: int, limits: Limits, draws: Draws) -> list[Choice]:
    """How to pick so many tokens in a row; those that are forced, or that an answer cannot get to, nobody looks at."""
    bits = list(islice(chain(allowed, repeat(None)), count))
    chances = iter(draws.ahead(sum(each is not None for each in bits)) if limits.temperature > 0 else repeat(0.0))
    how = Choice(limits.temperature, limits.top_p, limits.top_logprobs)
    return [GREEDY if each is None else replace(how, draw=next(chances), allowed=each) for each in bits]


def open_head(
    path: Path,
    name: str,
    stop: int,
    beyond: Replicas,
    options: EngineOptions,
    *,
    lookup_tokens: int = 0,
    exit_threshold: float | None = NO_EXIT,
    keys: KeyWrapper | None = None,
    signer: bytes | None = None,
) -> LocalTier:
    """Load the layers before `stop` and what a head needs; raises what `Artifact.open` raises.

    `lookup_tokens` and `exit_threshold` are explained in `LocalTier.open`: exits among these layers, and the one after
    them, may answer. Options for drafts and the prefix cache hold for text.

    The tier answers like one that holds the whole model, and raises `ShardsLostError` once nobody serves the rest.
    """
    artifact = Artifact.open(path, range(stop), keys, signer).keeping()
    m = artifact.manifest
    stage = Stage.of(artifact, options, cuts_for(m, exit_threshold))
    embeddings = Embeddings(artifact.embeddings(), artifact.labels().get("inputs"), m.architecture.width)
    tokenizer = Tokenizer.from_str(artifact.tokenizer_json())
    verifies = m.lm_head and takes_rows(artifact)
    decoders = {
        variant: PipelineDecoder(
            lane, embeddings, variant, beyond, verifies=verifies, exact=options.exact_drafts and variant == PLAIN
        )
        for variant, lane in stage.lanes.items()
    }
    beside = decoders.get(FRAMES) or decoders.get(PLAIN)
    reader = SkillReader(artifact, beside, tokenizer, m.skills, exit_threshold) if m.skills and beside else None
    writer = TextWriter(artifact, decoders[PLAIN], tokenizer, lookup_tokens) if m.lm_head else None
    context = min(options.context, m.architecture.context)
    lane = stage.lanes.get(PLAIN) or next(iter(stage.lanes.values()))

    def stats() -> TierStats:
        return stats_of(lane.turns, lane.prefixes, reader, writer)

    return LocalTier(card_of(name, m, context, stage.provider), reader, writer, stats)
