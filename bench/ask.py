"""One question, or a conversation, on a terminal: the answer on stdout, how it came about on stderr."""

from __future__ import annotations

import json
import sys

from bench.client import Client, Reply


def once(client: Client, skill: str, text: str, *, as_json: bool) -> None:
    """Ask for one frame and print it; raises `ServiceError`."""
    reply = client.ask(skill, text)
    if as_json:
        print(json.dumps(reply.as_dict(), ensure_ascii=False))
        return
    print(json.dumps(reply.frame, ensure_ascii=False) if reply.frame else reply.text)
    print(how(reply), file=sys.stderr)


def talk(client: Client, text: str | None, *, as_json: bool, goes_on: bool) -> None:
    """Chat, each turn with what was said before in mind, until there is nothing to say; raises `ServiceError`."""
    messages: list[dict[str, str]] = []
    said = text or _listen()
    while said:
        messages.append({"role": "user", "content": said})
        for piece in client.stream("chat", messages):
            if isinstance(piece, Reply):
                messages.append({"role": "assistant", "content": piece.text})
                print(json.dumps(piece.as_dict(), ensure_ascii=False) if as_json else "", flush=True)
                print(how(piece), file=sys.stderr)
            elif not as_json:
                print(piece, end="", flush=True)
        said = _listen() if goes_on else ""


def how(reply: Reply) -> str:
    """Tier, reason, confidence and milliseconds in a line."""
    sure = "" if reply.confidence is None else f", confidence {reply.confidence:.2f}"
    flagged = ", degraded" if reply.degraded else ""
    return f"{reply.source} ({reply.reason}){sure}, {reply.latency_ms:.0f} ms{flagged}"


def _listen() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
