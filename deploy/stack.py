"""Reads stack.yml the way faas-cli does, as far as a deployer needs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from deploy.errors import StackError

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")


@dataclass(frozen=True)
class Function:
    """One function of the bundle."""

    name: str
    image: str
    handler: str
    fprocess: str
    environment: Mapping[str, str]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stack:
    """The bundle; `copies` are the paths that faas-cli adds to every build context."""

    functions: Mapping[str, Function]
    copies: tuple[str, ...]

    def only(self, names: tuple[str, ...]) -> Stack:
        """Keep the named functions (all if none is named); raises `StackError` for an unknown one."""
        for name in names:
            if name not in self.functions:
                raise StackError(f"stack.yml has no function '{name}'; it has {', '.join(self.functions)}")
        kept = {name: f for name, f in self.functions.items() if not names or name in names}
        return Stack(kept, self.copies)

    def varied(self, variants: Mapping[str, tuple[str, Mapping[str, str]]]) -> Stack:
        """Functions named anew: each a function of this stack with part of its environment changed.

        Raises `StackError` for a function that is not here.
        """
        self.only(tuple(of for of, _ in variants.values()))
        functions = {}
        for name, (of, changes) in variants.items():
            function = self.functions[of]
            functions[name] = replace(function, name=name, environment={**function.environment, **changes})
        return Stack(functions, self.copies)


def substitute(text: str, environment: Mapping[str, str]) -> str:
    """Replace `${NAME}` and `${NAME:-default}`; as in faas-cli, an unset name without default gives nothing."""
    return _VARIABLE.sub(lambda m: environment.get(m["name"]) or m["default"] or "", text)


def load(path: Path, environment: Mapping[str, str]) -> Stack:
    """Read and parse a stack file; raises `StackError`."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise StackError(f"{path} cannot be read ({error.strerror})") from error
    return parse(text, environment)


def parse(text: str, environment: Mapping[str, str]) -> Stack:
    """Parse stack.yml's text; raises `StackError` naming the function and key that are wrong."""
    try:
        values = yaml.safe_load(substitute(text, environment))
    except yaml.YAMLError as error:
        raise StackError(f"stack.yml is not YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("functions"), dict) or not values["functions"]:
        raise StackError("stack.yml names no functions")
    functions = {name: _function(name, spec) for name, spec in values["functions"].items()}
    copies = (values.get("configuration") or {}).get("copy") or []
    return Stack(functions, tuple(str(path) for path in copies))


def _function(name: str, spec: Any) -> Function:
    if not isinstance(spec, dict):
        raise StackError(f"function '{name}' in stack.yml is not a mapping")
    for key in ("image", "handler", "fprocess"):
        if not isinstance(spec.get(key), str) or not spec[key]:
            raise StackError(f"function '{name}' in stack.yml needs '{key}'")
    environment = spec.get("environment") or {}
    for key, value in environment.items():
        if not isinstance(value, str):
            raise StackError(f"function '{name}': '{key}' must be text; put its value in quotes")
    labels = {key: str(value) for key, value in (spec.get("labels") or {}).items()}
    return Function(name, spec["image"], spec["handler"], spec["fprocess"], environment, labels)
