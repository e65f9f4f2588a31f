"""Between values and messages: what a shard sends is made here, what it is sent is checked here before it is used."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from enum import Enum

import numpy as np

from functions.edge import shard_pb2 as pb
from models.artifact.manifest import Manifest
from models.runtime.drafts import PIECE
from models.runtime.links import Answer, Choice, Floats, Opening, Piece, Want
from models.runtime.prefixes import BLOCK_TOKENS, KEY_BYTES
from models.runtime.sampling import Pick

PROTOCOL = 2
_MAX_LOGPROBS = 64
_MAX_CHOICES = 1 + PIECE
"""Tokens picked in answer to one piece: after each of a draft, and before it."""
_INT8_MAX = 127
_FRAME_BYTES = 64 << 10
"""What a message may have beside its states and bits."""


class WireError(Exception):
    """A message that cannot be used; says why."""


class MismatchError(WireError):
    """The other end is of another version, another model, or does not continue these layers."""


class Encoding(Enum):
    """How states travel: as they are, or with a loss."""

    FP32, FP16, INT8 = pb.FP32, pb.FP16, pb.INT8


_WANTS: dict[Want, pb.Want] = {Want.NOTHING: pb.NOTHING, Want.TOKEN: pb.TOKEN, Want.STATES: pb.STATES}
_WANTED = {value: want for want, value in _WANTS.items()}
_BYTES_EACH = {Encoding.FP32: 4, Encoding.FP16: 2, Encoding.INT8: 1}


def model_digest(manifest: Manifest) -> str:
    """What two shards of one model have in common, sealed or not."""
    values = (
        manifest.model_id,
        manifest.model_version,
        manifest.architecture.as_dict(),
        manifest.quantisation,
        manifest.made.get("key"),
    )
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def message_limit(width: int, vocab_size: int, tokens: int) -> int:
    """The largest message, in bytes, with states of so many tokens or logits of one."""
    return 4 * max(width * tokens, vocab_size) + _MAX_CHOICES * (vocab_size // 8) + _FRAME_BYTES


def states_bytes(width: int, tokens: int, encoding: Encoding) -> int:
    """Bytes of states on the wire, without their frame."""
    return tokens * (width * _BYTES_EACH[encoding] + (4 if encoding is Encoding.INT8 else 0))


# ---- states ----


def encode_states(states: Floats, encoding: Encoding) -> pb.States:
    """States (T, C) as a message."""
    return pb.States(tokens=len(states), encoding=encoding.value, values=_ENCODERS[encoding](states))


def decode_states(message: pb.States, width: int, most: int) -> Floats:
    """Read states (T, C); raises `WireError` for another width, too many tokens, or what is no number."""
    try:
        encoding = Encoding(message.encoding)
    except ValueError:
        raise WireError(f"states are encoded in way {message.encoding}, which is unknown") from None
    if not 0 < message.tokens <= most:
        raise WireError(f"a piece has {message.tokens} tokens; from 1 to {most} are read at once")
    size = states_bytes(width, message.tokens, encoding)
    if len(message.values) != size:
        raise WireError(f"states of {message.tokens} tokens have {len(message.values)} bytes instead of {size}")
    states = _DECODERS[encoding](message.values, width)
    if not np.isfinite(states).all():
        raise WireError("states hold what is no finite number")
    return states


def _fp32(states: Floats) -> bytes:
    return np.ascontiguousarray(states, "<f4").tobytes()


def _fp16(states: Floats) -> bytes:
    limit = float(np.finfo(np.float16).max)
    return np.clip(states, -limit, limit).astype("<f2").tobytes()


def _int8(states: Floats) -> bytes:
    scale = np.maximum(np.abs(states).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / _INT8_MAX
    codes = np.rint(states / scale).astype(np.int8)
    return b"".join(s.astype("<f4").tobytes() + c.tobytes() for s, c in zip(scale, codes, strict=True))


def _from_int8(values: bytes, width: int) -> Floats:
    rows = np.frombuffer(values, np.uint8).reshape(-1, 4 + width)
    scale = np.ascontiguousarray(rows[:, :4]).view("<f4")
    return np.asarray(rows[:, 4:].view(np.int8) * scale, np.float32)


_ENCODERS: dict[Encoding, Callable[[Floats], bytes]] = {
    Encoding.FP32: _fp32,
    Encoding.FP16: _fp16,
    Encoding.INT8: _int8,
}
_DECODERS: dict[Encoding, Callable[[bytes, int], Floats]] = {
    Encoding.FP32: lambda values, width: np.frombuffer(values, "<f4").reshape(-1, width),
    Encoding.FP16: lambda values, width: np.frombuffer(values, "<f2").reshape(-1, width).astype(np.float32),
    Encoding.INT8: _from_int8,
}


# ---- prefixes ----


def sent_prefix(opening: Opening, encoding: Encoding) -> list[bytes]:
    """The keys of a prefix at the other end, where states that travelled with a loss are others than those without."""
    if encoding is Encoding.FP32:
        return list(opening.prefix)
    return [hashlib.sha256(key + encoding.name.encode()).digest() for key in opening.prefix]


def read_prefix(keys: Sequence[bytes], context: int) -> tuple[bytes, ...]:
    """The keys as they were sent; raises `WireError` for what are none, or too many."""
    if len(keys) > context // BLOCK_TOKENS or any(len(key) != KEY_BYTES for key in keys):
        raise WireError("'prefix' of 'open' holds what are no keys, or more than the context has blocks")
    return tuple(keys)


def read_held(message: pb.Opened, opening: Opening) -> int:
    """Tokens of the prefix that the shard holds; raises `WireError` for more than there are."""
    if message.held_tokens > BLOCK_TOKENS * len(opening.prefix):
        raise WireError("a shard says that it holds more of a prefix than there is")
    return int(message.held_tokens)


# ---- pieces ----


def encode_piece(piece: Piece, encoding: Encoding) -> pb.ToShard:
    """A piece as a message."""
    choices = [
        pb.Choice(temperature=c.temperature, top_p=c.top_p, top_logprobs=c.top_logprobs, draw=c.draw, allowed=c.allowed)
        for c in piece.choices
    ]
    states = encode_states(piece.states, encoding)
    want = _WANTS[piece.want]
    return pb.ToShard(piece=pb.Piece(states=states, start=piece.start, want=want, choices=choices, again=piece.again))


def decode_piece(message: pb.Piece, width: int, vocab_size: int, most: int) -> Piece:
    """Read a piece; raises `WireError`."""
    states = decode_states(message.states, width, most)
    want = _WANTED.get(message.want)
    if want is None:
        raise WireError(f"a piece wants {message.want}, which is unknown")
    wanted = range(1, 1 + min(_MAX_CHOICES, len(states))) if want is Want.TOKEN else range(1)
    if len(message.choices) not in wanted:
        raise WireError(f"a piece has {len(message.choices)} choices; {wanted.start} to {wanted.stop - 1} can be made")
    choices = tuple(_choice(choice, vocab_size) for choice in message.choices)
    return Piece(states, message.start, want, choices, message.again)


def _choice(message: pb.Choice, vocab_size: int) -> Choice:
    in_bounds = {
        "temperature": 0 <= message.temperature < math.inf,
        "top_p": 0 <= message.top_p <= 1,
        "top_logprobs": message.top_logprobs <= _MAX_LOGPROBS,
        "draw": 0 <= message.draw < 1,
        "allowed": len(message.allowed) in {0, -(-vocab_size // 8)},
    }
    wrong = next((name for name, good in in_bounds.items() if not good), None)
    if wrong:
        raise WireError(f"'{wrong}' of a choice is out of bounds")
    return Choice(message.temperature, message.top_p, message.top_logprobs, message.draw, message.allowed)


# ---- answers ----


def encode_answer(answer: Answer, encoding: Encoding, *, leaving: bool) -> pb.FromShard:
    """An answer as a message."""
    if isinstance(answer, np.ndarray):
        return pb.FromShard(states=encode_states(answer, encoding), leaving=leaving)
    return pb.FromShard(picks=pb.Picks(picks=map(_encode_pick, answer)), leaving=leaving)


def _encode_pick(pick: Pick) -> pb.Picked:
    ids, logprobs = zip(*pick.top, strict=True) if pick.top else ((), ())
    return pb.Picked(id=pick.id, logprob=pick.logprob, margin=pick.margin, top_ids=ids, top_logprobs=logprobs)


def decode_answer(message: pb.FromShard, width: int, vocab_size: int, most: int) -> Answer:
    """Read an answer; raises `WireError`."""
    kind = message.WhichOneof("what")
    if kind == "states":
        return decode_states(message.states, width, most)
    if kind == "logits":
        return decode_logits(message.logits, vocab_size)
    if kind != "picks":
        raise WireError("a shard answered with neither tokens nor states")
    return tuple(_decode_pick(picked, vocab_size) for picked in message.picks.picks)


def _decode_pick(p: pb.Picked, vocab_size: int) -> Pick:
    if max(p.id, *p.top_ids, 0) >= vocab_size or len(p.top_ids) != len(p.top_logprobs):
        raise WireError("a shard picked what is no token")
    return Pick(p.id, p.logprob, p.margin, tuple(zip(p.top_ids, p.top_logprobs, strict=True)))


def encode_logits(logits: Floats, *, leaving: bool) -> pb.FromShard:
    """A rank's part of the logits (R,) as a message."""
    return pb.FromShard(logits=_fp32(logits), leaving=leaving)


def decode_logits(values: bytes, most: int) -> Floats:
    """Read a rank's part of the logits (R,); raises `WireError` if there are none, too many, or no numbers."""
    if len(values) % 4 or not 0 < len(values) <= 4 * most:
        raise WireError(f"a part of the logits has {len(values)} bytes")
    logits = np.frombuffer(values, "<f4")
    if np.isnan(logits).any():
        raise WireError("logits hold what is no number")
    return logits
