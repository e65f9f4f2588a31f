"""A rank's gRPC side: takes passes from rank 0, answers each sum with its part of it, and adds no more than it must."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from functions.edge import shard_pb2 as pb
from functions.edge.config import LinkConfig
from functions.edge.server import Heard, SessionService
from functions.edge.tls import Identity
from functions.edge.wire import Encoding, MismatchError, WireError, decode_piece, encode_answer, encode_logits
from models.errors import ArtifactError, LinkLostError
from models.runtime.engine import CHUNK
from models.runtime.links import Floats, Piece, Want
from models.runtime.ranked import RankLayers

_PLACE_S = 0.4
"""How long a session waits for a place: those before it may be about to leave."""


class RankService(SessionService):
    """Answers sessions with one rank; of one rank 0 at a time, since two could wait for each other at two ranks."""

    def __init__(
        self,
        layers: RankLayers,
        config: LinkConfig,
        identity: Identity | None,
        leaving: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(layers.manifest, config, identity, leaving, clock)
        self._layers, self._turn = layers, threading.Lock()
        self._lock, self._head, self._of_head = threading.Lock(), "", 0

    def answers(self, messages: Iterator[pb.ToShard], heard: Heard) -> Generator[pb.FromShard]:
        """Run passes, one after the other."""
        said = self._checked(next(messages, None))
        length = 0
        with self._for_head(said.head), self._layers.places.lend(_PLACE_S) as slot:
            yield pb.FromShard(opened=pb.Opened(), leaving=self.leaving())
            for message in messages:
                heard.since = None
                piece = self._piece(message)
                self._layers.check_room(len(piece.states), length)
                with self._turn:
                    yield from self._pass(said.variant, slot, piece, length, messages, heard)
                length += len(piece.states)
                heard.since = self.clock()

    def _pass(
        self, variant: str, slot: int, piece: Piece, length: int, messages: Iterator[pb.ToShard], heard: Heard
    ) -> Iterator[pb.FromShard]:
        layers, is_last = self._layers, self._layers.rank.number + 1 == self._layers.rank.count
        steps = layers.steps(variant, slot, piece.states, length)
        part = next(steps)
        while True:
            yield encode_answer(part[0], Encoding.FP32, leaving=self.leaving())
            heard.since = self.clock()
            message = next(messages, None)
            heard.since = None
            if message is None:
                raise WireError("the session ended in the midst of a pass")
            given = self._piece(message).states
            if given.shape != part.shape[1:]:
                raise WireError(f"a sum of {len(given)} tokens was sent to a pass of {part.shape[1]}")
            try:
                part = steps.send(given + part if is_last else given[None])  # the last is sent the others' sum
            except StopIteration as ended:
                stream: Floats = ended.value
                break
        if piece.want is Want.TOKEN:
            yield encode_logits(layers.logits(stream), leaving=self.leaving())

    def _piece(self, message: pb.ToShard) -> Piece:
        if message.WhichOneof("what") != "piece":
            raise WireError("a session is opened once; after that come pieces")
        shape = self.manifest.architecture
        return decode_piece(message.piece, shape.width, shape.vocab_size, CHUNK)

    def _checked(self, message: pb.ToShard | None) -> pb.Open:
        """Check that the caller means this rank; raises `WireError`, `ArtifactError`."""
        said, mine = self.opened(message, "rank"), self._layers.rank
        if (said.rank, said.ranks) != (mine.number, mine.count):
            looked_for = f"rank {said.rank} of {said.ranks}" if said.ranks else "a shard of layers"
            raise MismatchError(f"the caller looks for {looked_for}; this is rank {mine.number} of {mine.count}")
        if said.variant not in self._layers.variants:
            held = ", ".join(self._layers.variants)
            raise ArtifactError(f"this rank has no variant '{said.variant}'; it has {held}")
        return said

    @contextmanager
    def _for_head(self, head: str) -> Iterator[None]:
        """Count a session of this rank 0; raises `LinkLostError` while another has some."""
        with self._lock:
            if self._of_head and head != self._head:
                raise LinkLostError("another rank 0 has sessions at this rank, which serves one at a time")
            self._head, self._of_head = head, self._of_head + 1
        try:
            yield
        finally:
            with self._lock:
                self._of_head -= 1
