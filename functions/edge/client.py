"""A gRPC link to one shard: the far end of `models.runtime.links`. Its failures become `LinkLostError`, once, here."""

from __future__ import annotations

import logging
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from functions.edge import shard_pb2 as pb
from functions.edge.config import is_loopback
from functions.edge.lines import Line, LineError, call
from functions.edge.shard_pb2_grpc import ShardStub
from functions.edge.tls import Identity, Stamp
from functions.edge.wire import PROTOCOL, Encoding, WireError, decode_answer, encode_piece, read_held, sent_prefix
from models.errors import LinkLostError, ShardsLostError
from models.runtime.links import Answer, Link, LinkSession, Opening, Piece

_LOG = logging.getLogger(__name__)
CONNECT_MS = 400
"""How long a connection may take to be made, and a handshake to be looked at."""
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 200, 250
"""A shard that says nothing for the sum of both is gone: under half a second."""
_VERDICT_S = 0.5
"""How long a line that broke waits for its stream to say why: as long as silence takes to be found out."""


@dataclass(frozen=True)
class Hello:
    """What this end says of itself: the model, and the first layer that its states are for; and sizes to check by.

    With ranks also which rank it calls, of how many, and a name for itself.
    """

    model_digest: str
    first_layer: int
    width: int
    vocab_size: int
    tokens: int
    rank: int = 0
    ranks: int = 0
    head: str = ""


def options(message_bytes: int) -> list[tuple[str, int]]:
    """What both ends of a channel are told."""
    return [
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # without it gRPC 1.85 waits for a minute
        ("grpc.http2.max_pings_without_data", 0),
    ]


