"""`edgecascade bench engine`: our engine against others on the same weights, in one interleaved run.

Everybody reads the same ids, decodes as many tokens greedily, on as many threads, and has a process of its own that is
stopped while another one computes. Nothing is tokenised while the clock runs. In turn: loads, each in a fresh process;
rounds of speed, everybody once a round; peak memory; several requests at once; and last, since the texts' reference
takes memory, quality.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench import gguf_files, peers, plot, tables
from bench.errors import BenchError, ContenderError
from bench.figures import LONG, PROMPTS, SHORT, Measured, Row, beside, headlines, middle, row
from bench.memory import ReadTest, bring_into_cache, cached_share, drop_from_cache, files_under
from bench.peers import Entrant, Model
from bench.worker import Worker, prepare

Report = Callable[[int, int, str], None]
PROSE = Path(__file__).with_name("prose.txt")
CONTEXT = 2048
REQUESTS = 4
"""Requests at once where throughput is compared with one."""
READ_BYTES = 512 << 20
RANDOM_TEXT = 256
"""Random ids on which models of random weights are compared."""


@dataclass(frozen=True)
class Plan:
    """How much to measure: `loads` fresh processes cold and warm, `rounds` of speed, `texts` ids of quality."""

    rounds: int = 5
    loads: int = 3
    tokens: int = 48
    texts: int = CONTEXT - 1
    threads: int = 2
    huge_pages: bool = True

    def quick(self) -> Plan:
        """One round, few tokens: shows that all runs, measures nothing worth quoting."""
        return replace(self, rounds=1, loads=1, tokens=8, texts=64)


@dataclass(frozen=True)
class Ceiling:
    """How fast the machine's memory was read in the same rounds, GB/s."""

    small_pages: float | None
    huge_pages: float | None

    @property
    def gb_per_s(self) -> float | None:
        """The faster of the two, which no engine can pass for long."""
        return max((rate for rate in (self.small_pages, self.huge_pages) if rate), default=None)


@dataclass(frozen=True)
class Run:
    """What came of a run."""

    rows: Sequence[Row]
    ceiling: Ceiling
    reference: str
    texts: int
    still_cached: float
    """The largest part of a contender's files that was still in the page cache at a cold load."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready figures, the headlines first."""
        more = {
            "ceiling_gb_per_s": self.ceiling.gb_per_s,
            "ceiling_small_pages_gb_per_s": self.ceiling.small_pages,
            "reference": self.reference,
            "quality_ids": self.texts,
            "cold_still_cached": self.still_cached,
        }
        return {**headlines(self.rows), **more, **beside(self.rows)}


def model(shape: str, smollm2: Callable[[], Path], home: Path) -> Model:
    """The weights that everybody runs, written to `home` if they are not there; raises `BenchError`."""
    if shape != "smollm2" and shape not in gguf_files.SHAPES:
        raise BenchError(f"shape '{shape}' is unknown; use one of smollm2, {', '.join(gguf_files.SHAPES)}")
    if shape == "smollm2":
        return trained(smollm2(), home)
    file = home / f"{shape}.gguf"
    if not file.is_file():
        _written(file, lambda part: gguf_files.write_random(part, gguf_files.SHAPES[shape]))
    return at_random(file, home)


def trained(file: Path, home: Path) -> Model:
    """A trained model's file, and the same in Q4_0."""
    folder = _folder(file, home)
    q4_0 = folder / "Q4_0.gguf"
    if not q4_0.is_file():
        _written(q4_0, lambda part: gguf_files.requantise(file, part))
    return Model(file.stem, file, q4_0, folder, trained=True)


def at_random(file: Path, home: Path) -> Model:
    """A file of random weights in Q4_0."""
    return Model(file.stem, file, file, _folder(file, home), trained=False)


