"""A shard's gRPC side: takes sessions from the shard before, within bounds, and hands pieces to `models.runtime`."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from functions.edge import shard_pb2 as pb
from functions.edge.client import options
from functions.edge.config import ShardConfig
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
from models.errors import ArtifactError, LinkLostError, PromptTooLongError, ShardsLostError
from models.runtime.engine import CHUNK
from models.runtime.links import Opening
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
class _Heard:
    """When a session last said something, None while it is being answered."""

    context: Any
    since: float | None


class ShardService(ShardServicer):
    """Answers sessions with one stage; `leaving` says whether the process is about to stop."""

    def __init__(
        self,
        stage: Stage,
        beyond: Replicas | None,
        config: ShardConfig,
        identity: Identity | None,
        leaving: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._beyond, self._config, self._identity = stage, beyond, config, identity
        self._leaving, self._clock = leaving, clock
        self._digest = model_digest(stage.manifest)
        self._sessions: dict[int, _Heard] = {}
        self._ended = threading.Event()

    @property
    def open_sessions(self) -> int:
        """Streams at work."""
        return len(self._sessions)

    def watch(self) -> None:
        """End sessions that are silent for too long, until `stop`."""
        while not self._ended.wait(_SWEEP_S):
            since = self._clock() - self._config.idle_s
            for heard in list(self._sessions.values()):
                if heard.since is not None and heard.since < since:
                    heard.context.cancel()

    def stop(self) -> None:
        """Watch no more."""
        self._ended.set()

    def Session(self, request_iterator: Iterator[pb.ToShard], context: Any) -> Iterator[pb.FromShard]:  # noqa: N802
        """One request."""
        heard = _Heard(context, self._clock())
        self._sessions[id(heard)] = heard
        try:
            self._check_peer(context)
            yield from self._answers(request_iterator, heard)
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

    def _answers(self, messages: Iterator[pb.ToShard], heard: _Heard) -> Iterator[pb.FromShard]:
        opening = self._opening(next(messages, None))
        shape, encoding = self._stage.manifest.architecture, self._config.states
        with relay(self._stage, self._beyond, opening) as session:
            yield pb.FromShard(opened=pb.Opened(held_tokens=session.held_tokens), leaving=self._leaving())
            for message in messages:
                heard.since = None
                if message.WhichOneof("what") != "piece":
                    raise WireError("a session is opened once; after that come pieces")
                answer = session.take(decode_piece(message.piece, shape.width, shape.vocab_size, CHUNK))
                if answer is not None:
                    yield encode_answer(answer, encoding, leaving=self._leaving())
                heard.since = self._clock()

    def _opening(self, message: pb.ToShard | None) -> Opening:
        """Check that the caller's states continue here; raises `WireError`."""
        if message is None or message.WhichOneof("what") != "open":
            raise WireError("a session begins with 'open'")
        said, layers = message.open, self._stage.layers
        if said.protocol != PROTOCOL:
            raise MismatchError(f"the caller speaks protocol {said.protocol}, this shard {PROTOCOL}")
        if said.model_digest != self._digest:
            m = self._stage.manifest
            raise MismatchError(f"the caller has another model than this shard's {m.model_id} {m.model_version}")
        if said.first_layer != layers.start:
            raise MismatchError(
                f"the caller's states are for layer {said.first_layer}; this shard begins with {layers.start}"
            )
        if not 0 <= said.remaining_ms < math.inf:
            raise WireError("'remaining_ms' of 'open' is no time")
        expires = self._clock() + said.remaining_ms / 1e3 if said.remaining_ms else math.inf
        prefix = read_prefix(said.prefix, self._stage.manifest.architecture.context)
        return Opening(said.variant, expires, prefix, said.exact)

    def _check_peer(self, context: Any) -> None:
        if self._identity is None:
            return
        names = [name.decode("utf-8", "replace") for name in context.auth_context().get(_ALTERNATIVE_NAMES, ())]
        if not self._identity.trusts(names):
            raise StrangerError("the caller's SPIFFE id is not among SHARD_PEERS")


_ALTERNATIVE_NAMES = "x509_subject_alternative_name"


def _abort(context: Any, code: grpc.StatusCode, reason: str) -> NoReturn:
    _LOG.warning("session refused or broken off: %s, %s", code.name.lower(), reason)
    context.abort(code, reason)
    raise AssertionError


class ShardServer:
    """The listening side; `start` it, and `stop` it with time for those at work."""

    def __init__(
        self, service: ShardService, stage: Stage, config: ShardConfig, identity: Identity | None, sessions: int
    ) -> None:
        shape = stage.manifest.architecture
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
        self._server.start()
        threading.Thread(target=self._service.watch, name="idle", daemon=True).start()

    def stop(self, grace_s: float) -> None:
        """Take no more sessions, and return once those at work are over, or after `grace_s`."""
        self._server.stop(grace_s).wait()
        self._service.stop()
