"""Keys and values of prompts read before, to be used again by prompts that begin alike. Knows only ids, and a clock.

A prefix is cut into blocks of tokens; a block's key is a hash over its ids and the key of the block before it, so that
it stands for everything from the beginning on. Shards are told the keys, not the ids.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, TypeVar

import numpy as np

Block = TypeVar("Block")
BLOCK_TOKENS, KEY_BYTES = 64, 32
RETENTION_S = 3600.0
"""What of a conversation nobody goes on with is forgotten after so long."""


@dataclass(frozen=True)
class PrefixStats:
    """Since the start: prompt tokens looked up, found, and blocks thrown out; and bytes held now."""

    asked_tokens: int = 0
    reused_tokens: int = 0
    evicted_blocks: int = 0
    held_bytes: int = 0


class PrefixCache(Generic[Block]):
    """Holds at most `capacity_bytes`; what was not used for longest goes first, a prefix from its end on.

    What nobody used for `retention_s` goes at the next use of the cache. Not for two threads at once.
    """

    def __init__(
        self,
        capacity_bytes: int,
        block_bytes: int,
        block_tokens: int = BLOCK_TOKENS,
        retention_s: float = RETENTION_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.block_tokens, self._block_bytes = block_tokens, block_bytes
        self._capacity = capacity_bytes // block_bytes
        self._retention_s, self._clock = retention_s, clock
        self._held: OrderedDict[bytes, Block] = OrderedDict()  # the last used stands last
        self._used: dict[bytes, float] = {}
        self._asked = self._reused = self._evicted = 0

    @property
    def stats(self) -> PrefixStats:
        """What came of it."""
        return PrefixStats(self._asked, self._reused, self._evicted, len(self._held) * self._block_bytes)

    def find(self, ids: Sequence[int]) -> list[Block]:
        """The blocks of the longest prefix held, but never of all ids: the last one must be read to go on."""
        return self.find_keys(block_keys(ids[:-1], self.block_tokens), len(ids))

    def find_keys(self, keys: Sequence[bytes], asked_tokens: int) -> list[Block]:
        """The blocks held of a prefix whose blocks have these keys."""
        self._forget_old()
        found = list(takewhile(self._held.__contains__, keys))
        self._touch(found)
        self._asked += asked_tokens
        self._reused += len(found) * self.block_tokens
        return [self._held[key] for key in found]

    def add(self, ids: Sequence[int], read: Callable[[range], Block]) -> None:
        """Take in the whole blocks of `ids` that are not held yet; `read` gives the block at some positions."""
        self.add_keys(block_keys(ids, self.block_tokens), read)

    def add_keys(self, keys: Sequence[bytes], read: Callable[[range], Block]) -> None:
        """The same of the blocks of a prefix that have these keys."""
        self._forget_old()
        keys = keys[: self._capacity]
        self._touch([key for key in keys if key in self._held])
        for number, key in enumerate(keys):
            if key not in self._held:
                while len(self._held) >= self._capacity:
                    self._forget_first()
                self._held[key] = read(range(number * self.block_tokens, (number + 1) * self.block_tokens))
        self._touch(keys)

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Mark as just used, a beginning after what follows it: without its beginning a block is of no use."""
        now = self._clock()
        for key in reversed(keys):
            self._held.move_to_end(key)
            self._used[key] = now

    def _forget_old(self) -> None:
        oldest = self._clock() - self._retention_s
        while self._held and self._used[next(iter(self._held))] < oldest:
            self._forget_first()

    def _forget_first(self) -> None:
        key, _ = self._held.popitem(last=False)
        del self._used[key]
        self._evicted += 1


def block_keys(ids: Sequence[int], block_tokens: int = BLOCK_TOKENS, salt: bytes = b"") -> list[bytes]:
    """The keys of the whole blocks of `ids`, `KEY_BYTES` each; what is computed otherwise has a `salt` of its own."""
    key, keys = salt, list[bytes]()
    for end in range(block_tokens, len(ids) + 1, block_tokens):
        key = hashlib.sha256(key + np.asarray(ids[end - block_tokens : end], "<i8").tobytes()).digest()
        keys.append(key)
    return keys
