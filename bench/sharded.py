"""A sharded edge tier for the benches: each shard a function of its own, which can be killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from bench.bundle import Running, Start, Variant
from bench.errors import BenchError

WHOLE, HEAD = "whole", 0
_TIER = "edge"
Ports = Mapping[tuple[int, int], int]
"""A port for each replica of each part but the head."""
_ASK_S, _READY_S, _POLL_S = 2.0, 60.0, 0.1


def n_layers(tier: Path) -> int:
    """Layers of a tier on disk; raises `BenchError`."""
    try:
        return int(json.loads((tier / "manifest.json").read_text("utf-8"))["architecture"]["n_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{tier} is no tier's folder; make one with 'edgecascade build'") from error


def even_cut(layers: int, shards: int) -> list[range]:
    """Layers in runs whose lengths differ by one at most; raises `BenchError`."""
    if not 0 < shards <= layers:
        raise BenchError(f"{layers} layers cannot be cut into {shards} shards")
    return [range(a, b) for a, b in pairwise(layers * n // shards for n in range(shards + 1))]


def balanced_cut(tier: Path, shards: int) -> list[range]:
    """Layers in runs with nearly the same bytes to read a token; the last one's part is smaller by the model's head.

    Raises `BenchError`.
    """
    layers = n_layers(tier)
    try:
        head = (tier / "head.safetensors").stat().st_size / (tier / "layer-000.safetensors").stat().st_size
    except OSError:
        return even_cut(layers, shards)
    if shards == 1 or layers <= shards:
        return even_cut(layers, shards)
    last = max(1, round((layers + head) / shards - head))
    return [*even_cut(layers - last, shards - 1), range(layers - last, layers)]


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Shard:
    """One replica of a range: its number in the model's order, its name, and what it is told."""

    part: int
    name: str
    environment: Mapping[str, str]

    def slowed(self, factor: float) -> Shard:
        """The same on a machine that is so many times slower."""
        return replace(self, environment={**self.environment, "SLOWDOWN": f"{factor:g}"})


def shards(
    cut: Sequence[range],
    replicas: int,
    tier: Path,
    ports: Ports,
    settings: Mapping[str, str],
    via: Ports | None = None,
) -> list[Shard]:
    """Every replica of every range; those that are no head listen on `ports[part, replica]`.

    They are reached at the ports of `via`, if there are any.
    """
    found, reached = [], via or ports
    for part, layers in enumerate(cut):
        span = f"{layers.start}-{layers.stop - 1}"
        environment = {"SHARD_LAYERS": span, "SHARD_ID": span, "MODEL_PATH": str(tier.absolute()), **settings}
        if part + 1 < len(cut):
            after = [f"127.0.0.1:{reached[part + 1, replica]}" for replica in range(replicas)]
            environment["SHARD_NEXT"] = ",".join(after)
        for replica in range(replicas):
            own = {"SHARD_LISTEN": str(ports[part, replica])} if part else {}
            found.append(Shard(part, f"shard-{part}-{replica}", {**environment, **own}))
    return found


def ports_for(cut: Sequence[range], replicas: int) -> Ports:
    """A free port for each replica that is no head."""
    return {(part, replica): free_port() for part in range(1, len(cut)) for replica in range(replicas)}


@dataclass
class Troupe:
    """Shards at work, each in a process group of its own. A context manager that stops them all."""

    start: Start
    shards: Sequence[Shard]
    _stacks: dict[str, ExitStack] = field(default_factory=dict)
    _running: dict[str, Running] = field(default_factory=dict)

    def __enter__(self) -> Self:
        try:
            for shard in sorted(self.shards, key=lambda s: -s.part):  # the last first: the others wait for it
                self.begin(shard)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def begin(self, shard: Shard) -> None:
        """Start a shard, or start it again; returns when it is ready."""
        self._stop(shard.name)
        stack = self._stacks[shard.name] = ExitStack()
        variant = Variant(_TIER, shard.environment)
        self._running[shard.name] = stack.enter_context(self.start({shard.name: variant}))

    def kill(self, shard: Shard) -> None:
        """End it without a word: SIGKILL to the process and its server."""
        group = self._running[shard.name].groups[shard.name]
        if group <= 0:  # 0 would be our own
            raise BenchError("the shard has no process group of its own that could be killed")
        os.killpg(group, signal.SIGKILL)

    def url(self, shard: Shard) -> str:
        """Where it talks HTTP."""
        return self._running[shard.name].urls[shard.name]

    @property
    def groups(self) -> list[int]:
        """All process groups."""
        return [group for running in self._running.values() for group in running.groups.values()]

    def at_work(self, part: int) -> Shard | None:
        """A replica of a range that has a session, None if there is none."""
        for shard in self.shards:
            if shard.part == part and self._counts(shard, "edgecascade_shard_sessions"):
                return shard
        return None

    def lost_links(self) -> float:
        """How many sessions lost a shard, as far as those count that live."""
        return sum(self._counts(shard, "edgecascade_links_lost_total") for shard in self.shards)

    def sessions(self) -> int:
        """How many sessions the shards behind the heads hold; raises `BenchError` if one does not say."""
        return sum(self._sessions(shard) for shard in self.shards if shard.part != HEAD)

    def _sessions(self, shard: Shard) -> int:
        found = self._series(shard, "edgecascade_shard_sessions")
        if found is None:
            raise BenchError(f"{shard.name} does not say how many sessions it holds")
        return int(found)

    def wait_ready(self, shard: Shard) -> None:
        """Return when it takes requests; raises `BenchError` if it does not for long."""
        ends = time.monotonic() + _READY_S
        while time.monotonic() < ends:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url(shard)}/_/ready", trust_env=False, timeout=_ASK_S).is_success:
                    return
            time.sleep(_POLL_S)
        raise BenchError(f"{shard.name} was not ready again in time")

    def _counts(self, shard: Shard, series: str) -> float:
        """A series of a shard's metrics, 0 if it does not say."""
        return self._series(shard, series) or 0.0

    def _series(self, shard: Shard, series: str) -> float | None:
        try:
            page = httpx.get(f"{self.url(shard)}/metrics", timeout=_ASK_S, trust_env=False).text
        except httpx.HTTPError:
            return None
        found = re.search(rf"^{series}\{{.*\}} (\S+)$", page, re.MULTILINE)
        return float(found[1]) if found else None

    def _stop(self, name: str) -> None:
        stack = self._stacks.pop(name, None)
        if stack is not None:
            stack.close()

    def _end(self) -> None:
        for name in list(self._stacks):
            self._stop(name)


@contextmanager
def whole(start: Start, tier: Path, **more: str) -> Iterator[str]:
    """The same tier in one piece, for the while; yields its address."""
    with whole_running(start, tier, **more) as running:
        yield running.urls[WHOLE]


@contextmanager
def whole_running(start: Start, tier: Path, **more: str) -> Iterator[Running]:
    """The same, all that there is to know of it."""
    with start({WHOLE: Variant(_TIER, {"MODEL_PATH": str(tier.absolute()), **more})}) as running:
        yield running
