"""Any cut of a model answers like the whole, to the bit; and goes on so when links die at any piece."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import combinations
from math import inf
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.artifact.keys import LocalKey
from models.artifact.names import layer_file
from models.artifact.store import Artifact
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from models.build.hub_source import HubSource
from models.build.seal import seal_artifact
from models.build.verify import golden_cases
from models.errors import ArtifactError, ShardsLostError
from models.runtime.inprocess import InProcessLink
from models.runtime.links import Opening
from models.runtime.local import LocalTier
from models.runtime.pipeline import Replicas, open_head
from models.runtime.sessions import EngineOptions
from models.runtime.stage import Stage
from models.runtime.tier import Chat, Completion, JsonForm, Limits, Prompt, SkillQuery, Tier, Token
from tests.shard_rigs import OPTIONS, FlakyLink, in_process
from tests.tiny_models import NARROW_HEADS, SHAPE, quiet, write_adapter, write_gguf

DATA = Path(__file__).parents[2] / "shared" / "data"
N = SHAPE.n_layers
CUTS = [(0, *inner, N) for size in range(1, N) for inner in combinations(range(1, N), size)]
GREEDY = Limits(max_tokens=12, top_logprobs=2)
SAMPLED = replace(GREEDY, temperature=1.3, top_p=0.9, seed=5)
FORMED = replace(GREEDY, json=JsonForm('{"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}'))
ASKED: list[tuple[Prompt, Limits]] = [
    *((Completion("the then he"), limits) for limits in (GREEDY, SAMPLED, FORMED)),
    (Completion("b" * 60), SAMPLED),
    (Chat(({"role": "user", "content": "he"},)), GREEDY),
    (SkillQuery("lamp", "switch it"), GREEDY),
    (SkillQuery("radio", "Play that Song by Zoë"), GREEDY),
]


def built(folder: Path, quant: str, **more: Any) -> Path:
    shape = NARROW_HEADS if quant == "narrow" else SHAPE
    source = GgufSource(write_gguf(folder / "tiny.gguf", Kind.Q4_1, shape=shape))
    adapter = write_adapter(folder / "adapter", source) if shape is SHAPE else None
    build(source, folder / "tier", "fp32" if quant == "narrow" else quant, adapter, quiet, **more)
    return folder / "tier"


@pytest.fixture(scope="module", params=["fp32", "int4", "int8", "narrow", "prefill"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tier")
    return built(folder, "int4", prefill=True) if request.param == "prefill" else built(folder, request.param)


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("tier"), "int4")


def answers(tier: Tier) -> list[list[Token]]:
    asked = [(p, limits) for p, limits in ASKED if tier.card.skills or not isinstance(p, SkillQuery)]
    return [list(tier.generate(prompt, limits)) for prompt, limits in asked]


def test_any_cut_gives_the_whole_s_tokens_and_probabilities(path: Path) -> None:
    whole = answers(LocalTier.open(path, "edge", threads=1))
    for cuts in CUTS:
        assert answers(in_process(path, cuts)) == whole, cuts


@pytest.mark.parametrize("quant", ["fp32", "int4"])
def test_stories260k_in_any_cut(tmp_path: Path, quant: str) -> None:
    folder = DATA / "stories260k"
    if not folder.is_dir():
        pytest.skip("the model stories260k is absent")
    build(HubSource(folder), tmp_path / "out", quant, None, quiet)
    whole = LocalTier.open(tmp_path / "out", "edge", threads=1)
    n_layers = Artifact.open(tmp_path / "out").manifest.architecture.n_layers
    inner = [c for size in range(1, n_layers) for c in combinations(range(1, n_layers), size)]
    for case in golden_cases(folder / "golden.json"):
        limits = Limits(max_tokens=len(case.greedy_ids))
        wanted = [token.id for token in written(whole, case.prompt_ids, limits)]
        assert quant == "int4" or wanted == list(case.greedy_ids)
        for cuts in inner if case is golden_cases(folder / "golden.json")[0] else inner[:1]:
            tier = in_process(tmp_path / "out", (0, *cuts, n_layers))
            assert [token.id for token in written(tier, case.prompt_ids, limits)] == wanted, cuts


def written(tier: LocalTier, ids: Any, limits: Limits) -> Iterator[Token]:
    assert tier._writer is not None
    return tier._writer.write(ids, limits)


def test_a_shard_opens_the_files_of_its_layers_only(int4: Path, tmp_path: Path) -> None:
    """Everything else is not there at all; the sealed artifact too."""
    keys = LocalKey(bytes(32))
    sealed = seal_artifact(Artifact.open(int4), tmp_path / "sealed", keys, None, quiet).path
    for folder, given_keys in ((int4, {}), (sealed, {"keys": keys})):
        for first in range(N):
            alone = tmp_path / f"{folder.name}-{first}"
            alone.mkdir()
            others = {layer_file(n) for n in range(N) if n != first} | {
                f"adapter-{n:03d}.safetensors" for n in range(N) if n != first
            }
            ends = {"tokenizer.json"} if first else set()
            ends |= set() if first == N - 1 or first == 0 else {"head.safetensors", "labels.safetensors"}
            for file in folder.iterdir():
                if file.name not in others | ends:
                    (alone / file.name).write_bytes(file.read_bytes())
            assert set(Stage.open(alone, range(first, first + 1), OPTIONS, **given_keys).lanes) == {"plain", "frames"}


def test_a_sealed_tier_in_shards_answers_as_the_plain_one(int4: Path, tmp_path: Path) -> None:
    keys = LocalKey(bytes(32))
    sealed = seal_artifact(Artifact.open(int4), tmp_path / "sealed", keys, None, quiet).path
    assert answers(in_process(sealed, (0, 1, N), keys=keys)) == answers(in_process(int4, (0, 1, N)))


@pytest.mark.parametrize(
    ("groups", "said", "together"),
    [(0, 0, [1, 1, 2, 2]), (1, 0, [1, 2, 3, 4]), (4, 0, [1, 1, 1, 1]), (0, 1, [1, 2, 3, 4]), (1, 2, [1, 1, 2, 2])],
)
def test_sessions_share_passes_in_as_many_groups_as_asked(
    int4: Path, groups: int, said: int, together: list[int]
) -> None:
    """What the head said with a session goes before a shard's own setting."""
    lane = Stage.open(int4, range(N - 1), replace(OPTIONS, sequences=4, groups=groups)).lanes["plain"]
    with ExitStack() as opened:
        found = []
        for _ in range(4):
            session = opened.enter_context(lane.session(Opening("plain", inf, groups=said)))
            found.append(session.company)
    assert found == together


