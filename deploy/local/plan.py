"""Turns the stack into processes: pure, starts nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import StackError
from deploy.stack import Function, Stack

IN_CLUSTER_GATEWAY = "gateway.openfaas.svc.cluster.local"
BIND = "--bind"
WATCHDOG_KEYS = frozenset(
    {
        "mode", "upstream_url", "fprocess", "ready_path", "exec_timeout", "read_timeout", "write_timeout",
        "healthcheck_interval", "max_inflight", "prefix_logs", "log_buffer_size", "log_call_id", "suppress_lock",
        "static_path", "port", "buffer_http", "http_buffer_req_body", "jwt_auth",
        "LINGER_S",  # for what the watchdog lets in after SIGTERM
    }
)  # fmt: skip
PASSED_ON = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "VIRTUAL_ENV", "PYTHONPATH", "SSL_CERT_FILE", "EDGECASCADE_HOME"}
)
# The address of a function, alone or in a list of them.
PEER = re.compile(rf"http://{re.escape(IN_CLUSTER_GATEWAY)}(:\d+)?/function/(?P<name>[^/,]+)")
GATEWAY_COMMAND = (
    "gunicorn --bind 127.0.0.1:8080 --worker-class gthread --workers 1 --threads 256 --keep-alive 75 "
    "--graceful-timeout 60 --timeout 120 --no-control-socket deploy.local.gateway:create_app()"
)


@dataclass(frozen=True)
class Command:
    """A process to be: its words (the one after `--bind` is replaced by the socket) and its whole environment."""

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Site:
    """Where the bundle runs: this machine's folders instead of the image's.

    `secrets`: the folder with the secrets that stack.yml names, and then the tiers are the sealed ones, as in the
    images. None: there are none, no key is asked for, and the tiers are those that were built here.
    """

    root: Path
    home: Path
    secrets: Path | None = None

    @property
    def folders(self) -> Mapping[str, Path]:
        """Each folder of the images that functions are told of, and where it lies here."""
        return {
            "/home/app/tiers/device": self._tier("device", self.root / "models" / "tiers" / "device"),
            "/home/app/tiers/edge": self._tier("edge", self.home / "edge"),
            "/tmp/federation": self.home / "federation",  # noqa: S108  # in the image; here it is another folder
        }

    def _tier(self, name: str, plain: Path) -> Path:
        return self.home / "sealed" / name if self.secrets else plain


def function_command(
    function: Function, ports: Mapping[str, int], gateway_port: int, site: Site, inherited: Mapping[str, str]
) -> Command:
    """The process of one function: watchdog settings dropped, peers and folders made local."""
    own = {
        key: _local(value, ports, gateway_port, site)
        for key, value in function.with_secrets(site.secrets).environment.items()
        if key not in WATCHDOG_KEYS
    }
    return Command(function.name, _words(function.name, function.fprocess), {**_base(inherited), **own})


def gateway_command(ports: Mapping[str, int], inherited: Mapping[str, str]) -> Command:
    """The gateway's process: it learns each function's address from `GATEWAY_ROUTES`."""
    routes = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in ports.items())
    return Command("gateway", _words("gateway", GATEWAY_COMMAND), {**_base(inherited), "GATEWAY_ROUTES": routes})


def commands(
    stack: Stack, ports: Mapping[str, int], gateway_port: int, site: Site, inherited: Mapping[str, str]
) -> list[Command]:
    """Every process of the bundle, in the order to start them: functions, then the gateway."""
    functions = [function_command(f, ports, gateway_port, site, inherited) for f in stack.functions.values()]
    return [*functions, gateway_command(ports, inherited)]


def listed_gateway_command(replicas: Path, inherited: Mapping[str, str]) -> Command:
    """The gateway's process where functions come and go: it finds them in a list that it reads again and again."""
    environment = {**_base(inherited), "GATEWAY_REPLICAS": str(replicas)}
    return Command("gateway", _words("gateway", GATEWAY_COMMAND), environment)


def _base(inherited: Mapping[str, str]) -> dict[str, str]:
    """What a container would have too, and no more: a stray variable must not change a function."""
    return {"PYTHONUNBUFFERED": "1", **{key: value for key, value in inherited.items() if key in PASSED_ON}}


def _words(name: str, fprocess: str) -> tuple[str, ...]:
    """Split as the watchdog does, at spaces; gunicorn is run by this Python."""
    words = fprocess.split()
    if BIND not in words[:-1]:
        raise StackError(f"the fprocess of '{name}' has no '{BIND} ADDRESS'; deploy/local puts its own socket there")
    if words[0] == "gunicorn":
        words[:1] = [sys.executable, "-m", "gunicorn"]
    return tuple(words)


def here(value: str, site: Site) -> str:
    """A folder of the image becomes this machine's; anything else stays."""
    return str(site.folders.get(value, value))


def _local(value: str, ports: Mapping[str, int], gateway_port: int, site: Site) -> str:
    """A folder of the image or peers behind the cluster's gateway become those on this machine."""

    def peer(found: re.Match[str]) -> str:
        name = found["name"]
        return (
            f"http://127.0.0.1:{ports[name]}" if name in ports else f"http://127.0.0.1:{gateway_port}/function/{name}"
        )

    return PEER.sub(peer, here(value, site))
