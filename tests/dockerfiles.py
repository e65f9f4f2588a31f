"""Reads as much of a Dockerfile as tests need."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Copy:
    """One COPY: from which stage (empty: the build context), what, and where to."""

    stage: str
    sources: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class Image:
    """What the last stage says of the container, and all that is copied on the way."""

    environment: Mapping[str, str]
    command: list[str]
    user: str
    copies: tuple[Copy, ...]
    bases: tuple[str, ...]


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction and its arguments; comments are gone, lines joined."""
    bare = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n", " ", bare).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, rest.strip()


def read_image(path: Path) -> Image:
    """Read a Dockerfile."""
    environment: dict[str, str] = {}
    command: list[str] = []
    user = "root"
    copies, bases = [], []
    for word, rest in instructions(path.read_text("utf-8")):
        if word == "FROM":
            environment, command, user = {}, [], "root"
            bases.append(rest.split()[0])
        elif word == "ENV":
            environment.update(dict(pair.split("=", 1) for pair in shlex.split(rest)))
        elif word == "CMD":
            command = json.loads(rest)
        elif word == "USER":
            user = rest
        elif word == "COPY":
            words = rest.split()
            flags = [w for w in words if w.startswith("--")]
            plain = [w for w in words if not w.startswith("--")]
            stage = next((f.removeprefix("--from=") for f in flags if f.startswith("--from=")), "")
            copies.append(Copy(stage, tuple(plain[:-1]), plain[-1]))
    return Image(environment, command, user, tuple(copies), tuple(bases))