def test_layers_that_are_none_are_refused(int4: Path) -> None:
    with pytest.raises(ArtifactError, match="are not some of its layers"):
        Stage.open(int4, range(1, N + 1), OPTIONS)


# ---- survival, without a network ----


def fragile(path: Path, *links: FlakyLink) -> tuple[Tier, Replicas]:
    replicas = Replicas(lambda: links)
    return open_head(path, "edge", 1, replicas, OPTIONS), replicas


@pytest.fixture(scope="module")
def tail(int4: Path) -> Stage:
    return Stage.open(int4, range(1, N), EngineOptions(threads=1, spin=False, sequences=8))


@pytest.fixture(scope="module")
def wanted(int4: Path) -> list[list[Token]]:
    return answers(LocalTier.open(int4, "edge", threads=1))


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.floats(0.02, 0.4))
def test_answers_survive_links_that_die_at_any_piece(
    int4: Path, tail: Stage, wanted: list[list[Token]], seed: int, rate: float
) -> None:
    """One of two replicas dies again and again; the other, never twice in a row, takes over."""
    rng = random.Random(seed)
    bad = FlakyLink(InProcessLink(tail), lambda _: rng.random() < rate, "bad")
    good = FlakyLink(InProcessLink(tail), lambda _: False, "good")
    tier, _ = fragile(int4, bad, good)
    assert answers(tier) == wanted
    assert tail.open_sessions == 0


@pytest.mark.parametrize("piece", range(1, 12))
def test_without_another_replica_the_answer_ends_with_the_reason(int4: Path, tail: Stage, piece: int) -> None:
    only = FlakyLink(InProcessLink(tail), lambda n: n == piece, "only", for_good=True)
    tier, replicas = fragile(int4, only)
    with pytest.raises(ShardsLostError, match=r"no shard that comes next is left \(only\)"):
        list(tier.generate(Completion("the then he"), GREEDY))
    assert tail.open_sessions == 0
    assert replicas.stats.resumed == 0
    with pytest.raises(ShardsLostError, match="dead"):
        list(tier.generate(Completion("the"), GREEDY))


@pytest.mark.parametrize("piece", range(2, 12))
def test_one_alone_whose_link_broke_is_asked_once_more(
    int4: Path, tail: Stage, wanted: list[list[Token]], piece: int
) -> None:
    """What looked like death was none; a link that breaks at every piece is given up after the second."""
    only = FlakyLink(InProcessLink(tail), lambda n: n == piece, "only")
    tier, replicas = fragile(int4, only)
    assert answers(tier) == wanted
    assert replicas.stats.lost == 1
    broken = FlakyLink(InProcessLink(tail), lambda _: True, "broken")
    with pytest.raises(ShardsLostError, match="broken died"):
        list(fragile(int4, broken)[0].generate(Completion("the"), GREEDY))
    assert broken.opened <= 2


def test_a_replica_that_was_lost_a_moment_ago_is_asked_last(int4: Path, tail: Stage) -> None:
    dead = FlakyLink(InProcessLink(tail), lambda _: True, "dead", for_good=True)
    good = FlakyLink(InProcessLink(tail), lambda _: False, "good")
    tier, replicas = fragile(int4, dead, good)
    for _ in range(4):
        list(tier.generate(Completion("the"), GREEDY))
    assert (dead.opened, good.opened) == (1, 4)
    assert replicas.stats.lost <= 1


def test_closing_an_answer_frees_every_shard(int4: Path, tail: Stage) -> None:
    tier, _ = fragile(int4, FlakyLink(InProcessLink(tail), lambda _: False, "good"))
    for _ in range(20):
        with closing(tier.generate(Completion("the"), GREEDY)) as tokens:  # type: ignore[type-var]
            next(tokens)
    assert tail.open_sessions == 0
