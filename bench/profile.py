"""`edgecascade profile-node`: what this machine is to `edgecascade plan`, measured with the engine itself.

The head is told from the layers by running both the whole model and the layers alone, each through all its weights, so
that caches help neither more than in use. Times are medians.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
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
from models.artifact.store import Artifact
from models.build.graph import decoder_graph
from models.errors import ArtifactError
from models.runtime.engine import Decoder, Embeddings, TokenSequence
from models.runtime.sessions import EngineOptions, Segment, segments

MIB = 2**20
READ_BYTES = 256 << 20
FREE_SHARE = 0.8
"""The part of the free memory that weights and key-value memory may take."""
Report = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    prompt_tokens: int = 128
    tokens: int = 32
    rounds: int = 5
    threads: int = 2

    def within(self, context: int) -> Plan:
        """No more than a short context takes."""
        return replace(self, prompt_tokens=min(self.prompt_tokens, context // 2), tokens=min(self.tokens, context // 4))


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
    artifact = Artifact.open(path)
    m = artifact.manifest
    if m.graph != FUSED or not m.lm_head:
        raise ArtifactError(f"{path} cannot be cut into layers: name a tier that writes text by our own graph")
    plan = plan.within(m.architecture.context)
    memory_mib = int(FREE_SHARE * free_bytes() / MIB)
    report(0, 3, "memory")
    gb_per_s = max(ReadTest(plan.threads, READ_BYTES, huge_pages=True).gb_per_s() for _ in range(plan.rounds))
    report(1, 3, "layers")
    with _decoder(artifact, plan, _without_head(artifact)) as layers:
        layers_ms, _ = _times(layers, plan, m.architecture.vocab_size, TokenSequence.hidden)
    report(2, 3, "layers and head")
    with _decoder(artifact, plan, segments(artifact, PLAIN)) as whole:
        token_ms, prompt_ms = _times(whole, plan, m.architecture.vocab_size, TokenSequence.logits)
    report(3, 3, "")
    n_layers, head_ms = m.architecture.n_layers, max(0.0, token_ms - layers_ms)
    return Profile(
        name=name or platform.node() or "this-node",
        memory_mib=memory_mib,
        decode_ms=layers_ms / n_layers,
        prefill_ms=max(prompt_ms - head_ms, 0.0) / (n_layers * plan.prompt_tokens),
        head_ms=head_ms,
        model=f"{m.model_id} {m.quantisation}",
        gb_per_s=gb_per_s,
        threads=plan.threads,
        watts=watts,
    )


def _without_head(artifact: Artifact) -> Iterator[Segment]:
    for part in segments(artifact, PLAIN):
        span = replace(part.span, head=False)
        kept = {name: value for name, value in part.weights.items() if not name.startswith("head.")}
        dims = {name: value.shape for name, value in kept.items()}
        yield Segment(span, decoder_graph(artifact.manifest.architecture, span, dims), kept)


@contextmanager
def _decoder(artifact: Artifact, plan: Plan, parts: Iterator[Segment]) -> Iterator[TokenSequence]:
    shape = artifact.manifest.architecture
    room = plan.prompt_tokens + plan.tokens + 1
    options = EngineOptions(threads=plan.threads, context=room, sequences=1)
    decoder = Decoder(shape, parts, Embeddings(artifact.embeddings(), None, shape.width), options)
    with decoder.sequence() as sequence:
        yield sequence


def _times(
    sequence: TokenSequence, plan: Plan, vocab_size: int, read: Callable[[TokenSequence, list[int]], object]
) -> tuple[float, float]:
    """Milliseconds of a token and of a prompt; the first round warms up."""
    ids = np.random.default_rng(1).integers(0, vocab_size, plan.prompt_tokens + plan.tokens).tolist()
    tokens, prompts = list[float](), list[float]()
    for number in range(plan.rounds + 1):
        sequence.reset()
        prompt_ms = _ms(partial(read, sequence, ids[: plan.prompt_tokens]))
        steps = [_ms(partial(read, sequence, [token])) for token in ids[plan.prompt_tokens :]]
        if number:
            prompts.append(prompt_ms)
            tokens += steps
    return median(tokens), median(prompts)


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
