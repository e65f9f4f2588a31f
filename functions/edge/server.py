"""A shard's gRPC side: takes sessions from the shard before, within bounds, and hands pieces to `models.runtime`."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError

from functions.edge import shard_pb2 as pb
from functions.edge.client import options
from functions.edge.config import LinkConfig, ShardConfig
from functions.edge.lines import LineError, Lines, Promise
from functions.edge.shard_pb2_grpc import ShardServicer, add_ShardServicer_to_server
from functions.edge.tls import Identity
from functions.edge.wire import (
    PROTOCOL,
    MismatchError,
    WireError,
    decode_piece,
    encode_answer,
    message_limit,
    model_digest,
    read_prefix,
)
from functions.serving.web import log_failure
from models.artifact.manifest import Manifest
from models.errors import ArtifactError, LinkLostError, PromptTooLongError, ShardsLostError
from models.runtime.engine import CHUNK
from models.runtime.links import Answer, Opening
from models.runtime.pipeline import Replicas, relay
from models.runtime.stage import Stage

_LOG = logging.getLogger(__name__)
_SWEEP_S = 0.25
_STREAMS_A_SESSION = 3
"""Of each variant one is at work, and one more may wait for its place."""


class StrangerError(WireError):
    """The caller is not one of those that may ask."""


_STATUS: dict[type[Exception], grpc.StatusCode] = {
    StrangerError: grpc.StatusCode.PERMISSION_DENIED,
    MismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    ArtifactError: grpc.StatusCode.FAILED_PRECONDITION,
    WireError: grpc.StatusCode.INVALID_ARGUMENT,
    LinkLostError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    PromptTooLongError: grpc.StatusCode.OUT_OF_RANGE,
    ShardsLostError: grpc.StatusCode.ABORTED,
}
"""What each fault is to a caller."""


@dataclass(eq=False)
class Heard:
    """When a session last said something, None while it is being answered; `tell`: its line, if it has one."""

    context: Any
    since: float | None
    tell: Callable[[pb.FromShard], None] | None = None


class SessionService(ShardServicer):
    """Takes sessions, and ends them; `leaving` says whether the process is about to stop."""

    def __init__(
        self,
        manifest: Manifest,
        config: LinkConfig,
        identity: Identity | None,
        leaving: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manifest, self.clock, self.leaving = manifest, clock, leaving
        self._config, self._identity = config, identity
        self._digest = model_digest(manifest)
        self._sessions: dict[int, Heard] = {}
        self._ended = threading.Event()
        self._lines: Lines | None = None

    @property
    def open_sessions(self) -> int:
        """Streams at work."""
        return len(self._sessions)

    def start(self) -> None:
        """Take lines, and watch sessions."""
        if self._config.line is not None:
            shape = self.manifest.architecture
            most = message_limit(shape.width, shape.vocab_size, CHUNK)
            self._lines = Lines(self._config.line, most, self._identity)
            self._lines.start()
        threading.Thread(target=self._watch, name="idle", daemon=True).start()

    def _watch(self) -> None:
        """End sessions that are silent for too long, until `stop`."""
        while not self._ended.wait(_SWEEP_S):
            since = self.clock() - self._config.idle_s
            for heard in list(self._sessions.values()):
                if heard.since is not None and heard.since < since:
                    heard.context.cancel()

    def stop(self) -> None:
        """Watch no more, and take no lines."""
        self._ended.set()
        if self._lines is not None:
            self._lines.stop()

    def Session(self, request_iterator: Iterator[pb.ToShard], context: Any) -> Iterator[pb.FromShard]:  # noqa: N802
        """One request."""
        heard = Heard(context, self.clock())
        self._sessions[id(heard)] = heard
        try:
            self._check_peer(context)
            yield from self._conversation(request_iterator, heard)
        except LineError as error:
            if context.is_active():
                _abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"the line beside the session: {error}")
        except tuple(_STATUS) as error:
            _abort(context, next(code for kind, code in _STATUS.items() if isinstance(error, kind)), str(error))
        except grpc.RpcError:  # the other end is gone
            pass
        except Exception as error:  # noqa: BLE001  # whatever it is, the caller learns that it was here
            if context.is_active():
                log_failure(error)
                _abort(context, grpc.StatusCode.INTERNAL, "something broke here; the shard's log says where")
        finally:
            del self._sessions[id(heard)]

    def _conversation(self, stream: Iterator[pb.ToShard], heard: Heard) -> Iterator[pb.FromShard]:
        """What goes through the stream: all, or what a session begins with, if the caller takes a line for the rest."""
        first = next(stream, None)
        begins = [] if first is None else [first]
        if self._lines is None or first is None or not first.open.line:
            yield from self.answers(chain(begins, stream), heard)
            return
        with self._lines.promise() as promise, closing(self.answers(chain(begins, _said(promise)), heard)) as answers:
            opened = next(answers)
            opened.opened.line_port, opened.opened.line_token = promise.port, promise.token
            if not heard.context.add_callback(promise.cut):
                return
            yield opened
            heard.tell = lambda message: promise.line().write(message.SerializeToString())
            for answer in answers:
                heard.tell(answer)

    def answers(self, messages: Iterator[pb.ToShard], heard: Heard) -> Generator[pb.FromShard]:
        """What a session is told: first that it is open."""
        raise NotImplementedError

    def opened(self, message: pb.ToShard | None, called: str) -> pb.Open:
        """Read what a session begins with, and check that it is for this model; raises `WireError`."""
        if message is None or message.WhichOneof("what") != "open":
            raise WireError("a session begins with 'open'")
        said = message.open
        if said.protocol != PROTOCOL:
            raise MismatchError(f"the caller speaks protocol {said.protocol}, this {called} {PROTOCOL}")
        if said.model_digest != self._digest:
            m = self.manifest
            raise MismatchError(f"the caller has another model than this {called}'s {m.model_id} {m.model_version}")
        if not 0 <= said.remaining_ms < math.inf:
            raise WireError("'remaining_ms' of 'open' is no time")
        return said

    def expires(self, said: pb.Open) -> float:
        """When a session is of no use any more, on this clock."""
        return self.clock() + said.remaining_ms / 1e3 if said.remaining_ms else math.inf

    def _check_peer(self, context: Any) -> None:
        if self._identity is None:
            return
        names = [name.decode("utf-8", "replace") for name in context.auth_context().get(_ALTERNATIVE_NAMES, ())]
        if not self._identity.trusts(names):
            raise StrangerError("the caller's SPIFFE id is not among SHARD_PEERS")


class ShardService(SessionService):
    """Answers sessions with one stage."""

    def __init__(
        self,
        stage: Stage,
        beyond: Replicas | None,
        config: ShardConfig,
        identity: Identity | None,
        leaving: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(stage.manifest, config, identity, leaving, clock)
        self._stage, self._beyond, self._encoding = stage, beyond, config.states

    def answers(self, messages: Iterator[pb.ToShard], heard: Heard) -> Generator[pb.FromShard]:
        """Relay pieces and answers."""
        opening = self._opening(next(messages, None))
        shape = self.manifest.architecture
        untold: deque[pb.FromShard] = deque()

        def tell(answer: Answer) -> None:
            (heard.tell or untold.append)(encode_answer(answer, self._encoding, leaving=self.leaving()))

        with relay(self._stage, self._beyond, opening) as session:
            yield pb.FromShard(opened=pb.Opened(held_tokens=session.held_tokens), leaving=self.leaving())
            for message in messages:
                heard.since = None
                if message.WhichOneof("what") != "piece":
                    raise WireError("a session is opened once; after that come pieces")
                session.take(decode_piece(message.piece, shape.width, shape.vocab_size, CHUNK), tell)
                while untold:
                    yield untold.popleft()
                heard.since = self.clock()

    def _opening(self, message: pb.ToShard | None) -> Opening:
        """Check that the caller's states continue here; raises `WireError`."""
        said, layers = self.opened(message, "shard"), self._stage.layers
        if said.ranks:
            raise MismatchError(f"the caller looks for rank {said.rank} of {said.ranks}; this is a shard of layers")
        if said.first_layer != layers.start:
            raise MismatchError(
                f"the caller's states are for layer {said.first_layer}; this shard begins with {layers.start}"
            )
        prefix = read_prefix(said.prefix, self.manifest.architecture.context)
        return Opening(said.variant, self.expires(said), said.place, said.groups, prefix, said.exact)


