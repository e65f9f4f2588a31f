"""`bench rpc`: what a cut costs llama.cpp, whose RPC backend has layers computed in another process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.errors import BenchError
from bench.peers import Entrant, missing
from bench.peers.llama_cpp import remote
from bench.worker import Worker

_CONTEXT, _PROMPT = 512, 128
_IDS = range(100, 100 + 2 * _PROMPT)


@dataclass(frozen=True)
class Plan:
    """`layers` run in another process, with the head; so many turns and tokens, and threads of each process."""

    layers: int
    rounds: int
    tokens: int
    threads: int
    log: Path


@dataclass(frozen=True)
class Figures:
    """Medians of turns: milliseconds a token whole and in two processes with `threads` each, and what the hop adds."""

    file: str
    layers_away: int
    threads: int
    whole_ms: float
    cut_ms: float
    hop_ms: float


def measure(file: Path, plan: Plan, report: Callable[[int, int, str], None]) -> Figures:
    """Let llama.cpp decode the file whole, and with its last layers and its head in another process, in turns.

    Raises `BenchError`, also where llama.cpp is not installed or has no RPC backend.
    """
    if missing("llama.cpp"):
        raise BenchError("llama.cpp is not installed; 'make bench-peers' builds it: run .venv-bench/bin/edgecascade")
    plan.log.parent.mkdir(parents=True, exist_ok=True)
    whole = Entrant("llama.cpp", "file", file, "the GGUF itself")
    with ExitStack() as stack:
        cut = remote(file, plan.layers)
        workers = [stack.enter_context(_worker(one, plan)) for one in (whole, cut)]
        turns = []
        for number in range(plan.rounds):
            turns.append([_token_ms(worker, plan.tokens) for worker in workers])
            report(number + 1, plan.rounds, "llama.cpp over RPC")
    return Figures(
        file.name,
        plan.layers,
        plan.threads,
        median(a for a, _ in turns),
        median(b for _, b in turns),
        median(b - a for a, b in turns),
    )


def _worker(entrant: Entrant, plan: Plan) -> Worker:
    worker = Worker(entrant, plan.threads, _CONTEXT, plan.log)
    worker.ask("load", first=_IDS[0])
    return worker


def _token_ms(worker: Worker, tokens: int) -> float:
    found = worker.ask("speed", ids=list(_IDS), prefills=[], contexts=[_PROMPT], tokens=tokens)
    return 1e3 * float(found["decode_s"][str(_PROMPT)])
