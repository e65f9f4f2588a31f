"""How often questions in other words are answered from the cache, and how often wrongly, by threshold of likeness.

`paraphrases.jsonl` has, for the questions of questions.toml, the same questions in other words, and others that look
alike and want another answer (`same_as` null). Features and threshold were chosen on the lines of split `choose`; those
of split `test` were written before they were measured, and measured once. With the folder of CLINC150 as an argument it
also measures there: five utterances of each of 150 intents are kept, and a hit is right if it has the intent.
"""

from __future__ import annotations

import json
import random
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from functions.dispatcher.cache.memory import MemoryStore
from functions.dispatcher.cache.similarity import features
from functions.dispatcher.cache.store import Bounds, Entry

HERE = Path(__file__).parent
THRESHOLDS = (0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
_KEPT_PER_INTENT = 5

Pair = tuple[str, str | None]
"""A text, and what its answer is to be; None: none that is kept."""


def nearest(kept: Iterable[Pair], asked: Sequence[Pair]) -> list[tuple[float, bool, bool]]:
    """For each question: the likeness of the nearest kept one, whether that is right, and whether one was to be had."""
    store = MemoryStore(Bounds(entries=10_000, bytes=1 << 30))
    for number, (text, answer) in enumerate(kept):
        store.put(Entry("t", str(number), "", "", answer or "", "", "", "", 0, 1, features(text)))
    results = []
    for text, answer in asked:
        entry, likeness = store.nearest("t", "", features(text), 0) or (None, 0.0)
        results.append((likeness, entry is not None and entry.text == answer, answer is not None))
    return results


def table(name: str, results: Sequence[tuple[float, bool, bool]]) -> list[str]:
    """Lines of a table in Markdown: shares of all questions asked, and of those that could be answered."""
    answerable = sum(has for _, _, has in results)
    lines = [f"{name}: {len(results)} questions, {answerable} of them can be answered", ""]
    lines += ["| likeness from | answered rightly, of those that can be | answered wrongly, of all |", "|---|---|---|"]
    for threshold in THRESHOLDS:
        right = sum(likeness >= threshold and is_right for likeness, is_right, _ in results)
        wrong = sum(likeness >= threshold and not is_right for likeness, is_right, _ in results)
        lines.append(f"| {threshold} | {right / answerable:.1%} ({right}) | {wrong / len(results):.1%} ({wrong}) |")
    return [*lines, ""]


def kiosk(split: str) -> list[tuple[float, bool, bool]]:
    """Our own questions."""
    entries = tomllib.loads((HERE / "questions.toml").read_text("utf-8"))["question"]
    kept = [(text, entry["ask"][0]) for entry in entries for text in entry["ask"]]
    rows = [json.loads(line) for line in (HERE / "paraphrases.jsonl").read_text("utf-8").splitlines()]
    return nearest(kept, [(row["text"], row["same_as"]) for row in rows if row["split"] == split])


def clinc(folder: Path) -> list[tuple[float, bool, bool]]:
    """The test half of CLINC150, out-of-scope queries included; utterances to keep drawn with a fixed seed."""
    data = json.loads((folder / "data.json").read_text("utf-8"))
    by_intent: dict[str, list[str]] = {}
    for text, intent in data["train"]:
        by_intent.setdefault(intent, []).append(text)
    rng = random.Random(1)
    kept = [(text, intent) for intent, texts in by_intent.items() for text in rng.sample(texts, _KEPT_PER_INTENT)]
    asked = [(text, None if intent == "oos" else intent) for text, intent in data["test"] + data["oos_test"]]
    return nearest(kept, asked)


def main() -> None:
    """Print the tables."""
    lines = table("kiosk, chosen on", kiosk("choose")) + table("kiosk, test", kiosk("test"))
    if len(sys.argv) > 1:
        lines += table("CLINC150, test half", clinc(Path(sys.argv[1])))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
