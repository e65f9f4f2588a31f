"""One contender in a process of its own: told over a pipe what to measure, it answers in lines of JSON.

`Worker` is the end that asks; run as a module, this file is the end that measures. A worker that is not asked is
stopped by signal, so that no thread of it spins while another one computes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bench.errors import ContenderError
from bench.memory import peak_bytes
from bench.peers import Entrant, Floats, Model, Reader, peer
from bench.processes import die_with_parent

Answer = dict[str, Any]
WARM_UP = 32
"""Ids read before anything is timed."""
WARM_STEPS = 4
PIECE = 32
"""Ids read at once where the loss of the many-token path is measured."""
MOST_WORDS = 200
"""Characters of a library's complaint that are passed on."""
HUGE_PAGES = "glibc.malloc.hugetlb=1"


class Worker:
    """A contender's process; stopped whenever it is not asked."""

    def __init__(self, entrant: Entrant, threads: int, context: int, log: Path, *, huge_pages: bool = True) -> None:
        self.entrant = entrant
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if huge_pages:
            environment["GLIBC_TUNABLES"] = HUGE_PAGES
        hello = json.dumps({"entrant": _plain(entrant), "threads": threads, "context": context})
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", __name__, hello],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def ask(self, what: str, **values: Any) -> Answer:
        """Let the worker go on until it has answered; raises `ContenderError`."""
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101
        self._process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it has died: reading its answer says so
            stdin.write(json.dumps({"what": what, **values}).encode() + b"\n")
            stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101
        line = stdout.readline()
        if not line:
            self._process.wait()
            raise ContenderError(f"{self.entrant.name} ended: {_last_words(self._log)}")
        self._process.send_signal(signal.SIGSTOP)
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def prepare(model: Model, entrant: Entrant, log: Path) -> None:
    """Let a process of its own prepare what the entrant opens; raises `ContenderError` with its last word."""
    words = json.dumps({"entrant": _plain(entrant), "model": _plain(model)})
    with log.open("ab") as errors:
        command = [sys.executable, "-m", __name__, words]
        done = subprocess.run(command, stdout=errors, stderr=errors, check=False)  # noqa: S603
    if done.returncode:
        raise ContenderError(f"{entrant.name} could not be prepared: {_last_words(log)}")


