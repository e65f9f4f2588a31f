"""One shard's layers at work: sessions with keys and values of their own, states in, states or logits out.

Steps of single tokens that wait at the same time become one pass, as in `models.runtime.engine`. B sequences, T new
tokens, C width, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.artifact.manifest import EXPORTED, Manifest
from models.artifact.names import PLAIN
from models.artifact.shape import LlamaShape
from models.artifact.store import Artifact
from models.errors import ArtifactError, LinkLostError, PromptTooLongError
from models.runtime.descent import LayerDescent
from models.runtime.layers import Floats, Layers
from models.runtime.links import Opening, Want
from models.runtime.prefixes import BLOCK_TOKENS, PrefixCache, PrefixStats
from models.runtime.sessions import EngineOptions, parts_of
from models.runtime.tally import Tally
from models.runtime.turns import Turns, TurnStats

if TYPE_CHECKING:
    from models.artifact.keys import KeyWrapper

Then = Callable[[Floats], None]
_PATIENCE, _PATIENCE_BELOW = 2.0, 0.25
"""How long a pass of the head, and of another shard, waits for company, in passes.

At the head the others may be at the next shard, and come back after one or two. From there they come together; were a
shard to wait for who is still at the head while the head waits for who is here, neither would ever meet the other.
"""


@dataclass(frozen=True)
class PrefixBlock:
    """Of a block of tokens, keys and values (L, 2, H, n, D), and the states (n, C) that the layers made of them.

    Who comes next may not hold this block: it is then sent the states. The last layers keep none.
    """

    memory: Floats
    states: Floats


class Lane:
    """One graph variant of a shard: its layers, and slots for sessions. Lanes share their `turns`."""

    def __init__(self, shape: LlamaShape, layers: Layers, options: EngineOptions, turns: Turns) -> None:
        self.shape, self.layers, self.turns = shape, layers, turns
        self.groups = options.groups or max(2, math.ceil(shape.n_layers / len(layers.range)))
        self.prefixes = _prefix_cache(shape, layers.range, options.prefix_cache_bytes)
        self._sessions = [StageSession(self, slot) for slot in range(options.sequences)]
        self._free = list(range(options.sequences))
        self._places, self._lock = threading.BoundedSemaphore(options.sequences), threading.Lock()

    @property
    def open_sessions(self) -> int:
        """How many are lent."""
        return len(self._sessions) - len(self._free)

    @property
    def alone(self) -> bool:
        """Whether at most one session is lent."""
        return self.open_sessions <= 1

    @property
    def is_last(self) -> bool:
        """Whether these layers end the model."""
        return self.layers.range.stop == self.shape.n_layers

    @contextmanager
    def session(self, opening: Opening, wait_s: float | None = None) -> Iterator[StageSession]:
        """Lend an empty session; waits while all are in use, but no longer than `wait_s`, then `LinkLostError`.

        Passes of those that expire earlier go first. Of the free slots it is the one near which the session's `place`
        lies: those that are neighbours in one shard had better be so in the next, since they come together.
        """
        if not self._places.acquire(timeout=wait_s):
            raise LinkLostError(f"all of its {len(self._sessions)} sessions are in use")
        with self._lock:
            slot = min(self._free, key=lambda free: (abs(free - opening.place), free))
            self._free.remove(slot)
        session = self._sessions[slot]
        session.reset(opening)
        try:
            yield session
        finally:
            self.turns.leave(session)
            with self._lock:
                self._free.append(slot)
            self._places.release()

    def step(self, members: Sequence[StageSession]) -> None:
        """Read each member's next state, in one pass over the slots from the first to the last of them.

        A slot between them that sits out is computed too: what it writes lies behind its own tokens.
        """
        slots = range(min(m.slot for m in members), max(m.slot for m in members) + 1)
        stack = self.layers.stack(slots, 1 + max(m.length for m in members), n_tokens=1)
        if len(slots) == 1:
            x = members[0].next_states[None]
        else:
            x = np.zeros((len(slots), 1, self.shape.width), np.float32)
            for member in members:
                x[member.slot - slots.start] = member.next_states
        found = stack.through(x, [self._sessions[slot].length for slot in slots])
        results = found["logits"] if self.is_last else found["carried"]
        own = self.is_last and len(slots) == 1  # nobody else's pass writes there, and who sends no states keeps none
        for member in members:
            result = results[member.slot - slots.start]
            member.stepped(result if own else result.copy())


class StageSession:
    """One request's tokens in a slot of a lane's memory. Not for two threads at once."""

    def __init__(self, lane: Lane, slot: int) -> None:
        self._lane, self.slot = lane, slot
        self.next_states: Floats = np.zeros((1, 0), np.float32)
        self._result = self.next_states
        self._then: Then | None = None
        self._error: Exception | None = None
        self.reset(Opening("", 0.0))

    def reset(self, opening: Opening) -> None:
        """Begin anew; what the memory holds is never read again."""
        self.deadline, self._exact, self.length = opening.expires, opening.exact, 0
        self._groups = opening.groups or self._lane.groups
        self._prefix: Sequence[bytes] = ()
        self._made = np.zeros((0, 0), np.float32)  # states (n, C) that the layers made of the prefix

    def recall(self, prefix: Sequence[bytes]) -> Floats:
        """Take over what the prefix cache holds of these blocks; returns the states (n, C) that the layers made of it.

        To be called first if at all. Blocks that it lacks are left to it once they are read.
        """
        lane = self._lane
        width = 0 if lane.is_last else lane.shape.width
        self._prefix, self._made = prefix, np.zeros((0, width), np.float32)
        if lane.prefixes is not None and prefix:
            lane.turns.take(self, self.deadline, lambda _: self._take_over())
        return self._made

    def _take_over(self) -> None:
        lane, prefixes = self._lane, self._lane.prefixes
        assert prefixes is not None  # noqa: S101  # `recall` saw to it
        blocks = prefixes.find_keys(self._prefix, len(self._prefix) * BLOCK_TOKENS)
        lane.layers.memory.reserve(self.slot + 1, len(blocks) * BLOCK_TOKENS)
        for number, block in enumerate(blocks):
            lane.layers.memory.write(self.slot, number * BLOCK_TOKENS, block.memory)
        self.length = len(blocks) * BLOCK_TOKENS
        self._made = np.concatenate([self._made, *(block.states for block in blocks)])

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; raises `LinkLostError` if there are fewer."""
        if length > self.length:
            raise LinkLostError(f"a piece follows {length} tokens, and only {self.length} were read")
        self.length = length

    @property
    def company(self) -> int:
        """How many sessions share a pass: so many that there are the groups that the head asked for."""
        return max(1, math.ceil(self._lane.open_sessions / self._groups))

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._lane.layers.context - self.length

    def read(self, states: Floats, want: Want, rows: int = 1, then: Then | None = None) -> Floats:
        """Read states (T, C) and return what the layers make of them.

        Of the last layers that is logits (R, V) after the last `rows` if a token is wanted, normalised states (T, C)
        otherwise; of others, states (T, C). Raises `PromptTooLongError` if they do not fit.

        `then` is called with the result. Whoever makes a pass that several share does so for all of them, before they
        are woken: as many threads, all wanting the interpreter at once, would take several times as long. It should
        wait for nobody; what it raises is raised here.
        """
        if not 0 < len(states) <= self.room:
            raise PromptTooLongError(f"{len(states)} tokens do not fit: there is room for {self.room}", "messages")
        lane = self._lane
        if len(states) == 1 and self.length and want is Want.TOKEN and lane.layers.batches:
            self.next_states, self._then, self._error = states, then, None
            lane.turns.take(self, self.deadline, lane.step, shared=True, most=self.company, place=self.slot)
            if self._error is not None:
                raise self._error
            return self._result
        lane.turns.take(self, self.deadline, lambda _: self._read(states, want, rows))
        if then is not None:
            then(self._result)
        return self._result

    def descent(self, pieces: Sequence[Floats]) -> LayerDescent:
        """Begin to read pieces of states (T, C), stopping between layers; `go_down` goes on."""
        if not 0 < sum(map(len, pieces)) <= self.room:
            raise PromptTooLongError(f"the tokens do not fit: there is room for {self.room}", "messages")
        return LayerDescent(self._lane.layers, self.slot, self.length, pieces)

    def go_down(self, descent: LayerDescent, passed: int) -> Floats:
        """Let a descent pass so many of the model's layers; after all that are here, its pieces are read."""
        found: list[Floats] = []
        self._lane.turns.take(self, self.deadline, lambda _: found.append(descent.to(passed)))
        if passed == self._lane.layers.range.stop:
            self.length += len(found[0])
        return found[0]

    def _read(self, states: Floats, want: Want, rows: int) -> None:
        layers, begins, length = self._lane.layers, self.length, self.length + len(states)
        head = want is Want.TOKEN
        stack = layers.stack(range(self.slot, self.slot + 1), length, len(states), head=head or self._exact)
        found = stack.through(states[None], [length - 1], rows if head else 1)
        self.length = length
        name = "carried" if not self._lane.is_last else "logits" if head else "hidden"
        self._result = found[name][0].copy()
        if begins < len(self._prefix) * BLOCK_TOKENS:
            self._remember(begins)

    def _remember(self, begins: int) -> None:
        """Leave the whole blocks of the prefix to the cache; what was read last begins there."""
        lane, memory = self._lane, self._lane.layers.memory
        if not lane.is_last:
            self._made = np.concatenate([self._made[:begins], self._result])
        if lane.prefixes is not None:
            keys = self._prefix[: self.length // BLOCK_TOKENS]
            lane.prefixes.add_keys(
                keys, lambda at: PrefixBlock(memory.read(self.slot, at), self._made[at.start : at.stop].copy())
            )

    def stepped(self, result: Floats) -> None:
        """Take note that the next state was read, and do what is to be done then."""
        self.length += 1
        self._result = result
        try:
            if self._then is not None:
                self._then(result)
        except Exception as error:  # noqa: BLE001  # it is raised where the turn was taken: others share the pass
            self._error = error


class Stage:
    """Some layers of an artifact, loaded; `lanes` by graph variant.

    `steps`: from a single token's states to the token after it, shards beyond included.
    """

    def __init__(self, manifest: Manifest, layers: range, lanes: Mapping[str, Lane]) -> None:
        self.manifest, self.layers, self.lanes, self.steps = manifest, layers, lanes, Tally()

    @classmethod
    def open(
        cls,
        path: Path,
        layers: range,
        options: EngineOptions,
        keys: KeyWrapper | None = None,
        signer: bytes | None = None,
    ) -> Stage:
        """Load the files of these layers and no others; raises what `Artifact.open` raises."""
        return cls.of(Artifact.open(path, layers, keys, signer).keeping(), options)

    @classmethod
    def of(cls, artifact: Artifact, options: EngineOptions, exits: Sequence[int] = ()) -> Stage:
        """Load what the artifact is open for, skills cut at `exits`; raises `ArtifactError`."""
        m = artifact.manifest
        if m.graph == EXPORTED:
            raise ArtifactError(f"{artifact.path} has an exported graph, which cannot be cut; build it '--via own'")
        turns = Turns(_PATIENCE_BELOW if artifact.layers.start else _PATIENCE)
        lanes = {}
        for variant, parts in parts_of(artifact, options, exits):
            writes = m.lm_head and variant == PLAIN
            own = options if writes else replace(options, prefix_cache_bytes=0)
            layers = Layers(m.architecture, parts.segments, own, parts.long)
            lanes[variant] = Lane(m.architecture, layers, own, turns)
        return cls(m, artifact.layers, lanes)

    @property
    def is_last(self) -> bool:
        """Whether these layers end the model."""
        return self.layers.stop == self.manifest.architecture.n_layers

    @property
    def open_sessions(self) -> int:
        """How many are lent."""
        return sum(lane.open_sessions for lane in self.lanes.values())

    @property
    def passes(self) -> TurnStats:
        """Passes of single tokens since the start."""
        return next(iter(self.lanes.values())).turns.stats

    @property
    def held_bytes(self) -> int:
        """Bytes set aside for keys and values."""
        return sum(lane.layers.memory.size_bytes for lane in self.lanes.values())

    @property
    def prefix_stats(self) -> PrefixStats:
        """What came of the prefix cache."""
        lane = self.lanes.get(PLAIN)
        return lane.prefixes.stats if lane and lane.prefixes else PrefixStats()

    @property
    def provider(self) -> str:
        """Short name of the execution provider in use."""
        return next(iter(self.lanes.values())).layers.provider


def _prefix_cache(shape: LlamaShape, layers: range, capacity_bytes: int) -> PrefixCache[PrefixBlock] | None:
    memory = 2 * len(layers) * shape.n_kv_heads * shape.head_dim
    states = 0 if layers.stop == shape.n_layers else shape.width
    return PrefixCache(capacity_bytes, 4 * (memory + states) * BLOCK_TOKENS) if capacity_bytes else None


def session_bytes(shape: LlamaShape, layers: range, context: int) -> int:
    """Bytes of keys and values that one session may come to in one lane."""
    return 4 * 2 * len(layers) * shape.n_kv_heads * shape.head_dim * (min(context, shape.context) + 1)
