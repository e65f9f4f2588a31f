"""The prefix cache and the key-value memory: pure data structures, held against simple models of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.runtime.memory import FIRST_ROOM, KeyValueMemory
from models.runtime.prefixes import PrefixCache, PrefixStats
from tests.tiny_models import SHAPE

BLOCK = 2
PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=30)


def cache(blocks: int) -> PrefixCache[tuple[int, ...]]:
    return PrefixCache(10 * blocks, 10, BLOCK)


def remember(found: PrefixCache[tuple[int, ...]], ids: Sequence[int]) -> None:
    """Store as a block everything from the beginning up to its end: what keys and values depend on."""
    found.add(ids, lambda positions: tuple(ids[: positions.stop]))


@given(prompts=PROMPTS, capacity=st.integers(1, 6))
def test_what_is_found_belongs_to_just_these_ids(prompts: list[list[int]], capacity: int) -> None:
    held = cache(capacity)
    for ids in prompts:
        blocks = held.find(ids)
        assert blocks == [tuple(ids[:end]) for end in range(BLOCK, BLOCK * len(blocks) + 1, BLOCK)]
        assert BLOCK * len(blocks) < max(len(ids), 1), "the last token must be read to go on"
        remember(held, ids)
        assert held.stats.held_bytes <= 10 * capacity
        whole = min(len(ids) // BLOCK, capacity)
        assert len(held.find([*ids, 9])) == whole, "what was just stored is there, and never an end without beginning"


def test_what_nobody_used_for_long_is_forgotten() -> None:
    now = [0.0]
    held: PrefixCache[tuple[int, ...]] = PrefixCache(1000, 10, BLOCK, retention_s=60, clock=lambda: now[0])
    remember(held, [1, 2, 3, 4])
    now[0] = 50
    assert len(held.find([1, 2, 9])) == 1
    now[0] = 100
    assert len(held.find([1, 2, 3, 4, 9])) == 1, "its beginning was used since, its end was not"
    now[0] = 161
    assert held.find([1, 2, 9]) == []
    assert held.stats.held_bytes == 0


@given(prompts=PROMPTS)
def test_without_want_of_room_nothing_is_forgotten(prompts: list[list[int]]) -> None:
    held, known = cache(1000), set[tuple[int, ...]]()
    asked = reused = 0
    for ids in prompts:
        wanted = 0
        while (wanted + 1) * BLOCK < len(ids) and tuple(ids[: (wanted + 1) * BLOCK]) in known:
            wanted += 1
        assert len(held.find(ids)) == wanted
        asked, reused = asked + len(ids), reused + wanted * BLOCK
        remember(held, ids)
        known |= {tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)}
    assert held.stats == PrefixStats(asked, reused, 0, 10 * len(known))


def test_the_prefix_not_used_for_longest_goes_first_and_from_its_end() -> None:
    held = cache(3)
    remember(held, [1, 1, 2, 2])
    remember(held, [3, 3])
    held.find([1, 1, 2, 2, 0])
    remember(held, [4, 4])  # throws out 3 3
    assert [len(held.find([*ids, 0])) for ids in ([3, 3], [1, 1, 2, 2], [4, 4])] == [0, 2, 1]
    remember(held, [5, 5])  # throws out the end 2 2, used before 4 4
    assert [len(held.find([*ids, 0])) for ids in ([1, 1, 2, 2], [4, 4], [5, 5])] == [1, 1, 1]
    assert held.stats.evicted_blocks == 2


def test_a_prefix_larger_than_the_cache_is_held_from_its_beginning() -> None:
    held = cache(2)
    remember(held, [1, 1, 2, 2, 3, 3])
    assert len(held.find([1, 1, 2, 2, 3, 3, 0])) == 2
    nothing = cache(0)
    remember(nothing, [1, 1])
    assert nothing.find([1, 1, 0]) == []


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 700), st.integers(0, 3), st.integers(0, 600)),
        min_size=1,
        max_size=8,
    )
)
def test_memory_grows_and_keeps_what_it_holds(steps: list[tuple[int, int, int, int]]) -> None:
    shape = replace(SHAPE, n_layers=1, n_kv_heads=1, head_dim=2)
    memory, rng = KeyValueMemory(shape, 4, 700), np.random.default_rng(0)
    written: dict[tuple[int, int], np.ndarray] = {}
    for slots, room, slot, start in steps:
        memory.reserve(slots, room)
        assert (memory.slots >= slots, memory.room >= room, memory.slots <= 4, memory.room <= 700) == (True,) * 4
        block = rng.normal(size=(1, 2, 1, 3, 2)).astype(np.float32)
        if slot < memory.slots and start + 3 <= memory.room:
            written = {at: b for at, b in written.items() if at[0] != slot or abs(at[1] - start) >= 3}
            memory.write(slot, start, block)
            written[slot, start] = block
        for (held_slot, at), wanted in written.items():
            assert np.array_equal(memory.read(held_slot, range(at, at + 3)), wanted)


def test_memory_begins_small() -> None:
    memory = KeyValueMemory(SHAPE, 4, 2048)
    assert memory.size_bytes == 0
    memory.reserve(1, 5)
    assert (memory.slots, memory.room, memory.version) == (1, FIRST_ROOM, 1)
    memory.reserve(1, FIRST_ROOM)
    assert memory.version == 1, "nothing is bound anew without need"
    keys, values = memory.layer(2, range(1))
    assert keys.flags.c_contiguous
    assert values.shape == (1, SHAPE.n_kv_heads, FIRST_ROOM + 1, SHAPE.head_dim)
