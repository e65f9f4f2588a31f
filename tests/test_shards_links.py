"""gRPC between shards: what is refused, what survives, what is left behind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functions.edge import shard_pb2 as pb
from functions.edge import wire
from functions.edge.shard_pb2_grpc import ShardStub
from models.artifact.store import Artifact
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.errors import LinkLostError, ShardsLostError
from models.runtime.links import Choice, Opening, Piece, Want
from models.runtime.local import LocalTier
from models.runtime.sampling import Pick
from models.runtime.stage import Stage
from models.runtime.tier import Completion, Limits, Token
from tests.fakes import wait_until
from tests.shard_rigs import OPTIONS, Rig, Served, directory, linked, serve
from tests.tiny_models import SHAPE, quiet, write_gguf

N, C, V = SHAPE.n_layers, SHAPE.width, SHAPE.vocab_size
ASKED = Completion("the then he")
LIMITS = Limits(max_tokens=20, temperature=0.7, seed=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tier")
    build(GgufSource(write_gguf(folder / "tiny.gguf")), folder / "tier", "int4", None, quiet)
    return folder / "tier"


@pytest.fixture(scope="module")
def wanted(path: Path) -> list[Token]:
    return list(LocalTier.open(path, "edge", threads=1).generate(ASKED, LIMITS))


@pytest.fixture
def served(path: Path) -> Iterator[Served]:
    found = serve(Stage.open(path, range(1, N), OPTIONS))
    yield found
    found.server.stop(0.0)


@pytest.fixture
def impatient(path: Path) -> Iterator[Served]:
    found = serve(Stage.open(path, range(1, N), OPTIONS), idle_s=0.5)
    yield found
    found.server.stop(0.0)


def opening(path: Path, **changes: Any) -> pb.ToShard:
    digest = wire.model_digest(Artifact.open(path).manifest)
    values = {"protocol": wire.PROTOCOL, "model_digest": digest, "first_layer": 1, "variant": "plain", **changes}
    return pb.ToShard(open=pb.Open(**values))


def piece(**changes: Any) -> pb.ToShard:
    states = {"tokens": 2, "encoding": pb.FP32, "values": bytes(2 * C * 4), **changes.pop("states", {})}
    return pb.ToShard(piece=pb.Piece(states=pb.States(**states), **changes))


def refusal(served: Served, *messages: Any, raw: bool = False) -> tuple[grpc.StatusCode, str]:
    """How a session with these messages ends."""
    with grpc.insecure_channel(served.address) as channel:
        if raw:
            call = channel.stream_stream("/edgecascade.shard.v1.Shard/Session")(iter(messages), timeout=10)
        else:
            call = ShardStub(channel).Session(iter(messages), timeout=10)
        with pytest.raises(grpc.RpcError):
            list(call)
        return call.code(), call.details()


BAD_OPENINGS = [
    ({"protocol": 9}, "speaks protocol 9"),
    ({"model_digest": "another"}, "has another model"),
    ({"first_layer": 2}, "states are for layer 2; this shard begins with 1"),
    ({"variant": "wizard"}, "no variant 'wizard'"),
]
BAD_PREFIXES = [[b"short"], [bytes(32)] * 2, [b""]]


@pytest.mark.parametrize(("changes", "reason"), BAD_OPENINGS)
def test_who_does_not_continue_here_is_told_why(path: Path, served: Served, changes: Any, reason: str) -> None:
    code, said = refusal(served, opening(path, **changes))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert reason in said


@pytest.mark.parametrize("prefix", BAD_PREFIXES)
def test_keys_of_a_prefix_that_are_none_are_refused(path: Path, served: Served, prefix: list[bytes]) -> None:
    code, said = refusal(served, opening(path, prefix=prefix))
    assert (code, "'prefix'" in said) == (grpc.StatusCode.INVALID_ARGUMENT, True)


BAD_PIECES = [
    ({"states": {"values": b"xx"}}, "have 2 bytes instead of 512"),
    ({"states": {"tokens": 0}}, "from 1 to 256"),
    ({"states": {"tokens": 100_000}}, "from 1 to 256"),
    ({"states": {"encoding": 7}}, "way 7"),
    ({"states": {"values": np.full(2 * C, np.nan, "<f4").tobytes()}}, "no finite number"),
    ({"want": 9}, "wants 9"),
    ({"want": pb.TOKEN}, "has 0 choices; 1 to 2 can be made"),
    ({"want": pb.TOKEN, "choices": [pb.Choice()] * 3}, "has 3 choices"),
    ({"choices": [pb.Choice()]}, "has 1 choices; 0 to 0"),
    ({"want": pb.TOKEN, "choices": [pb.Choice(top_p=7)]}, "'top_p'"),
    ({"want": pb.TOKEN, "choices": [pb.Choice(temperature=-1)]}, "'temperature'"),
    ({"want": pb.TOKEN, "choices": [pb.Choice(draw=1)]}, "'draw'"),
    ({"want": pb.TOKEN, "choices": [pb.Choice(allowed=b"x")]}, "'allowed'"),
    ({"want": pb.TOKEN, "choices": [pb.Choice(top_logprobs=1000)]}, "'top_logprobs'"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_PIECES)
def test_a_piece_that_cannot_be_read_is_refused(path: Path, served: Served, changes: Any, reason: str) -> None:
    code, said = refusal(served, opening(path), piece(**changes))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert reason in said
    wait_until(lambda: served.service.open_sessions == 0)


def test_what_is_no_session_is_refused(path: Path, served: Served) -> None:
    assert "begins with 'open'" in refusal(served, piece())[1]
    assert "opened once" in refusal(served, opening(path), opening(path))[1]
    assert refusal(served, b"\xff\xfe garbage", raw=True)[0] in {grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED}
    large = pb.ToShard(piece=pb.Piece(states=pb.States(values=bytes(64 << 20))))
    assert refusal(served, opening(path), large)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_more_tokens_than_the_context_are_refused(path: Path, served: Served) -> None:
    many = [piece(start=48 * n, states={"tokens": 48, "values": bytes(48 * C * 4)}) for n in range(3)]
    code, said = refusal(served, opening(path), *many)
    assert (code, "there is room for 0" in said) == (grpc.StatusCode.OUT_OF_RANGE, True)


def test_a_piece_that_follows_what_was_never_sent_is_refused(path: Path, served: Served) -> None:
    code, said = refusal(served, opening(path), piece(), piece(start=3))
    assert (code, "follows 3 tokens, and only 2 were read" in said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)


def test_a_silent_session_is_ended(path: Path, impatient: Served) -> None:
    ends = threading.Event()

    def messages() -> Iterator[pb.ToShard]:
        yield opening(path)
        ends.wait(20)

    with grpc.insecure_channel(impatient.address) as channel:
        call = ShardStub(channel).Session(messages(), timeout=15)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.CANCELLED
    ends.set()
    wait_until(lambda: impatient.service.open_sessions == 0)


def test_more_sessions_than_places_are_refused(path: Path, served: Served) -> None:
    links = directory(path, 1, [served.address])
    (link,) = links.links()
    held = [link.open(Opening("plain", time.monotonic() + 10)) for _ in range(3)]
    with pytest.raises(LinkLostError, match="resource_exhausted"):
        link.open(Opening("plain", time.monotonic() + 10))
    for session in held:
        session.close()
    wait_until(lambda: served.service.open_sessions == 0)
    link.open(Opening("plain", time.monotonic() + 10)).close()
    links.close()


# ---- what travels ----


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32), st.sampled_from(list(wire.Encoding)))
def test_states_arrive_as_they_were_or_nearly(tokens: int, width: int, seed: int, encoding: wire.Encoding) -> None:
    states = np.random.default_rng(seed).normal(size=(tokens, width)).astype(np.float32)
    message = wire.encode_states(states, encoding)
    assert len(message.values) == wire.states_bytes(width, tokens, encoding)
    found = wire.decode_states(message, width, tokens)
    if encoding is wire.Encoding.FP32:
        assert np.array_equal(found, states)
    else:
        step = {wire.Encoding.FP16: 2**-11, wire.Encoding.INT8: 0.5 / 127}[encoding]
        assert (np.abs(found - states) <= step * np.abs(states).max(axis=1, keepdims=True) + 1e-7).all()


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.floats(0, 2), st.floats(0, 1), st.floats(0, 1, exclude_max=True), st.integers(0, 5))
def test_pieces_and_answers_arrive_as_they_were(
    seed: int, temperature: float, top_p: float, draw: float, n_top: int
) -> None:
    rng = np.random.default_rng(seed)
    bits = [b"", bytes(rng.integers(0, 256, -(-V // 8), np.uint8))]
    choices = tuple(Choice(temperature, top_p, n_top, draw, allowed) for allowed in bits)
    sent = Piece(rng.normal(size=(3, C)).astype(np.float32), seed % 7, Want.TOKEN, choices, bool(seed % 2))
    found = wire.decode_piece(wire.encode_piece(sent, wire.Encoding.FP32).piece, C, V, 3)
    assert replace(found, states=sent.states) == sent
    picks = tuple(
        Pick(int(rng.integers(V)), -rng.random(), rng.random(), tuple((n, -rng.random()) for n in range(n_top)))
        for _ in range(3)
    )
    message = wire.encode_answer(picks, wire.Encoding.FP32, leaving=True)
    assert message.leaving
    assert wire.decode_answer(message, C, V, 3) == picks


@pytest.mark.parametrize("answer", [pb.FromShard(), pb.FromShard(picks=pb.Picks(picks=[pb.Picked(id=V)]))])
def test_an_answer_that_is_none_is_a_lost_link(answer: pb.FromShard) -> None:
    with pytest.raises(wire.WireError):
        wire.decode_answer(answer, C, V, 3)


@pytest.mark.parametrize("encoding", [wire.Encoding.FP16, wire.Encoding.INT8])
def test_shorter_states_give_an_answer_too(path: Path, encoding: wire.Encoding) -> None:
    with linked(path, (0, 1, N), encoding=encoding) as rig:
        assert len(list(rig.tier.generate(ASKED, LIMITS))) > 1


# ---- survival ----


def test_four_at_once_answer_as_alone(path: Path, wanted: list[Token]) -> None:
    with linked(path, (0, 1, 2, N)) as rig, ThreadPoolExecutor(3) as pool:
        for tokens in pool.map(lambda _: list(rig.tier.generate(ASKED, LIMITS)), range(12)):
            assert tokens == wanted


@pytest.mark.parametrize("part", [1, 2])
def test_a_shard_that_goes_in_the_middle_costs_no_bit(path: Path, wanted: list[Token], part: int) -> None:
    """The one at work is stopped without grace after each number of tokens; another replica goes on."""
    for stopped_after in (0, 1, 7, 18):
        with linked(path, (0, 1, 2, N), replicas=2) as rig, closing(rig.tier.generate(ASKED, LIMITS)) as tokens:  # type: ignore[type-var]
            found = []
            for number, token in enumerate(tokens):
                found.append(token)
                if number == stopped_after:
                    at_work(rig, part).server.stop(0.0)
            assert found == wanted
        wait_until(lambda rig=rig: not any(served.service.open_sessions for served in rig.shards.values()))


def at_work(rig: Rig, part: int) -> Served:
    return next(s for (p, _), s in rig.shards.items() if p == part and s.service.open_sessions)


def test_who_is_about_to_stop_is_left_before(path: Path, wanted: list[Token]) -> None:
    """Told to stop, a shard says so with its next answer, and its sessions move; with nobody else they stay."""
    for replicas in (2, 1):
        with linked(path, (0, 1, N), replicas=replicas) as rig, closing(rig.tier.generate(ASKED, LIMITS)) as tokens:  # type: ignore[type-var]
            found = [next(tokens)]
            leaver = at_work(rig, 1)
            leaver.leaving = True
            stopping = threading.Thread(target=leaver.server.stop, args=(20.0,))
            stopping.start()
            found += [next(tokens), next(tokens)]
            if replicas == 2:
                wait_until(lambda leaver=leaver: leaver.service.open_sessions == 0)
            found += list(tokens)
            assert found == wanted
            stopping.join()
            assert rig.replicas.stats.moved == replicas - 1
            assert rig.replicas.stats.lost == 0


def test_with_nobody_left_the_answer_ends_at_once(path: Path) -> None:
    with linked(path, (0, 1, 2, N)) as rig, closing(rig.tier.generate(ASKED, LIMITS)) as tokens:  # type: ignore[type-var]
        next(tokens)
        rig.shards[2, 0].server.stop(0.0)
        with pytest.raises(ShardsLostError, match="no shard that comes next is left"):
            list(tokens)


def test_nothing_is_left_behind(path: Path) -> None:
    """After many answers, some of them given up, as many file descriptors and threads as after a few."""
    with linked(path, (0, 1, N), replicas=2) as rig:

        def ask(number: int) -> None:
            with closing(rig.tier.generate(Completion("he"), Limits(max_tokens=3))) as tokens:  # type: ignore[type-var]
                for _ in range(1 + number % 3):
                    next(tokens, None)

        def held() -> tuple[int, int]:
            wait_until(lambda: sum(s.service.open_sessions for s in rig.shards.values()) == 0)
            gc.collect()
            return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(ask, range(30)))
            few = held()
            list(pool.map(ask, range(300)))
            wait_until(lambda: held() <= (few[0] + 2, few[1] + 3))
