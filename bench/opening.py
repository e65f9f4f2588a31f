"""`edgecascade bench seal`: what sealing costs when a tier is opened, the plain and the sealed one in turn."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from models.artifact.keys import KEY_BYTES, LocalKey
from models.artifact.store import Artifact
from models.build.seal import seal_artifact
from models.runtime.local import LocalTier


@dataclass(frozen=True)
class Pair:
    """The same work on the plain and on the sealed tier."""

    plain: Callable[[], object]
    sealed: Callable[[], object]


@contextmanager
def opening_pairs(path: Path, threads: int) -> Iterator[dict[str, Pair]]:
    """Seal a copy beside the tier, for the while, and yield what to time on both by name."""
    keys = LocalKey(os.urandom(KEY_BYTES))
    source = Artifact.open(path)
    weights = [name for name in source.files if name.endswith(".safetensors")]
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.resolve().parent) as folder:
        sealed = seal_artifact(source, Path(folder) / "sealed", keys, None, lambda *_: None)
        yield {
            "reading all weights": Pair(lambda: source.tensors(*weights), lambda: sealed.tensors(*weights)),
            "opening the tier": Pair(
                lambda: LocalTier.open(path, "plain", threads),
                lambda: LocalTier.open(sealed.path, "sealed", threads, keys=keys),
            ),
        }


def compare(
    pairs: Mapping[str, Pair],
    rounds: int,
    report: Callable[[int, int, str], None],
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Run each pair once unmeasured and then `rounds` times, who goes first changing from round to round.

    Returns, a pair, the medians in seconds and `cost`: the median over rounds of sealed / plain, less 1.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {"plain": [], "sealed": []} for name in pairs}
    for number in range(rounds + 1):
        report(number, rounds + 1, "")
        for name, pair in pairs.items():
            works = [("plain", pair.plain), ("sealed", pair.sealed)]
            for kind, work in works if number % 2 else reversed(works):
                start = now()
                work()
                if number:
                    seconds[name][kind].append(now() - start)
    report(rounds + 1, rounds + 1, "")
    return {"rounds": rounds, **{name: _figures(**found) for name, found in seconds.items()}}


def _figures(plain: list[float], sealed: list[float]) -> dict[str, float]:
    ratios = [s / p for s, p in zip(sealed, plain, strict=True)]
    return {
        "plain_s": statistics.median(plain),
        "sealed_s": statistics.median(sealed),
        "plain_min_s": min(plain),
        "sealed_min_s": min(sealed),
        "cost": statistics.median(ratios) - 1,
    }


def print_comparison(figures: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the figures for a person or a pipe."""
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(title=f"medians of {figures['rounds']} interleaved rounds", title_justify="left", box=box.SIMPLE)
    for heading in ("", "plain ms", "sealed ms", "cost of sealing"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in figures.items():
        if name != "rounds":
            cells = (f"{1e3 * row['plain_s']:.0f}", f"{1e3 * row['sealed_s']:.0f}", f"{100 * row['cost']:+.1f} %")
            table.add_row(name, *cells)
    Console(width=100).print(table)
