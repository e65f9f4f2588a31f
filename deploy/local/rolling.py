"""A bundle whose functions can be replaced while it runs, as a cluster's rolling update does it.

A new replica is started; once it is ready the gateway is told of it and no longer of the old one, which then gets
SIGTERM and finishes what it has. Functions reach each other through the gateway, which is the one that knows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

from deploy.local.bundle import Bundle, Settings
from deploy.local.plan import function_command, listed_gateway_command
from deploy.local.process import Process, Sink, listen
from deploy.stack import Stack

SETTLE_S = 0.3
"""By then a request that chose its replica by the old list has been sent."""


class Rolling(Bundle):
    """Functions and gateway; a context manager. Use it in one thread, to which its processes are tied."""

    def __init__(self, stack: Stack, settings: Settings, sink: Sink) -> None:
        super().__init__(stack, settings, sink)
        self._folder = ExitStack()
        self._list = Path()
        self._gateway_port = 0

    @property
    def names(self) -> Sequence[str]:
        """The functions, in stack.yml's order."""
        return list(self._stack.functions)

    def stop(self) -> None:
        """Stop everything; the list goes too."""
        super().stop()
        self._folder.close()

    def restart(self, name: str) -> int:
        """Replace a function's process by a new one that is ready; the status that the old one ended with.

        Raises `StartError` if the new one does not get ready: the old one then goes on.
        """
        old = next(process for process in self.processes if process.name == name)
        port = self.ports[name]
        new = self._begin(name)
        self.processes.append(new)
        deadline = time.monotonic() + self._settings.ready_timeout_s
        try:
            with httpx.Client(trust_env=False, timeout=5.0) as client:
                url = f"http://127.0.0.1:{self.ports[name]}/_/ready"
                self._wait_for(new, client, url, httpx.codes.OK, deadline)
        except BaseException:
            self.ports[name] = port
            self.processes.remove(new)
            raise
        self._write_list()
        time.sleep(SETTLE_S)
        self.processes.remove(old)
        old.ask_to_stop()
        old.wait(self._settings.stop_timeout_s)
        return old.exit_code or 0

    def _start(self) -> None:
        folder = self._folder.enter_context(tempfile.TemporaryDirectory(prefix="edgecascade-"))
        self._list = Path(folder) / "replicas.json"
        with listen(self._settings.port) as listener:
            self._gateway_port = int(listener.getsockname()[1])
            self.url = f"http://127.0.0.1:{self._gateway_port}"
            self.processes.extend(self._begin(name) for name in self.names)
            self._write_list()
            command = listed_gateway_command(self._list, self._settings.inherited)
            self.processes.append(self._spawn(command, {"gateway": listener}))

    def _begin(self, name: str) -> Process:
        with listen() as listener:
            self.ports[name] = int(listener.getsockname()[1])
            function, settings = self._stack.functions[name], self._settings
            command = function_command(function, {}, self._gateway_port, settings.site, settings.inherited)
            return self._spawn(command, {name: listener})

    def _write_list(self) -> None:
        """Replace the list at once and as a whole."""
        entries = {
            name: {"replicas": [{"address": f"http://127.0.0.1:{port}", "state": "ready"}]}
            for name, port in self.ports.items()
        }
        draft = self._list.with_suffix(".new")
        draft.write_text(json.dumps(entries), "utf-8")
        draft.replace(self._list)
