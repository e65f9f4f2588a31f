"""`make demo`: asks a running bundle, prints the table, chats, and says where each figure comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import linear
from bench.client import Client, Reply
from bench.evaluate import Evaluation, ask_all, evaluation
from bench.metrics import Outcome, row
from bench.queries import OWN_QUERIES, Query, count_by_skill, read, sample
from bench.tables import main_table, skill_table

CHATS = (
    "Hello! What can you help me with?",
    "Name three things to pack for a day of hiking.",
    "Explain in one sentence why the sky is blue.",
)
CHAT_TOKENS = 80
QUERIES_PER_SKILL = 100


@dataclass(frozen=True)
class Material:
    """What the demo asks, and what the linear baseline may learn from (nothing: no such row)."""

    queries: Sequence[Query]
    origin: str
    train: Sequence[Query] = field(default=())


def gather(folder: Path, published: Callable[..., Sequence[Query]]) -> Material:
    """The published sets' test halves where they are at hand, the project's own queries elsewhere."""
    if not (folder / "clinc150").is_dir():
        return Material(read(OWN_QUERIES), "the project's own paraphrases, bench/queries.jsonl")
    drawn = sample(published(folder, "test", "assistant", "home", "banking"), QUERIES_PER_SKILL)
    origin = f"the test halves of CLINC150, SNIPS and BANKING77, {QUERIES_PER_SKILL} a skill, drawn with a fixed seed"
    return Material(drawn, origin, published(folder, "train", "assistant", "banking"))


def run(client: Client, material: Material, console: Console) -> dict[str, Any]:
    """Print the demo; returns its figures, JSON-ready. Raises `ServiceError`."""
    counts = ", ".join(f"{n} {skill}" for skill, n in count_by_skill(material.queries).items())
    console.print(f"{len(material.queries)} queries ({counts}): {material.origin}")
    answers = ask_with_progress(client, material.queries, ("device", "edge", "auto"), console)
    baseline = baseline_outcomes(material, console)
    show(answers, baseline, count_by_skill(material.queries), console)
    chats = [chat(client, text, console) for text in CHATS]
    figures = answers.as_dict()
    if baseline:
        figures["rows"]["linear"] = row(_together(baseline)).as_dict()
    return {**figures, "origin": material.origin, "chats": [reply.as_dict() for reply in chats]}


def ask_with_progress(client: Client, queries: Sequence[Query], models: Sequence[str], console: Console) -> Evaluation:
    """Ask everything behind a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"asking {', '.join(models)}", total=len(queries))
        return evaluation(ask_all(client, queries, models, lambda: progress.advance(task)))


def baseline_outcomes(material: Material, console: Console) -> dict[str, list[Outcome]]:
    """The linear row by skill: fitted here if there is data, and asked only where a frame is no more than an intent."""
    if not material.train:
        return {}
    slotted = {q.skill for q in (*material.train, *material.queries) if q.slots}
    with console.status("fitting the linear baseline"):
        models = linear.fit_skills([q for q in material.train if q.skill not in slotted])
    return {s: linear.outcomes(models, [q for q in material.queries if q.skill == s]) for s in models}


def show(
    answers: Evaluation, baseline: Mapping[str, Sequence[Outcome]], skills: Iterable[str], console: Console
) -> None:
    """Print both tables and their footnotes."""
    rows = {**answers.rows, **({"linear": row(_together(baseline))} if baseline else {})}
    console.print(main_table(rows, "one query at a time, through the gateway"))
    by_skill = {skill: answers.of_skill(skill) for skill in skills}
    console.print(skill_table(by_skill, {skill: row(found) for skill, found in baseline.items()}))
    if baseline:
        fitted = " and ".join(baseline)
        console.print(
            f"linear baseline: TF-IDF and SVM, fitted and run in this process; intents only, so {fitted} alone"
        )
    console.print(
        "measured here: latency, confidence, accuracy, bytes; modelled: joules (watts of the tier card x busy time)"
    )


def _together(baseline: Mapping[str, Sequence[Outcome]]) -> list[Outcome]:
    return [outcome for found in baseline.values() for outcome in found]


def chat(client: Client, text: str, console: Console) -> Reply:
    """One streamed exchange."""
    console.print(f"\n[bold]you[/bold]: {text}")
    console.print("[bold]answer[/bold]: ", end="")
    for piece in client.stream("chat", [{"role": "user", "content": text}], "auto", CHAT_TOKENS):
        if isinstance(piece, Reply):
            console.print(f"\n[dim]{piece.source}, {piece.latency_ms:.0f} ms[/dim]")
            return piece
        console.print(piece, end="", markup=False, highlight=False)
    raise AssertionError("a stream ends with its reply")
