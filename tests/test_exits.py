"""Early exits with heads of their own, on tiny random models: answers, cuts, cards and settings. No torch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from functions.serving.metrics import Metrics
from functions.serving.settings import ConfigError, TierConfig
from models.artifact.keys import LocalKey
from models.artifact.manifest import parse_manifest
from models.artifact.names import EXITS
from models.artifact.store import Artifact
from models.build.adapter import Adapter, write_exits
from models.build.assemble import build
from models.build.exits import Judged
from models.build.gguf_source import GgufSource
from models.build.seal import seal_artifact
from models.errors import ArtifactError, ShardsLostError
from models.runtime.confidence import Confidence
from models.runtime.exits import Pace, restored, stored
from models.runtime.local import LocalTier
from models.runtime.pipeline import Replicas, open_head
from models.runtime.tier import NO_EXIT, TUNED_EXITS, Completion, Limits, SkillQuery, Tier, Token
from tests.shard_rigs import OPTIONS, in_process
from tests.tiny_models import SHAPE, quiet, random_exits, write_adapter, write_gguf

N = SHAPE.n_layers
TEXTS = ("switch it", "the lamp, please", "Play that Song by Zoë", "heu", "a b c d e f g", "the then he")
QUERIES = [SkillQuery(skill, text) for text in TEXTS for skill in ("lamp", "radio")]
LIMITS = Limits(max_tokens=12)
SOME = 0.99
"""A threshold at which some frames leave at the first exit, some at the second, and some not at all."""


def built(folder: Path, **more: Any) -> Path:
    source = GgufSource(write_gguf(folder / "tiny.gguf"))
    adapter = write_adapter(folder / "adapter", source)
    write_exits(adapter, *random_exits())
    build(source, folder / "tier", "int4", adapter, quiet, **more)
    return folder / "tier"


@pytest.fixture(scope="module", params=["as it is", "with a second copy", "merged"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {"with a second copy": {"prefill": True}, "merged": {"merge": True}}.get(request.param, {})
    return built(tmp_path_factory.mktemp("exits"), **more)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("exits"))


def opened(path: Path, threshold: float | None) -> LocalTier:
    return LocalTier.open(path, "edge", threads=1, exit_threshold=threshold)


def answers(tier: Tier) -> list[list[Token]]:
    return [list(tier.generate(query, LIMITS)) for query in QUERIES]


def test_a_tier_whose_exits_are_never_sure_answers_as_one_without_them(path: Path) -> None:
    """To the bit, though every frame stopped at each exit on its way."""
    assert answers(opened(path, 1.0)) == answers(opened(path, NO_EXIT))
    assert answers(in_process(path, (0, 2, N), exit_threshold=1.0)) == answers(in_process(path, (0, 2, N)))


def test_the_first_exit_answers_where_it_is_always_sure(path: Path) -> None:
    tier = opened(path, 0.0)
    for query in QUERIES:
        tokens = list(tier.generate(query, LIMITS))
        frame = json.loads("".join(token.text for token in tokens))
        assert set(frame) == {"intent", "slots"}
        assert {token.exit_layer for token in tokens} == {1}
        assert tokens[-1].finish_reason == "stop"
    depths = tier.stats().depths
    assert list(depths) == [1]
    assert depths[1].frames == len(QUERIES)


def test_a_frame_that_goes_on_after_others_left_early_is_the_whole_s(path: Path) -> None:
    """What an exit leaves behind in a slot is never read."""
    mixed, whole = opened(path, SOME), answers(opened(path, NO_EXIT))
    found = answers(mixed)
    left = [tokens[0].exit_layer is not None for tokens in found]
    assert {tokens[0].exit_layer for tokens in found} == {1, 2, None}
    assert [f for f, early in zip(found, left, strict=True) if not early] == [
        w for w, early in zip(whole, left, strict=True) if not early
    ]
    assert sum(depth.frames for depth in mixed.stats().depths.values()) == len(QUERIES)


def test_without_time_for_more_layers_the_exit_that_was_reached_answers(path: Path) -> None:
    """However sure it is, and it says so; whoever has time gets the whole model's answer."""
    late, patient = Limits(max_tokens=12, deadline=0.0), Limits(max_tokens=12, deadline=math.inf)
    tier, whole = opened(path, 1.0), opened(path, NO_EXIT)
    for query in QUERIES:
        hurried = list(tier.generate(query, late))
        assert {(token.exit_layer, token.hurried) for token in hurried} == {(1, True)}
        assert set(json.loads("".join(token.text for token in hurried))) == {"intent", "slots"}
        assert list(tier.generate(query, patient)) == list(whole.generate(query, late))
    sure = [token for query in QUERIES for token in opened(path, 0.0).generate(query, late)]
    assert not any(token.hurried for token in sure)