_CALLER_OPTIONS = [
    ("grpc.min_reconnect_backoff_ms", CONNECT_MS),
    ("grpc.initial_reconnect_backoff_ms", CONNECT_MS),
    ("grpc.max_reconnect_backoff_ms", CONNECT_MS),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


class _Channel:
    """A channel that is closed when nobody uses it any more and it was retired."""

    def __init__(self, channel: grpc.Channel, stamp: Stamp) -> None:
        self.stub, self.stamp = ShardStub(channel), stamp  # type: ignore[no-untyped-call]
        self.has_lines = True
        self._channel, self._users, self._retired = channel, 0, False
        self._lock = threading.Lock()

    def enter(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            unused = self._retired and not self._users
        if unused:
            self._channel.close()

    def retire(self) -> None:
        with self._lock:
            unused, self._retired = not self._users and not self._retired, True
        if unused:
            self._channel.close()


class GrpcLink:
    """One address; its channel is made when it is first needed, and anew after a loss or with a new certificate."""

    def __init__(
        self, address: str, hello: Hello, encoding: Encoding, message_bytes: int, identity: Identity | None
    ) -> None:
        self.name = address
        self._hello, self._encoding, self._identity = hello, encoding, identity
        self._message_bytes, self._options = message_bytes, [*options(message_bytes), *_CALLER_OPTIONS]
        self._channel: _Channel | None = None
        self._lock = threading.Lock()

    def open(self, opening: Opening) -> LinkSession:
        """Begin a session, which the shard has taken when this returns; raises `LinkLostError`."""
        channel = self._entered()
        try:
            try:
                return _Session(self, channel, opening)
            except _NoLineError as error:
                _LOG.warning("sessions at %s stay on their streams: %s", self.name, error)
                channel.has_lines = False
                return _Session(self, channel, opening)
        except BaseException:
            channel.leave()
            raise

    def close(self) -> None:
        """Let go of the channel, once its sessions are over."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.retire()

    def lost(self, channel: _Channel) -> None:
        """Use this channel no more."""
        with self._lock:
            if self._channel is channel:
                self._channel = None
        channel.retire()

    def _entered(self) -> _Channel:
        with self._lock:
            stamp = self._identity.current()[0] if self._identity else ()
            if self._channel is not None and self._channel.stamp != stamp:
                self._channel.retire()
                self._channel = None
            if self._channel is None:
                self._channel = _Channel(self._made(), stamp)
            self._channel.enter()
            return self._channel

    def _made(self) -> grpc.Channel:
        if self._identity is None:
            return grpc.insecure_channel(self.name, self._options)
        host, _, port = self.name.rpartition(":")
        name = self._identity.server_name(host.strip("[]"), int(port), CONNECT_MS / 1e3)
        _, m = self._identity.current()
        credentials = grpc.ssl_channel_credentials(m.authority, m.key, m.certificate)
        return grpc.secure_channel(self.name, credentials, [*self._options, ("grpc.ssl_target_name_override", name)])

    def call_line(self, opened: pb.Opened) -> Line | None:
        """Connect to the line that the shard has for a session, if it has one; raises `OSError`."""
        if not opened.line_port:
            return None
        host = self.name.rpartition(":")[0].strip("[]")
        at = host, opened.line_port
        return call(at, opened.line_token, self._message_bytes, CONNECT_MS / 1e3, self._identity)

    def open_message(self, opening: Opening, remaining_s: float, *, line: bool) -> pb.ToShard:
        """What a session begins with."""
        remaining_ms = 0.0 if math.isinf(remaining_s) else 1e3 * remaining_s
        return pb.ToShard(
            open=pb.Open(
                protocol=PROTOCOL,
                model_digest=self._hello.model_digest,
                first_layer=self._hello.first_layer,
                variant=opening.variant,
                remaining_ms=remaining_ms,
                rank=self._hello.rank,
                ranks=self._hello.ranks,
                head=self._hello.head,
                place=opening.place,
                groups=opening.groups,
                prefix=sent_prefix(opening, self._encoding),
                exact=opening.exact,
                line=line,
            )
        )

    def held_tokens(self, message: pb.FromShard, opening: Opening) -> int:
        """What the shard says that it holds of the prefix; raises `LinkLostError`."""
        try:
            return read_held(message.opened, opening)
        except WireError as error:
            raise LinkLostError(f"{self.name}: {error}") from error

    def encode(self, piece: Piece) -> pb.ToShard:
        """A piece as a message."""
        return encode_piece(piece, self._encoding)

    def decode(self, message: pb.FromShard) -> Answer:
        """Read an answer; raises `LinkLostError`."""
        h = self._hello
        try:
            return decode_answer(message, h.width, h.vocab_size, h.tokens)
        except WireError as error:
            raise LinkLostError(f"{self.name} sent what cannot be read: {error}") from error


class _NoLineError(Exception):
    """The line that a shard promised cannot be had."""


class _Session:
    """One stream, and the line beside it, if the shard has one.

    The stream knows the deadline, the other end's silence and its refusals: when it is over, so is the line.
    """

    def __init__(self, link: GrpcLink, channel: _Channel, opening: Opening) -> None:
        remaining_s = opening.expires - time.monotonic()
        if remaining_s <= 0:
            raise ShardsLostError("the deadline passed before the next shard was asked")
        self._link, self._channel, self._closed = link, channel, False
        self._out: queue.SimpleQueue[pb.ToShard | None] = queue.SimpleQueue()
        self._out.put(link.open_message(opening, remaining_s, line=channel.has_lines))
        timeout_s = None if math.isinf(remaining_s) else remaining_s
        self._call: Any = channel.stub.Session(iter(self._out.get, None), timeout=timeout_s)
        self.leaving, self._over = False, threading.Event()
        self._line: Line | None = None
        try:
            message = self._next()
            self.held_tokens = link.held_tokens(message, opening)
            self._line = self._called(message.opened)
        except BaseException:
            self._end()
            raise

    def _called(self, opened: pb.Opened) -> Line | None:
        try:
            line = self._link.call_line(opened)
        except OSError as error:
            raise _NoLineError(str(error)) from error
        if line is not None and not self._call.add_callback(lambda: self._ended(line)):
            self._ended(line)
        return line

    def _ended(self, line: Line) -> None:
        self._over.set()
        line.cut()

    def send(self, piece: Piece) -> None:
        """Hand on a piece; that it is lost shows when the answer is asked for."""
        message = self._link.encode(piece)
        if self._line is None:
            self._out.put(message)
            return
        with suppress(LineError):
            self._line.write(message.SerializeToString())

    def receive(self) -> Answer:
        """The next answer."""
        return self._link.decode(self._next())

    def close(self) -> None:
        """End the stream; what is on its way is dropped."""
        if not self._closed:
            self._end()
            self._channel.leave()

    def _end(self) -> None:
        self._closed = True
        self._out.put(None)
        self._call.cancel()
        if self._line is not None:
            self._line.close()

    def _next(self) -> pb.FromShard:
        message = self._streamed() if self._line is None else self._read(self._line)
        self.leaving = message.leaving
        return message

    def _streamed(self) -> pb.FromShard:
        try:
            message: pb.FromShard = next(self._call)
        except StopIteration:
            raise LinkLostError(f"{self._link.name} ended the session") from None
        except grpc.RpcError:
            raise self._failure() from None
        return message

    def _read(self, line: Line) -> pb.FromShard:
        try:
            said = line.read()
            message = None if said is None else pb.FromShard.FromString(said)
        except (LineError, DecodeError) as error:
            raise self._broken(str(error)) from None
        if message is None:
            raise self._broken("it ended")
        return message

    def _broken(self, fault: str) -> LinkLostError | ShardsLostError:
        """Why the line broke: the stream says so, if it is over too."""
        if self._over.wait(_VERDICT_S) and self._call.code() is not grpc.StatusCode.OK:
            return self._failure()
        return LinkLostError(f"{self._link.name}: the line beside the session broke, {fault}")

    def _failure(self) -> LinkLostError | ShardsLostError:
        code, said = self._call.code(), self._call.details()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return ShardsLostError("the deadline passed while a shard was at work")
        if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}:
            self._link.lost(self._channel)
        return LinkLostError(f"{self._link.name}: {code.name.lower()}, {said}")


class Directory:
    """The links to all replicas behind some addresses; a name that stands for several machines is looked up anew."""

    def __init__(
        self, addresses: Sequence[str], make: Callable[[str], GrpcLink], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._addresses, self._make, self._clock = addresses, make, clock
        self._links: dict[str, GrpcLink] = {}
        self._lock = threading.Lock()
        self._looked_up, self._found = -math.inf, tuple[str, ...]()

    def links(self) -> Sequence[Link]:
        """All there are now."""
        with self._lock:
            if self._clock() - self._looked_up >= _LOOKUP_S:
                self._look_up()
            return [self._links[address] for address in self._found]

    def close(self) -> None:
        """Let go of all channels."""
        with self._lock:
            for link in self._links.values():
                link.close()

    def _look_up(self) -> None:
        found = tuple(dict.fromkeys(a for address in self._addresses for a in _resolved(address)))
        for gone in self._links.keys() - set(found):
            self._links.pop(gone).close()
        for new in set(found) - self._links.keys():
            self._links[new] = self._make(new)
        self._found, self._looked_up = found, self._clock()


_LOOKUP_S = 5.0


def _resolved(address: str) -> list[str]:
    """Each machine's own address; the address itself if there is nothing to look up."""
    host, _, port = address.rpartition(":")
    if is_loopback(host):
        return [address]
    with suppress(OSError):
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        return [f"[{i[4][0]}]:{port}" if i[0] == socket.AF_INET6 else f"{i[4][0]}:{port}" for i in found]
    return [address]