def _last_words(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").strip().splitlines() or ["no reason given"]
    return f"{lines[-1][:MOST_WORDS]} (more in {log})"


def _plain(value: Entrant | Model) -> dict[str, Any]:
    return {name: str(part) if isinstance(part, Path) else part for name, part in asdict(value).items()}


# ---- the end that measures ----


@runtime_checkable
class ManyAtOnce(Protocol):
    """A reader that can open another sequence on the same model."""

    def another(self) -> Reader:
        """A second sequence."""
        ...


@runtime_checkable
class WholeTexts(Protocol):
    """A reader whose logits for many ids at once equal those that it gives one by one."""

    def all_logits(self, ids: Sequence[int]) -> Floats:
        """Logits (T, V) after each of ids."""
        ...


class Session:
    """What a worker can be asked; each method is one question."""

    def __init__(self, entrant: Entrant, threads: int, context: int) -> None:
        self._entrant, self._threads, self._context = entrant, threads, context
        self._peer = peer(entrant.peer)
        self._peer.warm_up()
        self._reader: Reader | None = None
        self._beside: list[Reader] = []

    @property
    def reader(self) -> Reader:
        """The open model."""
        if self._reader is None:
            raise ContenderError("nothing is open yet")
        return self._reader

    def load(self, first: int) -> Answer:
        """Open the model and read one token, so that whoever maps its file has read it too."""
        begun = time.perf_counter()
        self._reader = self._peer.load(self._entrant, self._threads, self._context)
        self._reader.start([first])
        return {"load_s": time.perf_counter() - begun, "weight_bytes": self._peer.weight_bytes(self._entrant)}

    def speed(self, ids: Sequence[int], prefills: Sequence[int], contexts: Sequence[int], tokens: int) -> Answer:
        """Seconds that each prompt took, and that a decoded token took after those in `contexts`.

        Every prompt is another stretch of ids, so that none finds what an earlier one may have left in a cache.
        """
        self._warm_up(ids)
        prefill_s, decode_s = {}, {}
        for number, length in enumerate(sorted({*prefills, *contexts}), 1):
            prompt = [*ids[number:], *ids[:number]][:length]
            self.reader.reset()
            prefill_s[length] = _timed(lambda prompt=prompt: self.reader.start(prompt))  # type: ignore[misc]
            if length in contexts:
                decode_s[length] = _timed(lambda: _decode(self.reader, tokens)) / tokens
        return {"prefill_s": prefill_s, "decode_s": decode_s}

    def together(self, ids: Sequence[int], requests: int, tokens: int) -> Answer:
        """Tokens a second of one request alone, and of several at once; nothing where that is not offered."""
        if not isinstance(self.reader, ManyAtOnce):
            return {}
        readers = self._readers(requests)
        for number, reader in enumerate(readers):
            reader.reset()
            reader.start(ids[number:])
        with ThreadPoolExecutor(requests) as pool:
            one_s = _timed(lambda: _decode(readers[0], tokens))
            all_s = _timed(lambda: list(pool.map(lambda reader: _decode(reader, tokens), readers)))
        return {"one": tokens / one_s, "all": requests * tokens / all_s}

    def _readers(self, n: int) -> list[Reader]:
        """The reader and others beside it, made once."""
        assert isinstance(self.reader, ManyAtOnce)  # noqa: S101
        self._beside += [self.reader.another() for _ in range(n - 1 - len(self._beside))]
        return [self.reader, *self._beside[: n - 1]]

    def memory(self) -> Answer:
        """Peak memory so far."""
        return {"peak_bytes": peak_bytes()}

    def reference(self, ids: Sequence[int], path: str) -> Answer:
        """Write the logits (T, V) after each of ids to an .npy file."""
        self.reader.reset()
        np.save(path, self._all_logits(ids))
        return {}

    def quality(self, ids: Sequence[int], path: str) -> Answer:
        """Compare with the reference's logits: token by token, and in pieces of several tokens."""
        theirs = np.load(path, mmap_mode="r")
        self.reader.reset()
        steps = [Compared.of(theirs[n], ours, ids[n + 1 : n + 2]) for n, ours in enumerate(self._each(ids))]
        self.reader.reset()
        ends = range(PIECE, len(ids) + 1, PIECE)
        pieces = [Compared.of(theirs[n - 1], self.reader.logits(ids[n - PIECE : n]), ids[n : n + 1]) for n in ends]
        return {"steps": _mean(steps), "pieces": _mean(pieces), "positions": len(steps), "ends": len(pieces)}

    def _each(self, ids: Sequence[int]) -> Any:
        if isinstance(self.reader, WholeTexts):
            return self.reader.all_logits(ids)
        return (self.reader.logits([token]) for token in ids)

    def _all_logits(self, ids: Sequence[int]) -> Floats:
        return np.stack([np.array(found, np.float32) for found in self._each(ids)])

    def _warm_up(self, ids: Sequence[int]) -> None:
        self.reader.reset()
        self.reader.start(ids[:WARM_UP])
        _decode(self.reader, WARM_STEPS)


class Compared:
    """One position against the reference."""

    def __init__(self, kl: float, nll: float | None, same: bool) -> None:
        self.kl, self.nll, self.same = kl, nll, same

    @classmethod
    def of(cls, theirs: Floats, ours: Floats, target: Sequence[int]) -> Compared:
        """KL divergence of the reference's distribution from ours in nats, −log p of the target, equal best choice."""
        p, q = log_softmax(theirs), log_softmax(ours)
        nll = -float(q[target[0]]) if target else None
        return cls(float(np.sum(np.exp(p) * (p - q))), nll, bool(p.argmax() == q.argmax()))


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Natural-log probabilities (V,)."""
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _mean(found: Sequence[Compared]) -> Answer:
    nll = [one.nll for one in found if one.nll is not None]
    return {
        "kl": float(np.mean([one.kl for one in found])) if found else None,
        "perplexity": float(np.exp(np.mean(nll))) if nll else None,
        "top1": float(np.mean([one.same for one in found])) if found else None,
    }


def _decode(reader: Reader, tokens: int) -> None:
    for _ in range(tokens):
        reader.step()


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _entrant(values: Mapping[str, Any]) -> Entrant:
    return Entrant(**{**values, "path": Path(values["path"])})


def _model(values: Mapping[str, Any]) -> Model:
    return Model(**{**values, **{name: Path(values[name]) for name in ("file", "q4_0", "home")}})


def main(words: str) -> None:
    """Prepare, or answer questions until there are no more; dies with the process that asks."""
    die_with_parent()  # a stopped process would not see its pipe close
    hello = json.loads(words)
    entrant = _entrant(hello["entrant"])
    if "model" in hello:
        peer(entrant.peer).prepare(_model(hello["model"]), entrant)
        return
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print what they like
    session = Session(entrant, hello["threads"], hello["context"])
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        answer = getattr(session, question.pop("what"))(**question)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
