"""Servers that tests start: real ones, on loopback, killed at the end. Absent ones skip the test, saying so."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Sequence
from contextlib import closing
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


class Broker:
    """An MQTT broker without passwords."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        found = program(BROKERS)
        config = folder / "broker.conf"
        config.write_text(_MOSQUITTO if "mosquitto" in Path(found).name else _AMQTT)
        config.write_text(config.read_text("utf-8").format(port=self.port))
        self._words = [found, "-c", str(config)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns when it takes connections."""
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._words, stdout=quiet, stderr=quiet)

        def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, "the broker ended"
            with closing(socket.socket()) as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait_until(answers, timeout_s=60)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


_MOSQUITTO = "listener {port} 127.0.0.1\nallow_anonymous true\n"
_AMQTT = """
listeners:
  default:
    type: tcp
    bind: 127.0.0.1:{port}
plugins:
  amqtt.plugins.authentication.AnonymousAuthPlugin:
    allow_anonymous: true
"""
