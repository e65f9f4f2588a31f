"""The bench of ranks: what it starts and counts; the run itself needs a built tier."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.processes import cpu_s
from bench.ranked import Plan, measure, variants


def test_rank_0_comes_last_and_knows_the_others() -> None:
    found = variants(3, Path("tier"), 2, [7001, 7002], [8001, 8002])
    ranks = [variant.environment for variant in found.values()]
    assert [e["TENSOR_RANK"] for e in ranks] == ["1/3", "2/3", "0/3"]
    assert [e.get("SHARD_LISTEN") for e in ranks] == ["7001", "7002", None]
    assert ranks[-1]["TENSOR_PEERS"] == "127.0.0.1:8001,127.0.0.1:8002"
    assert all(e["THREADS"] == "2" and Path(e["MODEL_PATH"]).is_absolute() for e in ranks)
    (whole,) = variants(1, Path("tier"), 2, [], []).values()
    assert "TENSOR_RANK" not in whole.environment


def test_cpu_time_of_a_group_is_what_its_processes_took() -> None:
    before = cpu_s([os.getpgrp()])
    began = time.process_time()
    while time.process_time() - began < 0.2:
        pass
    assert cpu_s([os.getpgrp()]) - before > 0.1
    assert cpu_s([1 << 30]) == 0


def test_the_unsplit_tier_is_among_the_ways(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="1 rank"):
        measure(lambda _: pytest.fail("started"), Plan(tmp_path, counts=(2,)), 3, lambda *_: None)
