"""`edgecascade profile-node`: what this machine is to `edgecascade plan`, measured with the engine that shards run.

Stages are opened as a shard opens its own. The head, which a graph that has it always runs, is told from the layers by
a stage of all of them and one that lacks the last, in turns. Times are medians.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from bench.memory import ReadTest
from models.artifact.manifest import FUSED
from models.artifact.names import PLAIN
from models.artifact.sizes import sizes
from models.artifact.store import Artifact
from models.errors import ArtifactError
from models.runtime.engine import chunks
from models.runtime.layers import LONG, Floats
from models.runtime.links import Opening, Want
from models.runtime.sessions import EngineOptions
from models.runtime.stage import Stage, StageSession
from scaler.placement import read
from scaler.placement.values import Model

MIB = 2**20
READ_BYTES = 256 << 20
FREE_SHARE = 0.8
"""The part of the free memory that weights and key-value memory may take."""
Report = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Plan:
    """How much to measure; `slowdown_file` as in `EngineOptions`, where this machine stands for others."""

    prompt_tokens: int = 128
    tokens: int = 32
    rounds: int = 5
    threads: int = 2
    slowdown_file: Path | None = None

    def within(self, context: int) -> Plan:
        """No more than a short context takes."""
        return replace(self, prompt_tokens=min(self.prompt_tokens, context // 2), tokens=min(self.tokens, context // 4))


@dataclass(frozen=True)
class Times:
    """Milliseconds: one layer for one token, one layer for one token of a prompt, the head for one pass."""

    decode_ms: float
    prefill_ms: float
    head_ms: float

    @classmethod
    def median(cls, found: Sequence[Times]) -> Times:
        """Of each its own."""
        return cls(*(median(getattr(times, name) for times in found) for name in vars(found[0])))


@dataclass(frozen=True)
class Profile:
    """A node's figures; times in milliseconds, of one layer and one token, the head's of one pass."""

    name: str
    memory_mib: int
    decode_ms: float
    prefill_ms: float
    head_ms: float
    model: str
    gb_per_s: float
    threads: int
    watts: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """An entry of a nodes file."""
        return {
            "name": self.name,
            "memory_mib": self.memory_mib,
            "decode_ms": round(self.decode_ms, 5),
            "prefill_ms": round(self.prefill_ms, 5),
            "head_ms": round(self.head_ms, 4),
            **({"watts": self.watts} if self.watts else {}),
            "measured": {"model": self.model, "threads": self.threads, "memory_gb_per_s": round(self.gb_per_s, 1)},
        }

    def as_yaml(self) -> str:
        """A nodes file of this node alone."""
        text: str = yaml.safe_dump({"nodes": [self.as_dict()]}, sort_keys=False)
        return text


def profile(path: Path, plan: Plan, report: Report, name: str = "", watts: float | None = None) -> Profile:
    """Measure this machine with a tier that writes text; raises `ArtifactError` where it is none of ours."""
    memory_mib = int(FREE_SHARE * free_bytes() / MIB)
    report(0, plan.rounds + 2, "memory")
    gb_per_s = max(ReadTest(plan.threads, READ_BYTES, huge_pages=True).gb_per_s() for _ in range(plan.rounds))
    report(1, plan.rounds + 2, "opening")
    found = []
    with stopwatch(path, plan) as measure:
        measure()  # the first round warms up
        for number in range(plan.rounds):
            report(2 + number, plan.rounds + 2, "layers and head")
            found.append(measure())
    report(plan.rounds + 2, plan.rounds + 2, "")
    m, times = Artifact.open(path).manifest, Times.median(found)
    return Profile(
        name=name or platform.node() or "this-node",
        memory_mib=memory_mib,
        **vars(times),
        model=f"{m.model_id} {m.quantisation}",
        gb_per_s=gb_per_s,
        threads=plan.threads,
        watts=watts,
    )


def model(path: Path) -> Model:
    """A tier as placement knows it; raises `ArtifactError` for one that cannot be cut."""
    return read.model(sizes(Artifact.open(path).manifest))


@contextmanager
def stopwatch(path: Path, plan: Plan) -> Iterator[Callable[[], Times]]:
    """Open a tier's layers, and lend what takes their times once; raises `ArtifactError` where it is none of ours."""
    m = Artifact.open(path).manifest
    if m.graph != FUSED or not m.lm_head or m.architecture.n_layers < 2:  # noqa: PLR2004
        raise ArtifactError(f"{path} cannot be cut into layers: name a tier that writes text by our own graph")
    plan = plan.within(m.architecture.context)
    room = plan.prompt_tokens + plan.tokens + 1
    options = EngineOptions(
        plan.threads, spin=False, rests=True, context=room, sequences=1, slowdown_file=plan.slowdown_file
    )
    n_layers = m.architecture.n_layers
    whole, part = (Stage.open(path, range(n), options).lanes[PLAIN] for n in (n_layers, n_layers - 1))
    states = np.random.default_rng(1).standard_normal((room, m.architecture.width), np.float32)

    def measure() -> Times:
        opening = Opening(PLAIN, math.inf)
        with whole.session(opening) as all_layers, part.session(opening) as but_one:
            return _times(all_layers, but_one, plan, n_layers, states, long=whole.layers.has_long)

    yield measure


def _times(whole: StageSession, part: StageSession, plan: Plan, n_layers: int, states: Floats, *, long: bool) -> Times:
    """Both read a prompt, then single tokens in turns."""
    prompt, rest = states[: plan.prompt_tokens], states[plan.prompt_tokens :][: plan.tokens]
    prompt_ms, _ = (_ms(partial(_read_prompt, stage, prompt, long=long)) for stage in (whole, part))
    steps = [[_ms(partial(stage.read, state[None], Want.TOKEN)) for stage in (whole, part)] for state in rest]
    token_ms, but_one_ms = (median(column) for column in zip(*steps, strict=True))
    decode_ms = but_one_ms / (n_layers - 1)
    head_ms = max(0.0, token_ms - n_layers * decode_ms)
    return Times(decode_ms, max(prompt_ms - head_ms, 0.0) / (n_layers * len(prompt)), head_ms)


def _read_prompt(session: StageSession, states: Floats, *, long: bool) -> None:
    """As the head of a pipeline has it read: where there are segments for many tokens, the last token by itself."""
    if long and len(states) >= LONG:
        for piece in chunks(range(len(states) - 1), None):
            session.read(states[piece[0] : piece[-1] + 1], Want.NOTHING)
        session.read(states[-1:], Want.TOKEN)
    else:
        session.read(states, Want.TOKEN)


def _ms(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begun)


def free_bytes() -> int:
    """Memory that a new process can have: what the kernel calls available, or the control group's limit if less."""
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text("ascii").strip() if limit.is_file() else "max"
    return free if said == "max" else min(free, int(said))
