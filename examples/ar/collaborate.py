"""Two headsets in one room: what one says and does, the other sees, in the same order.

Each headset has what is said understood by the federation (several device tiers vote), appends the turn and what it
changes to the shared log, and builds its world from nothing but the log, so that both worlds are the same.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

PLACE = "http://127.0.0.1:8080/function/federation"
DEADLINE_MS = 2000
SCRIPT = (
    ("ada", "play some jazz on spotify"),
    ("bob", "book a table for two in paris"),
    ("ada", "what is the weather in boston"),
    ("bob", "add this song to my workout playlist"),
)


@dataclass
class World:
    """What a headset knows: who said what, and the last frame of each intent. `upto`: how far it has read."""

    said: list[tuple[str, str]] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    upto: int = 0

    def take(self, event: dict[str, Any]) -> None:
        """Apply one event of the log."""
        body = event["body"]
        if event["kind"] == "turn":
            self.said.append((body["who"], body["text"]))
        elif event["kind"] == "fact":
            self.facts[body["intent"]] = body["slots"]
        else:
            self.said, self.facts = [], {}


class Headset:
    """One wearer. `place` is a federation's address; each headset may use another one if they share a log."""

    def __init__(self, who: str, place: str, room: str) -> None:
        self.who = who
        self.world = World()
        self._room = room
        self._http = httpx.Client(base_url=place, trust_env=False, timeout=30.0)

    def say(self, text: str) -> dict[str, Any]:
        """Say something: understood by vote, shared as a turn and, where nodes agreed on a frame, as a fact."""
        request = {
            "skill": "home",
            "deadline_ms": DEADLINE_MS,
            "messages": [{"role": "user", "content": text}],
        }
        report: dict[str, Any] = self._post("/v1/chat/completions", request)["edgecascade"]
        self._share("turn", {"who": self.who, "text": text})
        if report["frame"] is not None and not report["degraded"]:
            self._share("fact", report["frame"])
        return report

    def look(self) -> World:
        """Read on to the end of the log."""
        while True:
            query: dict[str, str | int] = {"after": self.world.upto, "conversation": self._room}
            reply = self._http.get("/v1/state/events", params=query).raise_for_status().json()
            for event in reply["events"]:
                self.world.take(event)
            self.world.upto = reply["upto"]
            if not reply["events"]:
                return self.world

    def leave(self) -> None:
        """End the session for all: the conversation is deleted everywhere."""
        self._http.delete(f"/v1/conversations/{self._room}").raise_for_status()

    def _share(self, kind: str, body: dict[str, Any]) -> None:
        """Append an event under an id of its own, so that sending it twice does no harm."""
        event = {"id": uuid.uuid4().hex, "conversation": self._room, "kind": kind, "body": body}
        self._post("/v1/state/events", event)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._http.post(path, json=body).raise_for_status().json()


def collaborate(headsets: Sequence[Headset], script: Sequence[tuple[str, str]] = SCRIPT) -> None:
    """Let everybody say their lines at the same time, and print the world as each then sees it."""

    def speak(headset: Headset) -> list[str]:
        said = []
        for _, text in (line for line in script if line[0] == headset.who):
            report = headset.say(text)
            flag = ", degraded" if report["degraded"] else ""
            said.append(f"{headset.who}: {text} → {report['frame']} ({report['reason']}{flag})")
        return said

    with ThreadPoolExecutor(len(headsets)) as pool:
        for lines in pool.map(speak, headsets):
            print(*lines, sep="\n")
    for headset in headsets:
        world = headset.look()
        print(f"{headset.who} sees: {world.said}; {world.facts}")


def main(words: Sequence[str] | None = None) -> int:
    """Run the example; 0 if all headsets saw the same and forgot it at the end."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--places", nargs="+", default=[PLACE], help="federations; the headsets take turns at them")
    places: list[str] = options.parse_args(words).places
    room = f"room-{uuid.uuid4().hex[:8]}"
    names = list(dict.fromkeys(who for who, _ in SCRIPT))
    headsets = [Headset(who, places[number % len(places)], room) for number, who in enumerate(names)]
    collaborate(headsets)
    same = all(headset.world == headsets[0].world for headset in headsets)
    headsets[0].leave()
    forgotten = not any(headset.look().said for headset in headsets)
    print(f"the same world for all: {same}; forgotten at the end: {forgotten}")
    return 0 if same and forgotten else 1


if __name__ == "__main__":
    sys.exit(main())
