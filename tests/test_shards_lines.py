"""Lines beside sessions: what is refused, how a line ends, and what happens when there is none."""

from __future__ import annotations

import errno
import queue
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functions.edge import lines as lines_of
from functions.edge import shard_pb2 as pb
from functions.edge import wire
from functions.edge.lines import TOKEN_BYTES, Line, LineError, Lines, call
from functions.edge.shard_pb2_grpc import ShardStub
from models.artifact.store import Artifact
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.errors import LinkLostError
from models.runtime.links import GREEDY, Opening, Piece, Want
from models.runtime.local import LocalTier
from models.runtime.stage import Stage
from models.runtime.tier import Completion, Limits
from tests.fakes import wait_until
from tests.shard_rigs import OPTIONS, Served, directory, linked, serve
from tests.tiny_models import SHAPE, quiet, write_gguf

N, C = SHAPE.n_layers, SHAPE.width
MOST = 4096
LENGTH = struct.Struct("<I")
ASKED, LIMITS = Completion("the then he"), Limits(max_tokens=8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tier")
    build(GgufSource(write_gguf(folder / "tiny.gguf")), folder / "tier", "int4", None, quiet)
    return folder / "tier"


@pytest.fixture
def served(path: Path) -> Iterator[Served]:
    found = serve(Stage.open(path, range(1, N), OPTIONS))
    yield found
    found.server.stop(0.0)


@pytest.fixture
def arrivals() -> Iterator[Lines]:
    found = Lines(0, MOST, None)
    found.start()
    yield found
    found.stop()


# ---- messages ----


@contextmanager
def pair() -> Iterator[tuple[socket.socket, Line]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    with far, closing(Line(near, MOST)) as line:
        yield far, line


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=MOST), max_size=5), st.data())
def test_messages_arrive_as_they_were_however_they_are_cut(messages: list[bytes], data: st.DataObject) -> None:
    sent = b"".join(LENGTH.pack(len(message)) + message for message in messages)
    with pair() as (far, line):
        while sent:
            part = data.draw(st.integers(1, len(sent)))
            far.sendall(sent[:part])
            sent = sent[part:]
        far.shutdown(socket.SHUT_WR)
        assert list(iter(line.read, None)) == messages


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_ends_a_line_and_nothing_else(garbage: bytes) -> None:
    with pair() as (far, line):
        far.sendall(garbage)
        far.shutdown(socket.SHUT_WR)
        with suppress(LineError):
            while line.read() is not None:
                pass


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (LENGTH.pack(MOST + 1), f"has {MOST + 1} bytes; at most {MOST}"),
        (b"\x01", "in the midst of a message"),
        (LENGTH.pack(9) + b"short", "in the midst of a message"),
    ],
)
def test_a_message_that_is_none_is_refused_unread(sent: bytes, reason: str) -> None:
    with pair() as (far, line):
        far.sendall(sent)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(LineError, match=reason):
            line.read()


# ---- who may come ----


def test_without_file_descriptors_callers_are_refused_instead_of_left_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(_listener: socket.socket) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    lines = Lines(0, MOST, None)
    with lines.promise() as promise, monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", exhausted)
        lines.start()
        wait_until(lambda: refuses(promise.port))
    lines.stop()


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except ConnectionRefusedError:
        return True
    return False


def test_who_has_the_token_is_let_in_once(arrivals: Lines) -> None:
    with arrivals.promise() as promise:
        at, token = ("127.0.0.1", promise.port), promise.token
        with closing(call(at, token, MOST, 1, None)) as near, closing(call(at, token, MOST, 1, None)) as again:
            promise.line().write(b"hello")
            heard = {near.read(), again.read()}  # whichever came first
        assert heard == {b"hello", None}


@pytest.mark.parametrize("token", [bytes(TOKEN_BYTES), b"short"])
def test_who_was_promised_nothing_is_hung_up_on(arrivals: Lines, token: bytes) -> None:
    with arrivals.promise() as promise, socket.create_connection(("127.0.0.1", promise.port)) as stranger:
        stranger.sendall(token)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(1) == b""


def test_a_promise_that_nobody_takes_is_let_go_of(arrivals: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_of, "HANDSHAKE_S", 0.05)
    with arrivals.promise() as promise, pytest.raises(LineError, match="nobody took it"):
        promise.line()


