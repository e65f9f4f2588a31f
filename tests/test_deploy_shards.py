"""`up --shards`: how a function of stack.yml is cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.errors import StackError
from deploy.local.shards import evenly, parse_wish, ranges, sharded
from deploy.stack import load

STACK = load(Path(__file__).parents[1] / "stack.yml", {})


@given(st.integers(1, 200), st.data())
def test_an_even_cut_holds_each_layer_once(n_layers: int, data: st.DataObject) -> None:
    parts = evenly(n_layers, data.draw(st.integers(1, n_layers)))
    assert [layer for part in parts for layer in part] == list(range(n_layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("wish", "parts"),
    [("edge=2", [(0, 15), (15, 30)]), ("edge=0-0,1-28,29-29", [(0, 1), (1, 29), (29, 30)])],
)
def test_wishes(wish: str, parts: list[tuple[int, int]]) -> None:
    name, cut = parse_wish(wish)
    assert (name, ranges(cut, 30)) == ("edge", [range(*part) for part in parts])


@pytest.mark.parametrize("wish", ["edge", "edge=", "edge=0", "edge=31", "edge=0-7,9-29", "edge=8-29,0-7", "edge=0-29"])
def test_what_is_no_cut_is_refused(wish: str) -> None:
    with pytest.raises(StackError):
        ranges(parse_wish(wish)[1], 30)


def test_each_shard_knows_its_layers_and_the_next() -> None:
    found = sharded(STACK, "edge", evenly(30, 3), [7001, 7002]).functions
    assert set(found) == {*STACK.functions, "edge-10-19", "edge-20-29"}
    chain = [found[name].environment for name in ("edge", "edge-10-19", "edge-20-29")]
    assert [e["SHARD_LAYERS"] for e in chain] == ["0-9", "10-19", "20-29"]
    assert [e.get("SHARD_LISTEN") for e in chain] == [None, "7001", "7002"]
    assert [e.get("SHARD_NEXT") for e in chain] == ["127.0.0.1:7001", "127.0.0.1:7002", None]
    for before, after in pairwise(chain):
        assert before["SHARD_NEXT"].rsplit(":", 1)[1] == after["SHARD_LISTEN"]
    assert found["device"] == STACK.functions["device"]


def test_only_the_edge_can_be_cut() -> None:
    with pytest.raises(StackError, match="'device' cannot be cut"):
        sharded(STACK, "device", evenly(4, 2), [7001])
    assert sharded(STACK, "edge", evenly(30, 1), []) == STACK
