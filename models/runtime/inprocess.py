"""A link to a shard in the same process: what a network link does, without one."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack

from models.errors import ArtifactError, LinkLostError, PromptTooLongError
from models.runtime.links import Answer, LinkSession, Opening, Piece
from models.runtime.pipeline import Replicas, relay
from models.runtime.stage import Stage


class InProcessLink:
    """A shard that is called; `beyond` are the shards after it."""

    def __init__(self, stage: Stage, beyond: Replicas | None = None, name: str = "") -> None:
        self._stage, self._beyond = stage, beyond
        self.name = name or f"layers {stage.layers.start} to {stage.layers.stop - 1}"

    def open(self, opening: Opening) -> LinkSession:
        """Begin a session."""
        return _Session(self._stage, self._beyond, opening)


class _Session:
    leaving = False

    def __init__(self, stage: Stage, beyond: Replicas | None, opening: Opening) -> None:
        self._stack = ExitStack()
        self._pieces: deque[Piece] = deque()
        self._answers: deque[Answer] = deque()
        try:
            self._relay = self._stack.enter_context(relay(stage, beyond, opening))
            self.held_tokens = self._relay.held_tokens
        except ArtifactError as error:
            raise LinkLostError(str(error)) from error

    def send(self, piece: Piece) -> None:
        self._pieces.append(piece)  # who sends waits for nobody; who asks for the answer does

    def receive(self) -> Answer:
        try:
            while self._pieces:
                self._relay.take(self._pieces.popleft(), self._answers.append)
        except PromptTooLongError as error:
            raise LinkLostError(str(error)) from error
        return self._answers.popleft()

    def close(self) -> None:
        self._stack.close()
