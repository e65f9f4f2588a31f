"""The benches of shards: what they draw, count and start; the runs themselves are in `make test-slow`."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from bench import links
from bench.errors import BenchError
from bench.links import Delayed, Row, Run, Way, _ways_of
from bench.processes import cpu_s
from bench.sharded import balanced_cut, even_cut, n_layers, ports_for, shards
from bench.states import losses
from bench.survival import GREEDY, QUESTIONS, Figures, Outcome, Plan, Trial, trials
from bench.transport import round_trip_ms
from models.build.assemble import build
from models.build.gguf_source import GgufSource
from tests.tiny_models import quiet, write_gguf

SAMPLINGS = [GREEDY, {"temperature": 0.8, "seed": 1}]
LENGTHS = {(question, number): 9 + number for question in QUESTIONS for number in range(2)}


def test_trials_are_drawn_by_the_seed_and_fall_into_their_answers() -> None:
    plan = Plan(Path("tier"), trials=300, seed=4)
    drawn = trials(plan, LENGTHS, SAMPLINGS)
    assert (
        drawn == trials(plan, LENGTHS, SAMPLINGS) != trials(Plan(Path("tier"), trials=300, seed=5), LENGTHS, SAMPLINGS)
    )
    assert {t.victim for t in drawn} == {t.head for t in drawn} == {0, 1}
    assert {t.piece for t in drawn} == set(range(9))
    assert all(t.piece < LENGTHS[t.question, SAMPLINGS.index(t.sampling)] - 1 for t in drawn)


def test_figures_count_and_time_what_was_struck() -> None:
    tail, head = Trial("?", GREEDY, 0, 1, 3), Trial("?", GREEDY, 0, 0, 3)
    found = Figures.of(
        [
            Outcome(tail, "identical", pause_ms=10.0),
            Outcome(tail, "identical", pause_ms=30.0),
            Outcome(tail, "identical", struck=False, pause_ms=1.0),
            Outcome(head, "identical", pause_ms=900.0),
            Outcome(head, "fallback"),
            Outcome(head, "lost", why="late"),
        ]
    )
    assert (found.identical, found.fallbacks, found.lost, found.struck, found.of_heads) == (4, 1, 1, 5, 3)
    assert (found.resume_ms_p50, found.resume_ms_max, found.reasons) == (20.0, 30.0, {"late": 1})
    assert Figures.of([]).resume_ms_p50 is None


def test_each_replica_knows_all_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"architecture": {"n_layers": 30}}))
    cut = even_cut(n_layers(tmp_path), 3)
    ports = ports_for(cut, 2)
    cast = shards(cut, 2, tmp_path, ports, {"THREADS": "1"})
    assert len(cast) == 6
    for part, after in pairwise(range(3)):
        wanted = ",".join(f"127.0.0.1:{ports[after, replica]}" for replica in range(2))
        assert all(s.environment["SHARD_NEXT"] == wanted for s in cast if s.part == part)
    assert [s.environment.get("SHARD_LISTEN") for s in cast if s.part == 0] == [None, None]
    via = dict.fromkeys(ports, 7)
    assert "127.0.0.1:7" in shards(cut, 2, tmp_path, ports, {}, via)[0].environment["SHARD_NEXT"]


def test_the_last_shard_has_fewer_layers_by_its_head(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"architecture": {"n_layers": 30}}))
    assert balanced_cut(tmp_path, 2) == even_cut(30, 2), "nothing is known of their sizes"
    (tmp_path / "layer-000.safetensors").write_bytes(bytes(10))
    (tmp_path / "head.safetensors").write_bytes(bytes(120))
    assert [len(part) for part in balanced_cut(tmp_path, 2)] == [21, 9]
    assert [len(part) for part in balanced_cut(tmp_path, 4)] == [9, 10, 10, 1]
    assert balanced_cut(tmp_path, 1) == [range(30)]


def test_shards_share_the_threads_of_the_unsplit_tier() -> None:
    assert _ways_of(links.Plan(Path("tier"))) == [
        Way(1, 1),
        Way(1, 2),
        Way(2, 1),
        Way(2, 2, 1),
        Way(4, 1),
        Way(4, 2, 1),
    ]
    assert _ways_of(links.Plan(Path("tier"), (1, 2), threads=4)) == [Way(1, 2), Way(1, 4), Way(2, 2), Way(2, 4, 1)]


def test_a_message_that_goes_round_takes_time() -> None:
    median_ms, least_ms = round_trip_ms(2304, times=5)
    assert 0 < least_ms <= median_ms


def test_a_group_uses_the_time_of_its_processes() -> None:
    assert cpu_s([os.getpgrp()]) > 0
    assert cpu_s([]) == 0


def test_shorter_states_lose_little_and_whole_ones_nothing(tmp_path: Path) -> None:
    build(GgufSource(write_gguf(tmp_path / "tiny.gguf")), tmp_path / "tier", "fp32", None, quiet)
    whole, half, byte = losses(tmp_path / "tier", 1, 40, 1, lambda *_: None)
    assert (whole.kl, whole.top1_agreement) == (0, 1)
    assert 0 < half.kl < byte.kl < 0.1
    width = whole.bytes_per_token // 4
    assert (half.bytes_per_token, byte.bytes_per_token) == (2 * width, width + 4)


def test_what_cannot_be_cut_is_said(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be cut"):
        even_cut(2, 3)
    with pytest.raises(BenchError, match="no tier's folder"):
        n_layers(tmp_path)


def test_the_verdict_is_that_of_the_issue() -> None:
    rows = [
        Row(1, 2, 0, 5.0, None, 400.0, None, 4.0, same=True),
        Row(2, 1, 0, 5.3, 0.3, 368.0, 0.92, 5.0, same=True),
    ]
    run = Run(rows, 2400.0, 60.0, [Delayed(0.0, 5.4, 5.0)])
    assert run.as_dict()["verdict"] == {"hop": True, "efficiency": True, "same": True}
    worse = Run([rows[0], Row(2, 1, 0, 6.0, 1.0, 300.0, 0.75, 6.0, same=False)], 1.0, 1.0, [])
    assert worse.as_dict()["verdict"] == {"hop": False, "efficiency": False, "same": False}