@pytest.mark.parametrize(("deadline", "reaches"), [(20.0, False), (21.0, True)])
def test_the_pace_so_far_tells_what_can_be_reached(deadline: float, reaches: bool) -> None:
    """Ten seconds for twelve layers are ten for twelve more, and a tenth on top."""
    times = iter([0.0, 10.0])
    assert Pace(deadline, lambda: next(times)).reaches(12, 24) is reaches


@pytest.mark.parametrize("threshold", [0.0, SOME, 0.995, TUNED_EXITS])
def test_a_pipeline_whose_head_has_the_exits_answers_as_the_whole(plain: Path, threshold: float | None) -> None:
    assert answers(in_process(plain, (0, 2, N), exit_threshold=threshold)) == answers(opened(plain, threshold))


def test_later_shards_are_not_asked_for_a_frame_that_left_early(plain: Path) -> None:
    nobody = Replicas(lambda: ())
    alone = open_head(plain, "edge", 1, nobody, OPTIONS, exit_threshold=0.0)
    assert all(tokens[-1].exit_layer == 1 for tokens in answers(alone))
    assert nobody.stats.ended == 0
    without = open_head(plain, "edge", 1, nobody, OPTIONS)
    with pytest.raises(ShardsLostError):
        list(without.generate(QUERIES[0], LIMITS))


def test_a_tier_without_exits_opens_none_and_takes_no_number(tmp_path: Path) -> None:
    source = GgufSource(write_gguf(tmp_path / "tiny.gguf"))
    path = build(source, tmp_path / "tier", "int4", write_adapter(tmp_path / "adapter", source), quiet).path
    with pytest.raises(ArtifactError, match="has no early exits"):
        opened(path, 0.9)
    assert answers(opened(path, TUNED_EXITS)) == answers(opened(path, NO_EXIT))


def test_text_is_written_by_all_layers(plain: Path) -> None:
    said = [list(opened(plain, t).generate(Completion("the"), LIMITS)) for t in (0.0, NO_EXIT)]
    assert said[0] == said[1]


def test_each_skill_has_a_threshold_of_its_own(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "tier")
    artifact = Artifact.open(tmp_path / "tier").with_exit_heads(*random_exits((2,), {"lamp": 0.0}))
    assert artifact.fault(EXITS) is None
    for query, tokens in zip(QUERIES, answers(opened(artifact.path, TUNED_EXITS)), strict=True):
        assert tokens[-1].exit_layer == (2 if query.skill == "lamp" else None)


def test_a_sealed_tier_keeps_its_exits(plain: Path, tmp_path: Path) -> None:
    keys = LocalKey(bytes(32))
    sealed = seal_artifact(Artifact.open(plain), tmp_path / "sealed", keys, None, quiet)
    tier = LocalTier.open(sealed.path, "edge", threads=1, keys=keys, exit_threshold=SOME)
    assert answers(tier) == answers(opened(plain, SOME))
    with pytest.raises(ArtifactError, match="sealed or signed"):
        sealed.with_exit_heads(*random_exits())


