"""`up --tensor`: how a function of stack.yml is split among ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.errors import StackError
from deploy.local.ranks import parse_ranks, ranked
from deploy.stack import load

STACK = load(Path(__file__).parents[1] / "stack.yml", {})


def test_wishes() -> None:
    assert parse_ranks("edge=3") == ("edge", 3)


@pytest.mark.parametrize("wish", ["edge", "edge=", "edge=0", "edge=1", "edge=65", "edge=0-7,8-29"])
def test_what_is_no_number_of_ranks_is_refused(wish: str) -> None:
    with pytest.raises(StackError, match="does not say how many ranks"):
        parse_ranks(wish)


def test_each_rank_knows_its_number_and_rank_0_the_others() -> None:
    found = ranked(STACK, "edge", [7001, 7002]).functions
    assert set(found) == {*STACK.functions, "edge-rank-1", "edge-rank-2"}
    all_of_them = [found[name].environment for name in ("edge", "edge-rank-1", "edge-rank-2")]
    assert [e["TENSOR_RANK"] for e in all_of_them] == ["0/3", "1/3", "2/3"]
    assert [e.get("SHARD_LISTEN") for e in all_of_them] == [None, "7001", "7002"]
    assert [e.get("TENSOR_PEERS") for e in all_of_them] == ["127.0.0.1:7001,127.0.0.1:7002", None, None]
    assert found["device"] == STACK.functions["device"]


def test_only_the_edge_can_be_split() -> None:
    with pytest.raises(StackError, match="'device' cannot be split"):
        ranked(STACK, "device", [7001])
    with pytest.raises(StackError, match="nobody"):
        ranked(STACK, "nobody", [7001])
