"""The stack as processes on this machine."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from deploy.errors import StartError
from deploy.local.plan import Command, Site, commands
from deploy.local.process import Process, Sink, listen
from deploy.stack import Stack

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.1


@dataclass(frozen=True)
class Settings:
    """How to run the bundle. `port` 0 takes a free one; `gateway_environment` is what the gateway is told besides."""

    site: Site
    port: int = 8080
    ready_timeout_s: float = READY_TIMEOUT_S
    stop_timeout_s: float = STOP_TIMEOUT_S
    inherited: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    gateway_environment: Mapping[str, str] = field(default_factory=dict)


class Bundle:
    """Functions and gateway; a context manager that leaves nothing behind.

    Enter it in a thread that lives as long as the bundle: Linux ties a child to the thread that made it.
    """

    def __init__(self, stack: Stack, settings: Settings, sink: Sink) -> None:
        self._stack = stack
        self._settings = settings
        self._sink = sink
        self._last_lines: dict[str, deque[str]] = {}
        self.processes: list[Process] = []
        self.ports: dict[str, int] = {}
        self.port = 0
        self.url = ""

    def __enter__(self) -> Self:
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the gateway first, so that what runs finishes; then the functions, callers before callees."""
        for process in reversed(self.processes):
            if process.name == "gateway":
                process.ask_to_stop()
                process.wait(self._settings.stop_timeout_s)
        for process in self.processes:
            process.ask_to_stop()
        for process in self.processes:
            process.wait(self._settings.stop_timeout_s)

    def watch(self, stop: threading.Event) -> None:
        """Return when `stop` is set; report each function that ends meanwhile, and restart none.

        Raises `StartError` if the gateway ends.
        """
        running = list(self.processes)
        while not stop.wait(POLL_S):
            for process in [p for p in running if p.exit_code is not None]:
                running.remove(process)
                if process.name == "gateway":
                    raise StartError(f"the gateway ended with status {process.exit_code}; see its log above")
                self._sink(
                    process.name, f"ended with status {process.exit_code}; it is not restarted, the others go on"
                )

    def _start(self) -> None:
        listeners = {name: listen() for name in self._stack.functions}
        try:
            listeners["gateway"] = listen(self._settings.port)
            ports = {name: int(s.getsockname()[1]) for name, s in listeners.items()}
            gateway_port = ports.pop("gateway")
            self.ports, self.port, self.url = ports, gateway_port, f"http://127.0.0.1:{gateway_port}"
            site = self._settings.site
            for command in commands(self._stack, ports, gateway_port, site, self._settings.inherited):
                more = self._settings.gateway_environment if command.name == "gateway" else {}
                told = replace(command, environment={**command.environment, **more})
                self.processes.append(self._spawn(told, listeners))
        finally:
            for listener in listeners.values():
                listener.close()

    def _spawn(self, command: Command, listeners: Mapping[str, socket.socket]) -> Process:
        lines = self._last_lines.setdefault(command.name, deque(maxlen=20))

        def note(name: str, line: str) -> None:
            lines.append(line)
            self._sink(name, line)

        return Process(command, listeners[command.name], self._settings.site.root, note)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._settings.ready_timeout_s
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            for process in self.processes:
                if process.name == "gateway":
                    url, wanted = f"{self.url}/healthz", None
                else:
                    url, wanted = f"http://127.0.0.1:{self.ports[process.name]}/_/ready", httpx.codes.OK
                self._wait_for(process, client, url, wanted, deadline)

    def _wait_for(self, process: Process, client: httpx.Client, url: str, wanted: int | None, deadline: float) -> None:
        said = "nothing"
        while time.monotonic() < deadline:
            if process.exit_code is not None:
                raise StartError(self._with_log(process, f"ended with status {process.exit_code} before it was ready"))
            try:
                status = client.get(url).status_code
            except httpx.TransportError as error:
                said = type(error).__name__
            else:
                said = str(status)
                if wanted in {None, status}:
                    return
            time.sleep(POLL_S)
        limit_s = self._settings.ready_timeout_s
        raise StartError(self._with_log(process, f"was not ready after {limit_s:.0f} s (its last answer: {said})"))

    def _with_log(self, process: Process, what: str) -> str:
        process.ask_to_stop()
        process.wait(self._settings.stop_timeout_s)
        log = "\n".join(f"  {line}" for line in self._last_lines[process.name])
        return f"{process.name} {what}" + (f"; its last lines:\n{log}" if log else "")


def answers(url: str) -> bool:
    """Tell whether a bundle answers at this address."""
    try:
        return httpx.get(f"{url}/healthz", timeout=2.0, trust_env=False).is_success
    except httpx.TransportError:
        return False


@contextmanager
def running(stack: Stack, settings: Settings, sink: Sink) -> Iterator[str]:
    """Run the bundle for the length of a `with` block; yields the gateway's address."""
    with Bundle(stack, settings, sink) as bundle:
        yield bundle.url


def site(root: Path, environment: Mapping[str, str], secrets: Path | None = None) -> Site:
    """This machine's folders: `EDGECASCADE_HOME` moves what is built (default `var` beside stack.yml)."""
    home = Path(environment.get("EDGECASCADE_HOME") or root / "var").absolute()
    return Site(root, home, secrets.absolute() if secrets else None)
