"""What a component runs: `python -m deploy.greengrass.run NAME -- gunicorn …`; it keeps one function on a core device.

Both nuclei know a component's health only by its process. So this one ends, with a status that is not 0, when the
function cannot load or answers no more; the nucleus then starts it again, and rolls a deployment back if that does not
help. SIGTERM is handed on; gunicorn finishes what runs within the 5 s that the classic nucleus leaves.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from types import FrameType
from typing import Any

from deploy.greengrass.status import StatusTopic

BIND = "--bind"
LOOK_EVERY_S = 2.0
TELL_EVERY_S = 60.0
LONGEST_SILENCE_S = 60.0
_KILL_AFTER_S = 4.5
_ASK_TIMEOUT_S = 5.0
_UNHEALTHY = 1
_LOG = logging.getLogger(__name__)
_READY, _FULL = 200, 429


@dataclass(frozen=True)
class Health:
    """What the function says of itself: `starting`, `ready`, `failed` (it will not get better) or `silent`."""

    state: str
    reason: str = ""


def ask(address: tuple[str, int]) -> Health:
    """Ask `/_/ready`."""
    connection = HTTPConnection(*address, timeout=_ASK_TIMEOUT_S)
    try:
        connection.request("GET", "/_/ready")
        answer = connection.getresponse()
        body = json.loads(answer.read(65_536))
        reason = str(body.get("reason", "")) if isinstance(body, dict) else ""
    except (OSError, HTTPException, ValueError) as error:
        return Health("silent", type(error).__name__)
    finally:
        connection.close()
    if answer.status in {_READY, _FULL}:
        return Health("ready", reason)
    return Health("failed" if reason.startswith("loading failed") else "starting", reason)


@dataclass
class Keeper:
    """One function's process, asked again and again how it is."""

    name: str
    words: Sequence[str]
    address: tuple[str, int]
    topic: StatusTopic
    look_every_s: float = LOOK_EVERY_S
    longest_silence_s: float = LONGEST_SILENCE_S
    _stopping: bool = field(default=False, init=False)
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def run(self) -> int:
        """Keep the function until it ends, is told to, or is not well; returns the status to exit with."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        child = self._child = subprocess.Popen(self.words)  # noqa: S603 - the recipe's own words
        if self._stopping:  # told so before there was a child to tell
            child.terminate()
        try:
            status = self._watch(child)
        finally:
            self._end(child)
        self._tell(Health("stopped", f"status {status}"))
        self.topic.close()
        return status

    def _watch(self, child: subprocess.Popen[bytes]) -> int:
        heard_s = told_s = time.monotonic()
        told: Health | None = None
        while True:
            with suppress(subprocess.TimeoutExpired):
                status = child.wait(self.look_every_s)
                return 0 if self._stopping and status in {0, -signal.SIGTERM} else status or _UNHEALTHY
            if self._stopping:
                continue
            health, now_s = ask(self.address), time.monotonic()
            if health.state != "silent":
                heard_s = now_s
            if health != told or now_s - told_s >= TELL_EVERY_S:
                told, told_s = health, now_s
                self._tell(health)
            if health.state == "failed" or now_s - heard_s > self.longest_silence_s:
                _LOG.error("%s is not well: %s %s; ending it", self.name, health.state, health.reason)
                return _UNHEALTHY

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        if self._child is not None:
            with suppress(ProcessLookupError):
                self._child.terminate()

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """Leave no process behind."""
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(_KILL_AFTER_S)
            child.kill()
            child.wait()

    def _tell(self, health: Health) -> None:
        said: dict[str, Any] = {"function": self.name, "state": health.state, "reason": health.reason}
        self.topic.tell({**said, "node_id": os.environ.get("NODE_ID", "")})


def keeper(arguments: Sequence[str], environment: Mapping[str, str]) -> Keeper:
    """The keeper that the command line names: `NAME -- COMMAND --bind HOST:PORT …`; raises `SystemExit` with a word."""
    if len(arguments) < 3 or arguments[1] != "--" or BIND not in arguments[2:-1]:  # noqa: PLR2004
        sys.exit("usage: python -m deploy.greengrass.run NAME -- gunicorn … --bind HOST:PORT …")
    name, words = arguments[0], list(arguments[2:])
    host, _, port = words[words.index(BIND) + 1].rpartition(":")
    if not port.isdecimal():
        sys.exit(f"BIND must look like 127.0.0.1:8081, not '{words[words.index(BIND) + 1]}'")
    if words[0] == "gunicorn":
        words[:1] = [sys.executable, "-m", "gunicorn"]
    asked = "127.0.0.1" if host in {"", "0.0.0.0", "[::]"} else host.strip("[]")  # noqa: S104 - compared, not bound
    return Keeper(name, words, (asked, int(port)), StatusTopic(environment.get("STATUS_TOPIC", "")))


def main() -> None:
    """Keep the function."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    sys.exit(keeper(sys.argv[1:], os.environ).run())


if __name__ == "__main__":
    main()
