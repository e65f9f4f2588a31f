"""Ranks over gRPC: the same answers as ranks in threads, what is refused, what survives, what is left behind."""

from __future__ import annotations

import gc
import os
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

from functions.edge import shard_pb2 as pb
from functions.edge import wire
from functions.edge.rank_config import RankConfig
from functions.edge.shard_pb2_grpc import ShardStub
from functions.serving.settings import ConfigError
from models.artifact.store import Artifact
from models.build.assemble import build
from models.build.fetch import MEMBER
from models.build.gguf_source import GgufSource
from models.build.hub_source import HubSource
from models.build.verify import golden_cases
from models.errors import LinkLostError, ShardsLostError
from models.runtime.links import Opening
from models.runtime.local import LocalTier
from models.runtime.tier import Chat, Completion, JsonForm, Limits, Prompt, SkillQuery, Tier, Token
from tests.fakes import wait_until
from tests.rank_rigs import OPTIONS, Rig, Served, directory, in_threads, layers_of, linked, serve
from tests.tiny_models import SHAPE, quiet, write_adapter, write_gguf

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
HOME = Path(os.environ.get("EDGECASCADE_HOME", ROOT / "var"))
C, V = SHAPE.width, SHAPE.vocab_size
ASKED = Completion("the then he")
LIMITS = Limits(max_tokens=12, temperature=0.7, seed=3)
GREEDY = Limits(max_tokens=12, top_logprobs=2)
FORMED = replace(GREEDY, json=JsonForm('{"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}'))
QUESTIONS: list[tuple[Prompt, Limits]] = [
    (ASKED, LIMITS),
    (ASKED, GREEDY),
    (ASKED, FORMED),
    (Completion("b" * 60), GREEDY),
    (Chat(({"role": "user", "content": "he"},)), GREEDY),
    (SkillQuery("lamp", "switch it"), GREEDY),
    (SkillQuery("radio", "Play that Song by Zoë"), GREEDY),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tier in fp32 with skills and an adapter."""
    folder = tmp_path_factory.mktemp("tier")
    source = GgufSource(write_gguf(folder / "tiny.gguf"))
    build(source, folder / "tier", "fp32", write_adapter(folder / "adapter", source), quiet)
    return folder / "tier"


def answers(tier: Tier) -> list[list[Token]]:
    return [list(tier.generate(prompt, limits)) for prompt, limits in QUESTIONS]


@pytest.fixture(scope="module")
def wanted(path: Path) -> dict[int, list[list[Token]]]:
    """Answers of so many ranks in threads."""
    found = {}
    for count in (2, 3, 4):
        with in_threads(path, count) as tier:
            found[count] = answers(tier)
    return found


@pytest.fixture
def served(path: Path) -> Iterator[Served]:
    found = serve(layers_of(path, 1, 2), idle_s=0.5)
    yield found
    found.server.stop(0.0)


def told(tokens: list[Token]) -> list[tuple[int, str]]:
    return [(token.id, token.text) for token in tokens]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_links_change_no_bit(path: Path, wanted: dict[int, list[list[Token]]], count: int) -> None:
    with linked(path, count) as rig:
        assert answers(rig.tier) == wanted[count]
        wait_until(lambda: all(served.service.open_sessions == 0 for served in rig.ranks.values()))


def test_ranks_answer_as_the_whole(path: Path, wanted: dict[int, list[list[Token]]]) -> None:
    """In fp32 a sum in another order changes no greedy word, and probabilities in their last digits only."""
    whole = answers(LocalTier.open(path, "edge", threads=1))
    for found in wanted.values():
        for tokens, same in zip(found, whole, strict=True):
            assert told(tokens) == told(same)
            np.testing.assert_allclose([t.logprob for t in tokens], [t.logprob for t in same], atol=1e-3)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_stories260k_over_links(tmp_path: Path, count: int) -> None:
    folder = DATA / "stories260k"
    if not folder.is_dir():
        pytest.skip("the model stories260k is absent")
    build(HubSource(folder), tmp_path / "out", "fp32", None, quiet)
    with linked(tmp_path / "out", count) as rig:
        for case in golden_cases(folder / "golden.json")[: 5 if count == 2 else 1]:
            assert rig.tier._writer is not None
            tokens = rig.tier._writer.write(case.prompt_ids, Limits(max_tokens=len(case.greedy_ids)))
            assert tuple(token.id for token in tokens) == case.greedy_ids


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_smollm2_over_links(smollm2: Path, count: int) -> None:
    """The first 64 tokens of all its golden texts, in fp32."""
    with linked(smollm2, count, options=replace(OPTIONS, sequences=1)) as rig:
        for case in golden_cases(DATA / "smollm2" / "golden.json"):
            assert rig.tier._writer is not None
            wanted = case.greedy_ids[:64]
            tokens = rig.tier._writer.write(case.prompt_ids, Limits(max_tokens=len(wanted)))
            assert tuple(token.id for token in tokens) == wanted


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = HOME / "cache" / Path(MEMBER).name
    if not file.is_file() or not (DATA / "smollm2").is_dir():
        pytest.skip("SmolLM2 (`edgecascade build smollm2 …` fetches it) or its golden texts are absent")
    folder = tmp_path_factory.mktemp("smollm2")
    build(GgufSource(file), folder / "out", "fp32", None, quiet)
    return folder / "out"


def test_several_at_once_answer_as_alone(path: Path, wanted: dict[int, list[list[Token]]]) -> None:
    """More than there are places for: they wait."""
    with linked(path, 2) as rig, ThreadPoolExecutor(6) as pool:
        for tokens in pool.map(lambda _: list(rig.tier.generate(ASKED, LIMITS)), range(12)):
            assert tokens == wanted[2][0]


# ---- what is refused ----


def opening(path: Path, **changes: Any) -> pb.ToShard:
    digest = wire.model_digest(Artifact.open(path).manifest)
    values = {
        "protocol": wire.PROTOCOL, "model_digest": digest, "variant": "plain", "rank": 1, "ranks": 2, "head": "a",
        **changes,
    }  # fmt: skip
    return pb.ToShard(open=pb.Open(**values))


def piece(tokens: int = 2, want: pb.Want = pb.NOTHING, values: bytes | None = None) -> pb.ToShard:
    data = bytes(tokens * C * 4) if values is None else values
    return pb.ToShard(piece=pb.Piece(states=pb.States(tokens=tokens, encoding=pb.FP32, values=data), want=want))


def refusal(served: Served, *messages: Any) -> tuple[grpc.StatusCode, str]:
    """How a session with these messages ends."""
    with grpc.insecure_channel(served.address) as channel:
        call = ShardStub(channel).Session(iter(messages), timeout=10)
        with pytest.raises(grpc.RpcError):
            list(call)
        return call.code(), call.details()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": 9}, "speaks protocol 9"),
        ({"model_digest": "another"}, "has another model"),
        ({"rank": 0}, "looks for rank 0 of 2; this is rank 1 of 2"),
        ({"ranks": 3}, "looks for rank 1 of 3; this is rank 1 of 2"),
        ({"rank": 0, "ranks": 0}, "looks for a shard of layers"),
        ({"variant": "wizard"}, "no variant 'wizard'"),
        ({"remaining_ms": -1}, "is no time"),
    ],
)
def test_who_means_another_is_told_why(path: Path, served: Served, changes: Any, reason: str) -> None:
    code, said = refusal(served, opening(path, **changes))
    assert code in {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT}
    assert reason in said


def test_garbage_is_refused(path: Path, served: Served) -> None:
    nan = np.full(2 * C, np.nan, "<f4").tobytes()
    for messages, reason in (
        ([piece()], "begins with 'open'"),
        ([opening(path), opening(path)], "opened once"),
        ([opening(path), piece(values=b"xx")], "have 2 bytes instead of 512"),
        ([opening(path), piece(values=nan)], "no finite number"),
        ([opening(path), piece(), piece(values=nan)], "no finite number"),
        ([opening(path), piece(), piece(3)], "a sum of 3 tokens was sent to a pass of 2"),
        ([opening(path), piece()], "in the midst of a pass"),
        ([opening(path), piece(256)], "there is room for 96"),
    ):
        assert reason in refusal(served, *messages)[1]
    wait_until(lambda: served.service.open_sessions == 0)


def test_a_rank_serves_one_rank_0_at_a_time(path: Path, served: Served) -> None:
    first, second = (directory(path, 1, 2, [served.address], head).links()[0] for head in "ab")
    session = first.open(Opening("plain", time.monotonic() + 10))
    first.open(Opening("plain", time.monotonic() + 10)).close()
    with pytest.raises(LinkLostError, match="another rank 0 has sessions"):
        second.open(Opening("plain", time.monotonic() + 10))
    session.close()
    wait_until(lambda: served.service.open_sessions == 0)
    second.open(Opening("plain", time.monotonic() + 10)).close()


def test_sessions_are_bounded_and_end_when_silent(path: Path, served: Served) -> None:
    (link,) = directory(path, 1, 2, [served.address]).links()
    held = [link.open(Opening("plain", time.monotonic() + 10)) for _ in range(OPTIONS.sequences)]
    with pytest.raises(LinkLostError, match="resource_exhausted"):
        link.open(Opening("plain", time.monotonic() + 10))
    wait_until(lambda: served.service.open_sessions == 0)
    for session in held:
        session.close()


@pytest.mark.parametrize("logits", [b"", b"xyz", bytes(4 * V + 4), np.full(3, np.nan, "<f4").tobytes()])
def test_logits_that_are_none_are_refused(logits: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode_answer(pb.FromShard(logits=logits), C, V, 3)


# ---- what survives ----


def at_work(rig: Rig, number: int) -> Served:
    return next(s for (n, _), s in rig.ranks.items() if n == number and s.service.open_sessions)


@pytest.mark.parametrize("number", [1, 2])
def test_a_rank_that_goes_in_the_middle_costs_no_bit(
    path: Path, wanted: dict[int, list[list[Token]]], number: int
) -> None:
    for stopped_after in (0, 1, 6):
        with linked(path, 3, replicas=2) as rig, closing(rig.tier.generate(ASKED, LIMITS)) as tokens:  # type: ignore[type-var]
            found = []
            for count, token in enumerate(tokens):
                found.append(token)
                if count == stopped_after:
                    at_work(rig, number).server.stop(0.0)
            assert found == wanted[3][0]
            assert [each.stats.resumed for each in rig.group.replicas] == [int(number == n) for n in (1, 2)]


def test_with_nobody_left_the_answer_ends_at_once(path: Path) -> None:
    with linked(path, 3) as rig, closing(rig.tier.generate(ASKED, LIMITS)) as tokens:  # type: ignore[type-var]
        next(tokens)
        rig.ranks[2, 0].server.stop(0.0)
        with pytest.raises(ShardsLostError, match="no node is left that runs rank 2"):
            list(tokens)
        wait_until(lambda: rig.ranks[1, 0].service.open_sessions == 0)


@pytest.mark.parametrize("replicas", [2, 1])
def test_who_is_about_to_stop_is_left_before(path: Path, wanted: dict[int, list[list[Token]]], replicas: int) -> None:
    with linked(path, 2, replicas=replicas) as rig, closing(rig.tier.generate(ASKED, LIMITS)) as tokens:  # type: ignore[type-var]
        found = [next(tokens)]
        leaver = at_work(rig, 1)
        leaver.leaving = True
        stopping = threading.Thread(target=leaver.server.stop, args=(20.0,))
        stopping.start()
        found += [next(tokens), next(tokens)]
        if replicas == 2:
            wait_until(lambda: leaver.service.open_sessions == 0)
        found += list(tokens)
        assert found == wanted[2][0]
        stopping.join()
        (each,) = rig.group.replicas
        assert (each.stats.moved, each.stats.lost) == (replicas - 1, 0)


def test_nothing_is_left_behind(path: Path) -> None:
    """After many answers, some of them given up, as many file descriptors and threads as after a few."""
    with linked(path, 2) as rig:

        def ask(number: int) -> None:
            with closing(rig.tier.generate(Completion("he"), Limits(max_tokens=3))) as tokens:  # type: ignore[type-var]
                for _ in range(1 + number % 3):
                    next(tokens, None)

        def held() -> tuple[int, int]:
            wait_until(lambda: rig.ranks[1, 0].service.open_sessions == 0)
            gc.collect()
            return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(ask, range(15)))
            few = held()
            list(pool.map(ask, range(120)))
            wait_until(lambda: held() <= (few[0] + 2, few[1] + 3))


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"TENSOR_RANK": "2"}, "TENSOR_RANK is '2'; it must be a rank and how many"),
        ({"TENSOR_RANK": "2/2"}, "TENSOR_RANK is '2/2'"),
        ({"TENSOR_RANK": "0/1"}, "TENSOR_RANK is '0/1'"),
        ({"TENSOR_RANK": "0/2"}, "TENSOR_PEERS lists 0 ranks; rank 0 of 2 needs the addresses of 1"),
        ({"TENSOR_RANK": "0/3", "TENSOR_PEERS": "localhost:1"}, "TENSOR_PEERS lists 1 ranks"),
        ({"TENSOR_RANK": "0/2", "TENSOR_PEERS": "localhost"}, "TENSOR_PEERS must list addresses like host:port"),
        ({"TENSOR_RANK": "0/2", "TENSOR_PEERS": "far:1"}, "TENSOR_PEERS names another machine"),
        ({"TENSOR_RANK": "1/2", "TENSOR_PEERS": "localhost:1"}, "TENSOR_PEERS is set for rank 1"),
        ({"TENSOR_RANK": "1/2", "SHARD_LAYERS": "0-3"}, "TENSOR_RANK and SHARD_LAYERS are both set"),
        ({"TENSOR_RANK": "1/2", "SHARD_KV_MB": "0"}, "SHARD_KV_MB is"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RankConfig.from_environment(settings)


def test_good_settings_are_read() -> None:
    assert RankConfig.from_environment({}) is None
    peers = "localhost:1|localhost:2, 127.0.0.1:3"
    config = RankConfig.from_environment({"TENSOR_RANK": "0/3", "TENSOR_PEERS": peers})
    assert config is not None
    assert (config.number, config.count, config.is_head) == (0, 3, True)
    assert config.peers == (("localhost:1", "localhost:2"), ("127.0.0.1:3",))