def _said(promise: Promise) -> Iterator[pb.ToShard]:
    """What comes over a line; raises `LineError`, `WireError`."""
    while (message := promise.line().read()) is not None:
        try:
            yield pb.ToShard.FromString(message)
        except DecodeError:
            raise WireError("the line brought what is no message") from None


_ALTERNATIVE_NAMES = "x509_subject_alternative_name"


def _abort(context: Any, code: grpc.StatusCode, reason: str) -> NoReturn:
    _LOG.warning("session refused or broken off: %s, %s", code.name.lower(), reason)
    context.abort(code, reason)
    raise AssertionError


class Part(Protocol):
    """A part of a model: a shard's or a rank's."""

    @property
    def manifest(self) -> Manifest:
        """Of the whole."""


class ShardServer:
    """The listening side; `start` it, and `stop` it with time for those at work."""

    def __init__(
        self, service: SessionService, part: Part, config: LinkConfig, identity: Identity | None, sessions: int
    ) -> None:
        shape = part.manifest.architecture
        self._service = service
        most = _STREAMS_A_SESSION * sessions  # some wait for a place
        self._server = grpc.server(
            ThreadPoolExecutor(most, "shard"),
            options=[
                *options(message_limit(shape.width, shape.vocab_size, CHUNK)),
                ("grpc.http2.min_ping_interval_without_data_ms", 50),
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=most,
        )
        add_ShardServicer_to_server(service, self._server)  # type: ignore[no-untyped-call]
        if identity is None:
            self.port = self._server.add_insecure_port(f"127.0.0.1:{config.listen}")
        else:
            self.port = self._server.add_secure_port(f"[::]:{config.listen}", identity.server_credentials())

    def start(self) -> None:
        """Take sessions."""
        self._service.start()
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Take no more sessions, and return once those at work are over, or after `grace_s`."""
        self._server.stop(grace_s).wait()
        self._service.stop()
