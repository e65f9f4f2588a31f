"""A stand-in for a Greengrass nucleus: lays artifacts out, expands variables, runs a component's steps in a shell.

As strict as lite (every `{` begins a variable, an unknown one is an error), as impatient as classic (SIGKILL 5 s after
SIGTERM); artifacts are read-only for all but the owner. It knows no cloud, and IPC only where a test lends it a socket.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deploy.greengrass.build import Component

KILL_AFTER_S = 5.0
_VARIABLE = re.compile(r"\{([^}]*)\}?")


@dataclass
class Nucleus:
    """The nucleus of one core device, under `root`."""

    root: Path
    architecture: str
    thing: str = "kiosk-1"
    configuration: dict[str, dict[str, Any]] = field(default_factory=dict)

    def place(self, component: Component) -> None:
        """Copy and unpack the artifacts of the manifest that is for this machine."""
        manifest = self._manifest(component)
        plain, unpacked = (self._folder(kind, component) for kind in ("artifacts", "artifacts-unarchived"))
        for folder in (plain, unpacked, self._work(component)):
            folder.mkdir(parents=True, exist_ok=True)
        by_name = {path.name: path for path in component.artifacts.values()}
        for artifact in manifest["Artifacts"]:
            name = artifact["Uri"].rpartition("/")[2]
            shutil.copyfile(by_name[name], plain / name)
            (plain / name).chmod(0o440)
            if artifact.get("Unarchive") == "ZIP":
                with zipfile.ZipFile(plain / name) as archive:
                    archive.extractall(unpacked / name.removesuffix(".zip"))

    def words(self, component: Component, phase: str) -> list[str]:
        """The shell and the script of one phase, with its variables and its environment."""
        lifecycle = self._manifest(component)["Lifecycle"]
        step = lifecycle[phase]
        exports = {**lifecycle.get("Setenv", {}), **step.get("Setenv", {})}
        lines = [f"export {key}={shlex.quote(self.expand(component, value))}" for key, value in exports.items()]
        return ["/bin/sh", "-c", "\n".join([*lines, self.expand(component, step["Script"])])]

    def install(self, component: Component, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run the install step; `before` are words in front of the shell."""
        step = self._manifest(component)["Lifecycle"]["install"]
        return subprocess.run(
            [*before, *self.words(component, "install")], cwd=self._work(component), env=self._environment(),
            capture_output=True, text=True, timeout=step["Timeout"], check=False,
        )  # fmt: skip

    def start(self, component: Component, **more: str) -> subprocess.Popen[str]:
        """Start the run step."""
        return subprocess.Popen(
            self.words(component, "run"), cwd=self._work(component), env={**self._environment(), **more},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    @staticmethod
    def stop(process: subprocess.Popen[str]) -> tuple[int, float]:
        """SIGTERM to the process, SIGKILL to its group after 5 s; the status and the seconds it took."""
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode, time.monotonic() - started

    def expand(self, component: Component, text: str) -> str:
        """Expand recipe variables; an unknown one, or any other `{`, is an error as on lite."""

        def value(found: re.Match[str]) -> str:
            kind, _, key = found[1].partition(":")
            if not found[0].endswith("}"):
                raise ValueError(f"a variable is not terminated: {found[0][:40]}")
            if kind == "configuration":
                node: Any = {**component.defaults, **self.configuration.get(component.name, {})}
                for part in key.strip("/").split("/"):
                    node = node[part]
                return str(node)
            known = {
                "artifacts:path": f"{self._folder('artifacts', component)}/",
                "artifacts:decompressedPath": f"{self._folder('artifacts-unarchived', component)}/",
                "work:path": f"{self._work(component)}/",
                "kernel:rootPath": str(self.root),
                "iot:thingName": self.thing,
            }
            if found[1] not in known:
                raise ValueError(f"no such variable: {found[0]}")
            return known[found[1]]

        return _VARIABLE.sub(value, text)

    def _manifest(self, component: Component) -> dict[str, Any]:
        for manifest in yaml.safe_load(component.recipe)["Manifests"]:
            platform = manifest["Platform"]
            if platform["architecture"] in {self.architecture, "*"} and platform["runtime"] in {
                "*",
                "aws_nucleus_lite",
            }:
                return dict(manifest)
        raise LookupError(f"no manifest of {component.name} is for {self.architecture}")

    def _folder(self, kind: str, component: Component) -> Path:
        return self.root / "packages" / kind / component.name / component.version

    def _work(self, component: Component) -> Path:
        return self.root / "work" / component.name

    @staticmethod
    def _environment() -> Mapping[str, str]:
        """What a service gets: none of the operator's settings, and no pip configuration."""
        return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PIP_CONFIG_FILE": os.devnull}
