"""Who is measured: a module a contender, each with the four functions of `Peer`.

A module here may import its own library anywhere but at its top, so that all of them can be listed where none is
installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError

Floats = NDArray[np.float32]

MODULES = {
    "ours": "ours",
    "llama.cpp": "llama_cpp",
    "genai": "genai",
    "optimum": "optimum",
    "transformers": "transformers",
}
"""The names of `--peers` and the modules of this package that stand for them."""
NEEDS = {
    "ours": (),
    "llama.cpp": ("llama_cpp",),
    "genai": ("onnxruntime_genai", "transformers", "torch"),
    "optimum": ("optimum", "transformers", "torch"),
    "transformers": ("transformers", "torch"),
}
"""What must be importable for each of them."""


@dataclass(frozen=True)
class Model:
    """The weights that everybody runs: `file` as it is, `q4_0` the same in Q4_0; `home` takes what peers make of it."""

    name: str
    file: Path
    q4_0: Path
    home: Path
    trained: bool

    @property
    def same(self) -> bool:
        """Whether the file is Q4_0 itself."""
        return self.file == self.q4_0


@dataclass(frozen=True)
class Entrant:
    """One row: `setting` picks among a peer's settings, `path` is what it opens, `about` says both in words."""

    peer: str
    setting: str
    path: Path
    about: str

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.peer} {self.setting}"


class Reader(Protocol):
    """A loaded model that reads one sequence of tokens."""

    def reset(self) -> None:
        """Forget the sequence."""
        ...

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read ids on from where the sequence stands; the logits (V,) after the last, good until the next call."""
        ...

    def start(self, ids: Sequence[int]) -> int:
        """Read a prompt; the likeliest next token."""
        ...

    def step(self) -> int:
        """Read the token that was returned last; the likeliest next one."""
        ...


class Greedy:
    """`start` and `step` for readers that only give logits."""

    _last = 0

    def logits(self, ids: Sequence[int]) -> Floats:
        """Read ids; the logits (V,) after the last."""
        raise NotImplementedError

    def start(self, ids: Sequence[int]) -> int:
        """Read a prompt; the likeliest next token."""
        self._last = int(self.logits(ids).argmax())
        return self._last

    def step(self) -> int:
        """Read the token that was returned last; the likeliest next one."""
        return self.start([self._last])


class Peer(Protocol):
    """The functions of a module here."""

    def entrants(self, model: Model) -> list[Entrant]:
        """The rows that this peer takes part with."""
        ...

    def prepare(self, model: Model, entrant: Entrant) -> None:
        """Make `entrant.path` if it is not there; may take minutes and much memory, and is not timed."""
        ...

    def warm_up(self) -> None:
        """Import what `load` needs."""
        ...

    def load(self, entrant: Entrant, threads: int, context: int) -> Reader:
        """Load the model."""
        ...

    def weight_bytes(self, entrant: Entrant) -> int:
        """Bytes of weights that one decoded token must read, as they are stored."""
        ...


def peer(name: str) -> Peer:
    """The module of a peer."""
    return cast(Peer, import_module(f"{__name__}.{MODULES[name]}"))


def missing(name: str) -> str:
    """The first module that a peer lacks here, '' if it can run."""
    return next((module for module in NEEDS[name] if find_spec(module) is None), "")


def reference(model: Model) -> Entrant:
    """Who says what the dequantised weights mean: transformers, which is none of ours, or else our own fp32."""
    if missing("transformers"):
        from bench.peers import ours

        return ours.reference(model)
    from bench.peers import transformers

    return transformers.reference(model)


def chosen(names: str) -> list[str]:
    """Read `--peers`; raises `BenchError`."""
    found = [name.strip() for name in names.split(",") if name.strip()] or list(MODULES)
    unknown = [name for name in found if name not in MODULES]
    if unknown:
        raise BenchError(f"peer '{unknown[0]}' is unknown; use some of {', '.join(MODULES)}")
    return found
