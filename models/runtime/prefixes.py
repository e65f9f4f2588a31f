"""Keys and values of prompts read before, to be used again by prompts that begin alike. Pure: knows only ids.

A prefix is cut into blocks of tokens; a block's key is a hash over its ids and the key of the block before it, so that
it stands for everything from the beginning on.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, TypeVar

import numpy as np

Block = TypeVar("Block")
BLOCK_TOKENS = 64


@dataclass(frozen=True)
class PrefixStats:
    """Since the start: prompt tokens looked up, found, and blocks thrown out; and bytes held now."""

    asked_tokens: int = 0
    reused_tokens: int = 0
    evicted_blocks: int = 0
    held_bytes: int = 0


class PrefixCache(Generic[Block]):
    """Holds at most `capacity_bytes`; what was not used for longest goes first, a prefix from its end on.

    Not for two threads at once.
    """

    def __init__(self, capacity_bytes: int, block_bytes: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.block_tokens, self._block_bytes = block_tokens, block_bytes
        self._capacity = capacity_bytes // block_bytes
        self._held: OrderedDict[bytes, Block] = OrderedDict()  # the last used stands last
        self._asked = self._reused = self._evicted = 0

    @property
    def stats(self) -> PrefixStats:
        """What came of it."""
        return PrefixStats(self._asked, self._reused, self._evicted, len(self._held) * self._block_bytes)

    def find(self, ids: Sequence[int]) -> list[Block]:
        """The blocks of the longest prefix held, but never of all ids: the last one must be read to go on."""
        found = list(takewhile(self._held.__contains__, self._keys(ids[:-1])))
        self._touch(found)
        self._asked += len(ids)
        self._reused += len(found) * self.block_tokens
        return [self._held[key] for key in found]

    def add(self, ids: Sequence[int], read: Callable[[range], Block]) -> None:
        """Take in the whole blocks of `ids` that are not held yet; `read` gives the block at some positions."""
        keys = self._keys(ids)[: self._capacity]
        self._touch([key for key in keys if key in self._held])
        for number, key in enumerate(keys):
            if key not in self._held:
                while len(self._held) >= self._capacity:
                    self._held.popitem(last=False)
                    self._evicted += 1
                self._held[key] = read(range(number * self.block_tokens, (number + 1) * self.block_tokens))
        self._touch(keys)

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Mark as just used, a beginning after what follows it: without its beginning a block is of no use."""
        for key in reversed(keys):
            self._held.move_to_end(key)

    def _keys(self, ids: Sequence[int]) -> list[bytes]:
        size, key, keys = self.block_tokens, b"", list[bytes]()
        for end in range(size, len(ids) + 1, size):
            key = hashlib.sha256(key + np.asarray(ids[end - size : end], "<i8").tobytes()).digest()
            keys.append(key)
        return keys