def test_exits_are_part_of_what_an_adapter_is(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", GgufSource(write_gguf(tmp_path / "tiny.gguf")))
    before = Adapter.open(adapter)
    write_exits(adapter, *random_exits())
    after = Adapter.open(adapter)
    assert (before.exit_heads, after.exit_heads) == (None, random_exits()[0])
    assert before.digest != after.digest


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "outside": (
        lambda m: m["exit_heads"].update(passed=[1, N], calibration={"1": {}, str(N): {}}),
        "must rise and lie",
    ),
    "falling": (lambda m: m["exit_heads"].update(passed=[2, 1], calibration={"2": {}, "1": {}}), "must rise and lie"),
    "none": (lambda m: m["exit_heads"].update(passed=[], calibration={}), "must rise and lie"),
    "another skill": (lambda m: m["exit_heads"]["thresholds"].update(oven=0.5), "name the skill 'oven'"),
    "no calibration": (lambda m: m["exit_heads"].update(passed=[1]), "one entry for each"),
    "a wild threshold": (lambda m: m["exit_heads"]["thresholds"].update(lamp=3), "between 0 and 2"),
    "an unknown key": (lambda m: m["exit_heads"].update(colour="red"), "unknown key 'exit_heads.colour'"),
    "no file": (lambda m: m["files"].pop(EXITS), f"need the file {EXITS}"),
    "two kinds": (lambda m: m.update(exits=[1]), "a graph without exits of its own"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_card_is_refused(plain: Path, name: str) -> None:
    text = (plain / "manifest.json").read_text("utf-8")
    assert parse_manifest(text).as_json() == text
    values = json.loads(text)
    change, message = CHANGES[name]
    change(values)
    with pytest.raises(ArtifactError, match=message):
        parse_manifest(json.dumps(values))


def test_how_sure_an_exit_is_comes_from_its_own_calibration(plain: Path) -> None:
    tier = opened(plain, 0.0)
    tokens = list(tier.generate(QUERIES[0], LIMITS))
    intent = json.loads("".join(token.text for token in tokens))["intent"]
    confidence = Confidence.from_manifest(tier.card.calibration, tier.card.exits)
    assert confidence.final("lamp", intent, tokens) is None, "the tier itself is not calibrated"
    early = confidence.final("lamp", intent, tokens, tokens[-1].exit_layer)
    assert early is not None
    assert 0 < early < 1


@pytest.mark.parametrize(
    ("text", "threshold"), [("", NO_EXIT), ("off", NO_EXIT), ("tuned", TUNED_EXITS), ("0.9", 0.9), ("1", 1.0)]
)
def test_the_setting(text: str, threshold: float | None) -> None:
    config = TierConfig.from_environment({"MODEL_PATH": "x", "EXIT_THRESHOLD": text}, "edge")
    assert config.exit_threshold == threshold


@pytest.mark.parametrize("text", ["on", "1.5", "-0.1", "nan"])
def test_a_bad_setting_stops_the_start(text: str) -> None:
    with pytest.raises(ConfigError, match=f"EXIT_THRESHOLD is '{text}'; it must be off, tuned, or a number"):
        TierConfig.from_environment({"MODEL_PATH": "x", "EXIT_THRESHOLD": text}, "edge")


def test_metrics_say_after_how_many_layers_frames_were_read(plain: Path) -> None:
    tier, metrics = opened(plain, SOME), Metrics("n", "s")
    metrics.watch(tier.stats, "CPU")
    answers(tier)
    text = metrics.exposition(inflight=0, waiting=0, limit=1, ready=True).decode()
    for passed, depth in tier.stats().depths.items():
        labels = f'{{layers="{passed}",model_version="none",node_id="n",shard_id="s"}}'
        lines = text.splitlines()
        assert f"edgecascade_exit_frames_total{labels} {float(depth.frames)}" in lines
        assert f"edgecascade_exit_tokens_total{labels} {float(depth.tokens)}" in lines


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32)))
def test_eight_bits_lose_at_most_half_a_step(weight: Any) -> None:
    found = restored(stored("w", weight), "w")
    steps = np.maximum(np.abs(weight).max(1), 1e-12) / 127
    assert (np.abs(found - weight) <= 0.5001 * steps[:, None]).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.2))
def test_a_chosen_threshold_costs_no_more_than_it_may(seed: int, max_loss: float) -> None:
    rng, n = np.random.default_rng(seed), 60
    judged = Judged(
        passed=(1, 2),
        n_layers=3,
        right=rng.random((2, n)) < 0.7,
        confidence=rng.random((2, n)),
        right_full=rng.random(n) < 0.9,
        weights=1 + rng.random(n),
        tokens=rng.integers(1, 9, n),
    )
    threshold = judged.choose(max_loss)
    with_exits, without, layers = judged.at(threshold)
    assert without - with_exits <= max_loss + 1e-9
    assert 1 - 1e-9 <= layers <= 3 + 1e-9
    assert judged.at(NO_EXIT)[2] == pytest.approx(3)
    assert sum(judged.as_dict(threshold)["stops"].values()) == n
