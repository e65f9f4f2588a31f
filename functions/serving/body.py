"""Read a request's body: bounded, UTF-8, JSON of bounded depth. Plain and chunked bodies read alike."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.wsgi import get_input_stream

from functions.serving.errors import RefusedError

MAX_DEPTH = 16
# A schema nests twice as deep as what it describes.
_DEPTHS = {"response_format": 40, "tools": 40}
# What is still read of a body over the bound, so that the client, which writes first, gets to read the refusal.
_DRAIN_BYTES = 32 << 20
_PIECE_BYTES = 1 << 16


def read_text(request: Request, max_bytes: int) -> str:
    """Return the body as text; raises `RequestEntityTooLarge` or `RefusedError`."""
    raw = _read_bytes(request, max_bytes)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8 (byte {error.start}); send UTF-8"
        raise RefusedError(400, message, param="body", code="invalid_encoding") from None


def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """Return the body as a JSON object; raises `RequestEntityTooLarge` or `RefusedError`."""
    return parse_object(read_text(request, max_bytes))


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; raises `RefusedError`, never repeating what was sent."""
    try:
        value = json.loads(text, parse_constant=_not_a_number)
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise _not_json("a number is out of range" if isinstance(error, ValueError) else "nested too deeply") from None
    if not isinstance(value, dict):
        raise _not_json("send an object, {…}")
    for name, item in value.items():
        _check_text(name, "body")
        _check(item, name or "body")
    return value


def _read_bytes(request: Request, max_bytes: int) -> bytes:
    """Read up to the bound; what lies beyond is read too, up to another bound, and forgotten."""
    stream = get_input_stream(request.environ)
    kept, size = [], 0
    try:
        while size < max_bytes + _DRAIN_BYTES and (piece := stream.read(_PIECE_BYTES)):
            size += len(piece)
            if size <= max_bytes:
                kept.append(piece)
    except Exception:  # noqa: BLE001  # each server has its own errors for a body that is not framed correctly
        message = "the body ended early or is not framed correctly"
        raise RefusedError(400, message, param="body", code="bad_body") from None
    if size > max_bytes:
        raise RequestEntityTooLarge
    return b"".join(kept)


def _check(value: Any, name: str) -> None:
    """Refuse what is nested too deeply and text that UTF-8 cannot carry (lone surrogates)."""
    pending, limit = [(value, 2)], _DEPTHS.get(name, MAX_DEPTH)
    while pending:
        item, depth = pending.pop()
        if depth > limit and isinstance(item, dict | list):
            raise RefusedError(400, f"nested deeper than {limit} levels", param=name, code="too_deep")
        if isinstance(item, str):
            _check_text(item, name)
        elif isinstance(item, dict):
            pending.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            pending.extend((part, depth + 1) for part in item)


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        message = "a lone surrogate is no text; send UTF-8"
        raise RefusedError(400, message, param=name, code="invalid_encoding") from None


def _not_a_number(_constant: str) -> NoReturn:
    raise ValueError


def _not_json(detail: str) -> RefusedError:
    return RefusedError(400, f"the body is not a JSON object: {detail}", param="body", code="invalid_json")
