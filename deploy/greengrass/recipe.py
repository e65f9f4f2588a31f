"""Turns a function of stack.yml into a component recipe: pure, reads and writes nothing.

One recipe suits both nuclei (component recipe reference of the developer guide; docs/RECIPE_SUPPORT_CHANGES.md of
aws-greengrass-lite). What an operator may set stands in the configuration under the name of its environment variable,
so that a deployment to a thing group can change it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from deploy.errors import RecipeError
from deploy.local.plan import BIND, PEER, WATCHDOG_KEYS
from deploy.stack import SECRETS_FOLDER, Function

FORMAT_VERSION = "2020-01-25"
ARCHITECTURES = ("amd64", "aarch64")
BUCKET = "BUCKET_NAME"
"""What stands for the bucket until `publish` knows it."""
MOST_MODEL_FILES = 24
"""A file takes some 170 bytes a platform, and a recipe has 16,000: a model of more files goes as one stored zip."""

PORTS = {"dispatcher": 8080, "device": 8081, "edge": 8082, "federation": 8083}
# The classic nucleus kills 5 s after SIGTERM; the rest is for ending processes.
DRAIN_S = 3
INSTALL_TIMEOUT_S = 900
BATTERY_TOPIC = "edgecascade/battery"
STATUS_TOPIC = "edgecascade/status"

_MODEL_HOME = re.compile(r"^/home/app/tiers/")
_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)$")
_VENV = '"{work:path}/venv/bin/python"'
_APP = "{artifacts:decompressedPath}/app-%s"


@dataclass(frozen=True)
class File:
    """An artifact: its name, and the SHA-256 of its content in hex, which is part of its address in the bucket."""

    name: str
    sha256: str

    @property
    def key(self) -> str:
        """Where it lies in the bucket: what has the same content has the same address and is sent once."""
        return f"{self.sha256[:16]}/{self.name}"


@dataclass(frozen=True)
class Parts:
    """The artifacts of one component: `apps` (architecture → zip of code and wheels) and the model's files or zip."""

    apps: Mapping[str, File]
    model: Sequence[File] = ()
    model_zip: File | None = None


@dataclass(frozen=True)
class Naming:
    """What the components of one rendering are called: `prefix` before each function's name, one version for all."""

    prefix: str
    version: str
    publisher: str
    python: str

    def component(self, function: str) -> str:
        """`com.example.edgecascade` and `device` give `com.example.edgecascade.Device`."""
        return f"{self.prefix}.{function.capitalize()}"


def make(function: Function, parts: Parts, naming: Naming, neighbours: Sequence[str]) -> dict[str, Any]:
    """The recipe of one function, as it is written to YAML; `neighbours` run on the same core devices.

    Raises `RecipeError` for a function whose port or command is not known.
    """
    settings = _settings(function)
    component = naming.component(function.name)
    recipe: dict[str, Any] = {
        "RecipeFormatVersion": FORMAT_VERSION,
        "ComponentName": component,
        "ComponentVersion": naming.version,
        "ComponentDescription": f"edgecascade: the {function.name} function (gunicorn, Python {naming.python})",
        "ComponentPublisher": naming.publisher,
        "ComponentConfiguration": {
            "DefaultConfiguration": {
                "PYTHON": f"python{naming.python}",
                **settings,
                "accessControl": {"aws.greengrass.ipc.pubsub": _access(component, function.name)},
            }
        },
    }
    needed = [name for name in peers(function) if name in neighbours]
    if needed:
        # SOFT: with HARD the dispatcher would be stopped whenever a tier is.
        soft = {"VersionRequirement": f">={naming.version}", "DependencyType": "SOFT"}
        recipe["ComponentDependencies"] = {naming.component(name): dict(soft) for name in needed}
    recipe["Manifests"] = [_manifest(function, settings, parts, architecture) for architecture in parts.apps]
    return recipe


def peers(function: Function) -> list[str]:
    """The functions that this one calls behind the cluster's gateway, in the order of stack.yml."""
    return list(dict.fromkeys(m["name"] for value in function.environment.values() for m in PEER.finditer(value)))


def is_secret(key: str) -> bool:
    """Whether a setting holds a secret itself; a configuration can be read by whoever may look at the cloud."""
    return bool(_SECRET.search(key)) and not key.endswith("PUBLIC_KEY")


def text(recipe: Mapping[str, Any]) -> str:
    """The recipe as YAML; the same recipe gives the same text."""
    return yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)