def _folder(file: Path, home: Path) -> Path:
    """A folder for what is made of the file; another file gets another one."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    folder = home / f"{file.stem}-{digest[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _written(path: Path, write: Callable[[Path], None]) -> None:
    """Let `path` appear whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def text_ids(chosen: Model) -> list[int]:
    """The project's own prose as the model's ids, or ids at random for random weights."""
    from bench.peers.ours import tokenizer

    known = tokenizer(chosen.file)
    if chosen.trained:
        ids: list[int] = known.encode(PROSE.read_text("utf-8"), add_special_tokens=False).ids
        return ids
    drawn: list[int] = np.random.default_rng(1).integers(0, known.get_vocab_size(), CONTEXT).tolist()
    return drawn


def measure(chosen: Model, names: Sequence[str], plan: Plan, report: Report) -> Run:
    """Prepare and measure; a contender that cannot go on stays in the table with the reason."""
    race = Race(chosen, plan, report)
    race.enter(names)
    race.loads()
    with race.opened():
        ceiling = race.rounds()
        race.memory()
        race.together()
        reference, texts = race.quality()
    rows = [row(found, ceiling.gb_per_s) for found in race.found.values()]
    return Run(rows, ceiling, reference, texts, race.still_cached)


class Race:
    """One run: the entrants that are still in it, their workers, and what was found of each."""

    def __init__(self, chosen: Model, plan: Plan, report: Report) -> None:
        self._model, self._plan, self._report = chosen, plan, report
        self._ids = text_ids(chosen)
        self._log = chosen.home / "bench.log"
        self._log.unlink(missing_ok=True)
        self._entrants: dict[str, Entrant] = {}
        self._workers: dict[str, Worker] = {}
        self.found: dict[str, Measured] = {}
        self.still_cached = 0.0

    def enter(self, names: Sequence[str]) -> None:
        """Find out who can take part and let each prepare itself."""
        for name in names:
            absent = peers.missing(name)
            if absent:
                self.found[name] = Measured(name, "", "", f"not installed: there is no module {absent}")
                continue
            for entrant in peers.peer(name).entrants(self._model):
                self._entrants[entrant.name] = entrant
                self.found[entrant.name] = Measured(entrant.peer, entrant.setting, entrant.about)
        self._everyone("preparing", lambda entrant: prepare(self._model, entrant, self._log))

    def loads(self) -> None:
        """Time loads from a dropped and from a filled page cache, each in a process of its own."""
        for number in range(self._plan.loads):
            self._everyone(f"load {number + 1} of {self._plan.loads}", self._load_twice)

    def _load_twice(self, entrant: Entrant) -> None:
        files, found = files_under(entrant.path), self.found[entrant.name]
        with self._worker(entrant) as worker:
            drop_from_cache(files)
            self.still_cached = max(self.still_cached, cached_share(files))
            found.cold_s.append(self._load(worker)["load_s"])
        with self._worker(entrant) as worker:
            bring_into_cache(files)
            found.warm_s.append(self._load(worker)["load_s"])

    def _load(self, worker: Worker) -> dict[str, Any]:
        return worker.ask("load", first=self._ids[0])

    def _worker(self, entrant: Entrant) -> Worker:
        return Worker(entrant, self._plan.threads, CONTEXT, self._log, huge_pages=self._plan.huge_pages)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Everybody's lasting process, with its model open."""
        with ExitStack() as stack:

            def start(entrant: Entrant) -> None:
                worker = stack.enter_context(self._worker(entrant))
                self.found[entrant.name].weight_bytes = self._load(worker)["weight_bytes"]
                self._workers[entrant.name] = worker

            self._everyone("opening", start)
            yield

    def rounds(self) -> Ceiling:
        """Everybody's speed, in turns; who begins changes from round to round."""
        tests = [ReadTest(self._plan.threads, READ_BYTES, huge_pages=huge) for huge in (False, True)]
        rates: tuple[list[float], list[float]] = ([], [])
        for number in range(self._plan.rounds):
            for test, found in zip(tests, rates, strict=True):
                found.append(test.gb_per_s())
            ids = self._ids[7 * number :] + self._ids[: 7 * number]
            self._everyone(f"round {number + 1} of {self._plan.rounds}", partial(self._speed, ids), first=number)
        return Ceiling(*map(middle, rates))

    def _speed(self, ids: Sequence[int], entrant: Entrant) -> None:
        answer = self._workers[entrant.name].ask(
            "speed", ids=ids, prefills=PROMPTS, contexts=(SHORT, LONG), tokens=self._plan.tokens
        )
        self.found[entrant.name].add_speed(answer)

    def memory(self) -> None:
        """Peak memory of loading and of the rounds."""

        def ask(entrant: Entrant) -> None:
            self.found[entrant.name].peak_bytes = self._workers[entrant.name].ask("memory")["peak_bytes"]

        self._everyone("memory", ask)

    def together(self) -> None:
        """Several requests at once against one, where that is offered."""
        for number in range(self._plan.rounds):
            self._everyone(f"{REQUESTS} requests at once, {number + 1} of {self._plan.rounds}", self._at_once)

    def _at_once(self, entrant: Entrant) -> None:
        ids, tokens = self._ids[: SHORT + REQUESTS], self._plan.tokens
        rates = self._workers[entrant.name].ask("together", ids=ids, requests=REQUESTS, tokens=tokens)
        if rates:
            self.found[entrant.name].together_ratios.append(rates["all"] / rates["one"])

    def quality(self) -> tuple[str, int]:
        """Compare everybody with the dequantised weights; returns whose arithmetic those ran in, and how many ids."""
        ids = self._ids[: self._plan.texts if self._model.trained else min(self._plan.texts, RANDOM_TEXT)]
        path = self._model.home / "reference.npy"
        try:
            named = self._reference(ids, path)
            self._everyone("quality", partial(self._compare, ids, path))
        finally:
            path.unlink(missing_ok=True)
        return named, len(ids)

    def _compare(self, ids: Sequence[int], path: Path, entrant: Entrant) -> None:
        answer = self._workers[entrant.name].ask("quality", ids=ids, path=str(path))
        found, steps = self.found[entrant.name], answer["steps"]
        found.kl, found.perplexity, found.top1 = steps["kl"], steps["perplexity"], steps["top1"]
        found.kl_pieces = answer["pieces"]["kl"]

    def _reference(self, ids: Sequence[int], path: Path) -> str:
        """Let transformers say what the weights mean where it can, our own fp32 otherwise; returns who did."""
        entrant = peers.reference(self._model)
        self._report(0, 1, f"reference: {entrant.name}")
        prepare(self._model, entrant, self._log)
        with self._worker(entrant) as worker:
            self._load(worker)
            worker.ask("reference", ids=ids, path=str(path))
        return entrant.name

    def _everyone(self, doing: str, do: Callable[[Entrant], None], first: int = 0) -> None:
        """Let all who are still in do it, one after the other; who fails is out, with the reason in the table."""
        names = list(self._entrants)
        first %= max(len(names), 1)
        for done, name in enumerate(names[first:] + names[:first]):
            self._report(done, len(names), f"{doing}: {name}")
            try:
                do(self._entrants[name])
            except ContenderError as error:
                self.found[name].skipped = str(error)
                del self._entrants[name]


def show(run: Run, chosen: Model, plan: Plan, console: Console) -> None:
    """Print the tables and what one must know to read them."""
    console.print(tables.engine_table(run.rows, f"{chosen.name}, {plan.threads} threads"))
    console.print(tables.engine_quality(run.rows, f"against {run.reference}, {run.texts} ids"))
    for text in tables.engine_notes(run.rows):
        console.print(text)
    small, huge = tables.number(run.ceiling.small_pages), tables.number(run.ceiling.huge_pages)
    console.print(
        f"memory is read at {small} GB/s in 4 KiB pages and {huge} in huge ones; medians of {plan.rounds} rounds of "
        f"{plan.tokens} tokens; loads: {plan.loads}, to the first token; when cold, at most "
        f"{tables.percent(run.still_cached)} % of the files still lay in the page cache"
    )


def finish(run: Run, path: Path | None, title: str, console: Console, line: Callable[[str], None]) -> None:
    """Draw the plot if asked to, and give the line of JSON."""
    if path:
        for written in plot.engine(run.rows, title, path):
            console.print(f"written: {written}")
    line(json.dumps(run.as_dict()))
