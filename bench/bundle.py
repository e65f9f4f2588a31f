"""What a bench wants of a bundle that runs for it alone; the command line knows how to start one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """A function to start: which one of stack.yml, and what of its environment is changed."""

    of: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """A bundle that is ready: each function's own address (no gateway between) and process group, by name."""

    urls: Mapping[str, str]
    groups: Mapping[str, int]


Start = Callable[[Mapping[str, Variant]], AbstractContextManager[Running]]
"""Runs the named variants, and no other function, for the length of a `with` block."""
