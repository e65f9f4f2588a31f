"""Shared passes and reused prefixes: on kernels that treat each row alike, nothing of them shows in the answers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from models.build.gguf_source import GgufSource
from models.build.pack import PackedModel, pack
from models.errors import AbandonedError
from models.runtime.engine import CHUNK, Decoder, Embeddings, TokenSequence
from models.runtime.sessions import EngineOptions
from models.runtime.turns import Turns
from tests.tiny_models import NARROW_HEADS, SHAPE, quiet, write_gguf

LONG = replace(SHAPE, context=512)
LONG_NARROW = replace(NARROW_HEADS, context=512)


@pytest.fixture(scope="module", params=["fp32", "int4", "int8", "narrow heads"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """Blocks of 32 and fp32: row-invariant kernels. Narrow heads are rotated by the graph."""
    narrow = request.param == "narrow heads"
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", shape=LONG_NARROW if narrow else LONG)
    return pack(GgufSource(path), "fp32" if narrow else request.param, None, quiet)


def decoder(packed: PackedModel, turns: Turns | None = None, **options: int) -> Decoder:
    embeddings = Embeddings(packed.embeddings(), None, packed.shape.width)
    settings = EngineOptions(threads=1, context=packed.shape.context, **options)
    return Decoder(packed.shape, packed.segments("plain"), embeddings, settings, turns)


def prompt(seed: int, length: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 200, length)]


def decode(sequence: TokenSequence, ids: Sequence[int], count: int = 8) -> list[np.ndarray]:
    """Logits of a greedy answer, step by step."""
    found = [sequence.logits(ids).copy()]
    for _ in range(count - 1):
        found.append(sequence.logits([int(found[-1].argmax())]).copy())
    return found


def equal(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


LENGTHS = (5, 40, 1, 23)


def alone(packed: PackedModel) -> list[list[np.ndarray]]:
    """The answers to prompts of `LENGTHS`, one after the other."""
    found = []
    engine = decoder(packed)
    for seed, length in enumerate(LENGTHS):
        with engine.sequence() as sequence:
            found.append(decode(sequence, prompt(seed, length)))
    return found


def test_a_shared_pass_gives_bitwise_what_passes_alone_give(packed: PackedModel) -> None:
    engine = decoder(packed)
    assert engine.batches
    with ExitStack() as open_ones:
        sequences = [open_ones.enter_context(engine.sequence()) for _ in LENGTHS]
        found = [[s.logits(prompt(seed, LENGTHS[seed])).copy()] for seed, s in enumerate(sequences)]
        for _ in range(7):
            for sequence, logits in zip(sequences, found, strict=True):
                sequence.next_id = int(logits[-1].argmax())
            engine.step(sequences)
            for sequence, logits in zip(sequences, found, strict=True):
                logits.append(sequence._logits.copy())
    assert all(equal(a, b) for a, b in zip(found, alone(packed), strict=True))


def test_answers_asked_for_at_once_are_bitwise_those_alone(packed: PackedModel) -> None:
    together = decoder(packed, Turns(patience=1e9))
    met = threading.Barrier(len(LENGTHS))

    def answer(seed: int) -> list[np.ndarray]:
        with together.sequence() as sequence:
            met.wait(20)
            return decode(sequence, prompt(seed, LENGTHS[seed]))

    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        found = list(pool.map(answer, range(len(LENGTHS))))
    assert all(equal(a, b) for a, b in zip(found, alone(packed), strict=True))


def test_one_that_sits_out_between_two_others_is_not_touched(packed: PackedModel) -> None:
    """Slots 0 and 2 step; 1 is asleep, at a length where its memory is full to the last row."""
    engine = decoder(replace(packed, shape=replace(packed.shape, context=64)))
    with engine.sequence() as a, engine.sequence() as sleeper, engine.sequence() as b:
        for sequence, seed in ((a, 1), (b, 2)):
            sequence.logits(prompt(seed, 7))
        sleeper.logits(prompt(3, 63))
        sleeper.logits([9])
        assert sleeper.room == 0
        before = engine.layers.memory.read(sleeper.slot, range(64)).copy()
        logits = sleeper._logits.copy()
        a.next_id = b.next_id = 11
        engine.step([a, b])
        assert np.array_equal(engine.layers.memory.read(sleeper.slot, range(64)), before)
        assert np.array_equal(sleeper._logits, logits)
        shared = b._logits.copy()
    with engine.sequence() as alone:
        alone.logits(prompt(2, 7))
        assert np.array_equal(alone.logits([11]), shared)


def test_a_memory_that_grows_changes_nothing(packed: PackedModel) -> None:
    ids = prompt(4, 250)
    with decoder(packed).sequence() as roomy:
        roomy._decoder.layers.memory.reserve(1, 500)
        wanted = decode(roomy, ids, 20)
    with decoder(packed).sequence() as sequence:
        found = decode(sequence, ids, 20)
        assert sequence._decoder.layers.memory.version == 2, "it grew while decoding"
    assert equal(found, wanted)


def test_a_prefix_hit_is_bitwise_the_same(packed: PackedModel) -> None:
    first, second = prompt(5, 200), [*prompt(5, 200)[:150], *prompt(6, 90)]
    with decoder(packed).sequence() as sequence:
        wanted = decode(sequence, second)
    engine = decoder(packed, prefix_cache_bytes=1 << 24)
    assert engine.prefixes is not None
    with engine.sequence() as sequence:
        decode(sequence, first)
    with engine.sequence() as sequence:
        found = decode(sequence, second)
        assert sequence.length == len(second) + 7
    assert engine.prefixes.stats.reused_tokens == 128, "150 tokens are alike: two blocks of 64"
    assert equal(found, wanted)


def test_a_conversation_finds_its_own_answer_again(packed: PackedModel) -> None:
    engine = decoder(packed, prefix_cache_bytes=1 << 24)
    ids = prompt(7, 60)
    with engine.sequence() as sequence:
        steps = decode(sequence, ids, 80)
    answer = [int(step.argmax()) for step in steps]
    assert engine.prefixes is not None
    with engine.sequence() as sequence:
        sequence.logits([*ids, *answer, 5, 6, 7])
    assert engine.prefixes.stats.reused_tokens == 128


def test_without_a_cache_nothing_is_kept(packed: PackedModel) -> None:
    assert decoder(packed).prefixes is None


def test_reading_ends_when_nobody_waits(packed: PackedModel) -> None:
    engine = decoder(packed, prefix_cache_bytes=1 << 24)
    asked: list[int] = []

    def gone() -> bool:
        asked.append(0)
        return len(asked) > 1

    with pytest.raises(AbandonedError), engine.sequence(gone=gone) as sequence:
        sequence.logits(prompt(8, CHUNK + 5))
    assert len(asked) == 2, "once before each piece"
    with engine.sequence() as sequence:
        assert sequence.length == 0
        sequence.logits(prompt(8, 5))


def test_the_provider_in_use_is_reported(packed: PackedModel) -> None:
    assert decoder(packed).provider == "CPU"
