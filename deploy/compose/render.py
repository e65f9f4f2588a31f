"""stack.yml as a file for docker compose, whose `${NAME:-default}` is the same; nothing is substituted here.

There is no gateway: functions ask each other by their service's name. What a container cannot be told of Kubernetes
(labels, annotations, requests) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from deploy.errors import StackError
from deploy.stack import SECRETS_FOLDER

HEAD = "# Made of stack.yml by `edgecascade compose`; change that file, not this one.\n"
_PEER = re.compile(r"http://gateway\.openfaas\.svc\.cluster\.local:8080/function/([^/,}]+)")
_LIMIT = re.compile(r"(\d+)([KMG])i")
_DRAIN_S = 75
"""The watchdog takes requests on for 5 s, and then finishes what it has for 65 s at most."""
PORTS = {"dispatcher": "${LISTEN:-127.0.0.1:8080}:8080", "edge": "${LISTEN_EDGE:-127.0.0.1:8081}:8080"}
"""Who can be reached from outside, and where: the front, and what a device site elsewhere asks."""


def render(text: str) -> str:
    """The compose file of a stack file; raises `StackError`."""
    try:
        functions = yaml.safe_load(text)["functions"]
        services = {name: _service(name, spec) for name, spec in functions.items()}
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise StackError(f"stack.yml cannot be read as it is, before its variables are put in: {error}") from error
    names = sorted({secret for spec in functions.values() for secret in spec.get("secrets", ())})
    secrets = {name: {"file": f"${{SECRETS:-../../.secrets}}/{name}"} for name in names}
    values = {"name": "edgecascade", "services": services, "secrets": secrets}
    return HEAD + yaml.safe_dump(values, sort_keys=False, width=10_000)


def _service(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    ports = {"ports": [PORTS[name]]} if name in PORTS else {}
    return {
        "image": spec["image"],
        "read_only": spec["readonly_root_filesystem"],
        "tmpfs": ["/tmp"],  # noqa: S108  # the watchdog's lock file, and gunicorn's
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
        "stop_grace_period": f"{_DRAIN_S}s",
        "environment": {key: _PEER.sub(r"http://\1:8080", value) for key, value in spec["environment"].items()},
        "secrets": [{"source": secret, "target": SECRETS_FOLDER + secret} for secret in spec.get("secrets", ())],
        "deploy": {"resources": {"limits": _limits(spec["limits"])}},
        **ports,
    }


def _limits(limits: Mapping[str, str]) -> dict[str, str]:
    """Kubernetes' quantities as compose writes them: `512Mi` is 512M there, `1500m` is 1.5."""
    found = _LIMIT.fullmatch(limits["memory"])
    if found is None or not limits["cpu"].endswith("m"):
        raise StackError(f"limits {dict(limits)} in stack.yml are not in Mi or Gi and thousandths of a processor")
    return {"cpus": f"{int(limits['cpu'][:-1]) / 1000:g}", "memory": found[1] + found[2]}
