"""Servers that tests start: real ones, on loopback, killed at the end. Absent ones skip the test, saying so."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fakes import free_port, wait_until

ROOT = Path(__file__).parents[1]
REDIS = ("redis-server",)
BROKERS = ("mosquitto", "amqtt")


def program(names: Sequence[str]) -> str:
    """The first that is installed, on the PATH or by `make servers`; skips the test if none is."""
    for name in names:
        found = shutil.which(name) or next(iter(map(str, (ROOT / ".venv-servers").glob(f"**/bin/{name}"))), None)
        if found:
            return found
    pytest.skip(f"{' or '.join(names)} is not installed: `make servers`, or the package of your system")


class RedisServer:
    """A Redis that keeps what it acknowledged, also when it is killed."""

    def __init__(self, folder: Path) -> None:
        self._words = [
            *(program(REDIS), "--port", str(free_port()), "--bind", "127.0.0.1", "--dir", str(folder)),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
        ]
        self.url = f"redis://127.0.0.1:{self._words[2]}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns when it answers."""
        import redis

        self._process = subprocess.Popen(self._words, stdout=subprocess.DEVNULL)

        def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, "redis-server ended"
            with redis.Redis.from_url(self.url) as client:
                try:
                    return bool(client.ping())
                except redis.RedisError:
                    return False

        wait_until(answers)

    def kill(self) -> None:
        """End it as a power cut would, as far as a process can tell."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