def test_who_says_nothing_is_in_nobodys_way(arrivals: Lines) -> None:
    with arrivals.promise() as promise:
        silent = [socket.create_connection(("127.0.0.1", promise.port)) for _ in range(5)]
        with closing(call(("127.0.0.1", promise.port), promise.token, MOST, 1, None)):
            assert promise.line()
        for each in silent:
            each.close()


# ---- sessions ----


@contextmanager
def opened(path: Path, served: Served) -> Iterator[tuple[Any, socket.socket]]:
    """A session at a shard, opened by hand; yields its stream and its line."""
    digest = wire.model_digest(Artifact.open(path).manifest)
    begin = pb.Open(protocol=wire.PROTOCOL, model_digest=digest, first_layer=1, variant="plain", line=True)
    outbox: queue.SimpleQueue[pb.ToShard | None] = queue.SimpleQueue()
    outbox.put(pb.ToShard(open=begin))
    with grpc.insecure_channel(served.address) as channel:
        stream = ShardStub(channel).Session(iter(outbox.get, None), timeout=10)  # type: ignore[no-untyped-call]
        said = next(stream).opened
        with socket.create_connection(("127.0.0.1", said.line_port)) as line:
            line.sendall(said.line_token)
            yield stream, line
        stream.cancel()
        outbox.put(None)


def framed(message: pb.ToShard) -> bytes:
    body = message.SerializeToString()
    return LENGTH.pack(len(body)) + body


def piece(**changes: Any) -> pb.ToShard:
    states = {"tokens": 2, "encoding": pb.FP32, "values": bytes(2 * C * 4), **changes}
    return pb.ToShard(piece=pb.Piece(states=pb.States(**states)))


GARBAGE = {
    "no message": (LENGTH.pack(4) + b"\xff\xff\xff\xff", "what is no message"),
    "too large": (LENGTH.pack(1 << 31), "at most"),
    "another shape": (framed(piece(values=b"xx")), "have 2 bytes instead of"),
    "opened twice": (framed(pb.ToShard(open=pb.Open())), "opened once"),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_the_stream_says_why_a_line_was_refused(path: Path, served: Served, what: str) -> None:
    sent, reason = GARBAGE[what]
    with opened(path, served) as (stream, line):
        line.sendall(sent)
        with pytest.raises(grpc.RpcError):
            next(stream)
        assert stream.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason in stream.details()
    wait_until(lambda: served.service.open_sessions == 0)


def test_a_line_that_ends_ends_its_session(path: Path, served: Served) -> None:
    with opened(path, served) as (_, line):
        line.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: served.service.open_sessions == 0)


def test_a_stream_that_ends_ends_its_line(path: Path, served: Served) -> None:
    with opened(path, served) as (stream, line):
        stream.cancel()
        assert line.recv(1) == b""
    wait_until(lambda: served.service.open_sessions == 0)


def test_a_silent_line_is_ended(path: Path) -> None:
    served = serve(Stage.open(path, range(1, N), OPTIONS), idle_s=0.5)
    with opened(path, served) as (_, line):
        assert line.recv(1) == b""
    served.server.stop(0.0)


def test_what_the_shard_garbles_is_a_lost_link(path: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    links = directory(path, 1, [served.address])
    (link,) = links.links()
    with closing(link.open(Opening("plain", time.monotonic() + 10))) as session:
        monkeypatch.setattr(pb.FromShard, "SerializeToString", lambda _: b"\xff\xff", raising=False)
        session.send(Piece(_states(), 0, Want.TOKEN, (GREEDY,)))
        with pytest.raises(LinkLostError):
            session.receive()
    links.close()


def _states() -> Any:
    return wire.decode_states(piece().piece.states, C, 2)


# ---- with lines and without ----


def unreachable(*_: Any) -> Line:
    raise ConnectionRefusedError("no way there")


WAYS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a line": lambda _: None,
    "none that can be reached": lambda patch: patch.setattr("functions.edge.client.call", unreachable),
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_the_same_with_a_line_and_without(path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    wanted = list(LocalTier.open(path, "edge", threads=1).generate(ASKED, LIMITS))
    WAYS[way](monkeypatch)
    with linked(path, (0, 1, N)) as rig:
        assert [list(rig.tier.generate(ASKED, LIMITS)) for _ in range(2)] == [wanted, wanted]
        assert rig.replicas.stats.lost == 0
