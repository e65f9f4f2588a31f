"""`bench drafts`: on a tiny model, every way of drafting."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import edgecascade
from bench.drafts import Asked, Plan, corrupted, figures, measure
from bench.errors import BenchError
from models.build.assemble import build
from models.build.folder_source import write_folder_source
from models.build.gguf_source import GgufSource
from tests.tiny_models import SHAPE, quiet, random_head, random_tensors, write_gguf

TEXTS = ("the then", "that the", "a lamp")


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edge")
    build(GgufSource(write_gguf(folder / "tiny.gguf")), folder / "edge", "int4", None, quiet)
    return folder / "edge"


@pytest.mark.parametrize(("drafts", "lookup"), [("own", 0), ("none", 4), ("a tier", 2)])
def test_drafts_change_nothing(tier: Path, drafts: str, lookup: int) -> None:
    plan = Plan(tier, str(tier) if drafts == "a tier" else drafts, 0.2, lookup, exact=True, max_tokens=12, threads=1)
    found = figures(measure(plan, TEXTS, quiet))
    assert (found["queries"], found["identical"]) == (3, 3)
    assert 0 < found["tokens"] <= 36
    assert found["proposed"] >= found["accepted"] >= 0
    assert drafts == "none" or found["proposed"] > 0
    assert found["speed_up"] > 0


@pytest.mark.parametrize(("shards", "lookup"), [(2, 0), (3, 4)])
def test_drafts_change_nothing_in_shards(tier: Path, shards: int, lookup: int) -> None:
    plan = Plan(tier, "own", 0.2, lookup, exact=True, max_tokens=12, threads=1, shards=shards, hop_ms=0.1)
    found = figures(measure(plan, TEXTS, quiet))
    assert (found["queries"], found["identical"]) == (3, 3)
    assert found["proposed"] > 0
    assert 0 < found["hops"] <= found["hops_alone"]


def test_words_are_replaced_at_the_rate_asked_for() -> None:
    text = "a b c d " * 250
    assert corrupted(text, 0.0, random.Random(1)) == text
    changed = sum(a != b for a, b in zip(text.split(), corrupted(text, 0.1, random.Random(1)).split(), strict=False))
    assert 60 < changed < 140


def test_figures_add_up() -> None:
    one = Asked(alone_s=2.0, drafted_s=1.0, plain_s=1.5, tokens=10, same=True, proposed=8, accepted=6)
    found = figures([one, replace(one, drafted_s=2.0, same=False, accepted=2)])
    assert found["speed_up"] == pytest.approx(4 / 3)
    assert found["speed_up_over_plain_median"] == pytest.approx((1.5 + 0.75) / 2)
    assert (found["identical"], found["acceptance"], found["accepted_share_of_tokens"]) == (1, 0.5, 0.4)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_json_last_or_alone(tier: Path, as_json: bool) -> None:
    command = ["bench", "drafts", str(tier), "--queries", "2", "--max-tokens", "6", "--threads", "1"]
    command += ["--json"] if as_json else []
    result = CliRunner().invoke(edgecascade.app, command, obj=edgecascade.rooms())
    assert result.exit_code == 0, result.output
    *table, last = result.stdout.splitlines()
    assert json.loads(last)["identical"] == 2
    assert not table if as_json else any("speed-up" in line for line in table)


def test_a_tier_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    tokenizer = GgufSource(write_gguf(tmp_path / "tiny.gguf")).tokenizer()
    values = {"shape": SHAPE, "tensors": random_tensors(4), "tokenizer": tokenizer, "head": random_head()}
    build(write_folder_source(tmp_path / "s", model_id="tiny", **values), tmp_path / "device", "int8", None, quiet)
    with pytest.raises(BenchError, match="writes no text"):
        measure(Plan(tmp_path / "device"), TEXTS, quiet)