def _settings(function: Function) -> dict[str, str]:
    """What a deployment may change: everything of stack.yml's environment but what the place decides."""
    if function.name not in PORTS:
        raise RecipeError(f"function '{function.name}' has no port on a core device; known are {', '.join(PORTS)}")
    settings = {"BIND": f"127.0.0.1:{PORTS[function.name]}", "STATUS_TOPIC": f"{STATUS_TOPIC}/{function.name}"}
    for key, value in function.environment.items():
        if key not in WATCHDOG_KEYS and key not in _placed(function, Parts({})):
            if value and is_secret(key):
                raise RecipeError(
                    f"{key} would be readable in the cloud; leave it out and set {key}_FILE, a file there"
                )
            # A core device has no folder of secrets: its operator names the file.
            is_file = value.startswith(SECRETS_FOLDER)
            settings[key] = "" if is_file else PEER.sub(lambda m: f"http://127.0.0.1:{PORTS.get(m['name'], 9)}", value)
    if "POWER_SOURCES" in settings:
        settings["POWER_SOURCES"] = settings["POWER_SOURCES"] or "greengrass"
        settings["POWER_TOPIC"] = settings.get("POWER_TOPIC") or BATTERY_TOPIC
    return settings


def _placed(function: Function, parts: Parts) -> dict[str, str]:
    """What the core device decides: its name, and where it puts files."""
    model = "{artifacts:decompressedPath}/model" if parts.model_zip else "{artifacts:path}"
    placed = {"NODE_ID": "{iot:thingName}"}
    for key, value in function.environment.items():
        if _MODEL_HOME.match(value):
            placed[key] = model
        elif key == "FEDERATION_STATE_PATH":
            placed[key] = "{work:path}/federation"
    return placed


def _manifest(function: Function, settings: Mapping[str, str], parts: Parts, architecture: str) -> dict[str, Any]:
    configured = {key: f"{{configuration:/{key}}}" for key in settings if key != "PYTHON"}
    return {
        "Name": f"linux-{architecture}",
        "Platform": {"os": "linux", "architecture": architecture, "runtime": "*"},
        "Lifecycle": {
            "Setenv": {"PYTHONUNBUFFERED": "1", **configured, **_placed(function, parts)},
            "install": {"Timeout": INSTALL_TIMEOUT_S, "Script": _install(architecture)},
            "run": {"Script": f"exec {_VENV} -m deploy.greengrass.run {function.name} -- {_command(function)}\n"},
        },
        "Artifacts": [_artifact(file) for file in _files(parts, architecture)],
    }


def _install(architecture: str) -> str:
    """A virtual environment of what was shipped: nothing is built, nobody is asked, the system's own Python is left."""
    app = _APP % architecture
    return (
        "set -eu\n"
        '"{configuration:/PYTHON}" -m venv --clear "{work:path}/venv"\n'
        f"{_VENV} -m pip --isolated install --no-index --no-cache-dir --no-deps --require-hashes"
        f' --find-links "{app}/wheels" --requirement "{app}/requirements.lock"\n'
    )


def _command(function: Function) -> str:
    """The function's gunicorn, on the configured address, done within the nucleus's 5 s."""
    words = function.fprocess.split()
    for flag, value in ((BIND, "$BIND"), ("--graceful-timeout", str(DRAIN_S))):
        if flag not in words[:-1]:
            raise RecipeError(f"the fprocess of '{function.name}' has no '{flag} …'; the recipe puts its own there")
        words[words.index(flag) + 1] = value
    return " ".join('"$BIND"' if word == "$BIND" else shlex.quote(word) for word in words)


def _files(parts: Parts, architecture: str) -> list[File]:
    return [parts.apps[architecture], *([parts.model_zip] if parts.model_zip else parts.model)]


def _artifact(file: File) -> dict[str, Any]:
    """Zips are unpacked; the rest is read where it lies. Without `Permission` the lite nucleus lets everybody read."""
    unarchive = {"Unarchive": "ZIP"} if file.name.endswith(".zip") else {}
    return {"Uri": f"s3://{BUCKET}/{file.key}", **unarchive, "Permission": {"Read": "OWNER", "Execute": "NONE"}}


def _access(component: str, function: str) -> dict[str, Any]:
    """Which local topics the component may use."""
    rules = [("status out", "aws.greengrass#PublishToTopic", f"{STATUS_TOPIC}/{function}")]
    if function == "dispatcher":
        rules.append(("battery in", "aws.greengrass#SubscribeToTopic", BATTERY_TOPIC))
    return {
        f"{component}:pubsub:{number}": {"policyDescription": says, "operations": [may], "resources": [topic]}
        for number, (says, may, topic) in enumerate(rules, 1)
    }


class _Dumper(yaml.SafeDumper):
    """Scripts as blocks, and no aliases, which not every reader of recipes follows."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's own name
        """Write everything out."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
