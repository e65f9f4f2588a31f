"""One running process of the bundle: its socket, its log, its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from deploy.errors import StartError
from deploy.local.plan import BIND, Command

Sink = Callable[[str, str], None]  # (name of the function, one line of its log)

_CHILD = str(Path(__file__).with_name("child.py"))
_LONGEST_LINE = 8192


def listen(port: int = 0) -> socket.socket:
    """Bind a loopback port (0: a free one), so that nobody else can take it before the process has it."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise StartError(f"port {port} cannot be used ({error.strerror}); choose another with --port") from error
    return listener


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on, for processes that bind them themselves."""
    listeners = [listen() for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class Process:
    """A child in a process group of its own, tied to this process's life."""

    def __init__(self, command: Command, listener: socket.socket | None, directory: Path, sink: Sink) -> None:
        self.name = command.name
        self._sink = sink
        words = list(command.words)
        if listener is not None:
            words[words.index(BIND) + 1] = f"fd://{listener.fileno()}"
        self._child = subprocess.Popen(  # noqa: S603 - the words come from stack.yml
            [sys.executable, "-IS", _CHILD, str(os.getpid()), *words],
            cwd=directory,
            env=dict(command.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=() if listener is None else (listener.fileno(),),
            start_new_session=True,
        )
        if listener is not None:
            listener.close()  # else callers of a dead function would hang on our copy of its socket
        if self._child.stdout is None:
            raise StartError(f"{self.name} has no log to read")
        self._pump = threading.Thread(target=self._copy_log, args=(self._child.stdout,), daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        """The process id, which is the id of its group too."""
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._child.poll()

    def ask_to_stop(self) -> None:
        """SIGTERM: stop accepting, finish what runs, exit."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout_s: float) -> None:
        """Wait for the end; after `timeout_s` end the whole group."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout_s)
        with suppress(ProcessLookupError):  # a worker that outlived its master goes too
            os.killpg(self.pid, signal.SIGKILL)
        self._child.wait()
        self._pump.join(timeout=1.0)

    def _copy_log(self, log: IO[bytes]) -> None:
        with log:
            while line := log.readline(_LONGEST_LINE):
                self._sink(self.name, line.decode("utf-8", "replace").rstrip("\n"))
