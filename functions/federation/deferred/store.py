"""Questions that wait for the edge, and their answers, in SQLite: each is answered visibly once.

pending → answered   the edge said it
        → refused    the edge will never answer this
        → expired    it waited longer than the retention; the question is forgotten

The three on the right are final. A finished one is kept for the retention once more, then forgotten altogether.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from functions.federation.database import Database
from functions.federation.errors import ConflictError, FullError

PENDING, ANSWERED, REFUSED, EXPIRED = "pending", "answered", "refused", "expired"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS deferred (
    arrival INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, conversation TEXT NOT NULL,
    request TEXT NOT NULL, digest TEXT NOT NULL, status TEXT NOT NULL, answer TEXT NOT NULL, at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_status ON deferred (status, arrival);
"""


@dataclass(frozen=True)
class Question:
    """What is kept. `request` is the body for the edge, JSON text, and `digest` tells it from another.

    `id` is the caller's, and makes a second sending harmless.
    """

    id: str
    conversation: str
    request: str
    digest: str


@dataclass(frozen=True)
class Record:
    """A question and how it stands since `at`, Unix seconds; `answer` is JSON text, empty while there is none."""

    question: Question
    status: str
    answer: str
    at: float


class DeferredStore:
    """A bounded queue with a memory; `path` None keeps it in memory, where a restart loses it."""

    def __init__(
        self, path: Path | None, limit: int, retention_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = Database(path, _SCHEMA)
        self._limit = limit
        self._retention_s = retention_s
        self._clock = clock

    def add(self, question: Question) -> Record:
        """Keep a question; one that is known is returned as it stands. Raises `ConflictError` or `FullError`."""
        with self._database.transaction() as rows:
            self._age(rows)
            known = rows.execute("SELECT * FROM deferred WHERE id = ?", (question.id,)).fetchone()
            if known is not None:
                if (known["digest"], known["conversation"]) != (question.digest, question.conversation):
                    raise ConflictError
                return _record(known)
            if rows.execute("SELECT count(*) FROM deferred").fetchone()[0] >= self._limit:
                raise FullError
            record = Record(question, PENDING, "", self._clock())
            rows.execute(
                "INSERT INTO deferred (id, conversation, request, digest, status, answer, at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (question.id, question.conversation, question.request, question.digest, PENDING, "", record.at),
            )
        return record

    def get(self, question_id: str) -> Record | None:
        """How a question stands, None if it is not known (any more)."""
        with self._database.transaction() as rows:
            self._age(rows)
            found = rows.execute("SELECT * FROM deferred WHERE id = ?", (question_id,)).fetchone()
        return _record(found) if found else None

    def next(self) -> Record | None:
        """The question that waits longest, None if none does."""
        with self._database.transaction() as rows:
            self._age(rows)
            found = rows.execute(
                "SELECT * FROM deferred WHERE status = ? ORDER BY arrival LIMIT 1", (PENDING,)
            ).fetchone()
        return _record(found) if found else None

    def finish(self, question: Question, status: str, answer: str) -> bool:
        """Make a pending question final and forget what was asked; False if it is not pending (any more)."""
        with self._database.transaction() as rows:
            done = rows.execute(
                "UPDATE deferred SET status = ?, answer = ?, at = ?, request = '' "
                "WHERE id = ? AND digest = ? AND status = ?",
                (status, answer, self._clock(), question.id, question.digest, PENDING),
            )
            return bool(done.rowcount)

    def delete(self, conversation: str) -> int:
        """Forget a conversation's questions and answers; returns how many there were."""
        with self._database.transaction() as rows:
            gone = rows.execute("DELETE FROM deferred WHERE conversation = ?", (conversation,)).rowcount
        if gone:
            self._database.scrub()
        return int(gone)

    def counts(self) -> dict[str, int]:
        """How many stand how."""
        with self._database.transaction() as rows:
            found = rows.execute("SELECT status, count(*) FROM deferred GROUP BY status").fetchall()
        return {PENDING: 0, ANSWERED: 0, REFUSED: 0, EXPIRED: 0, **dict(map(tuple, found))}

    def close(self) -> None:
        """Close the file; what is kept is there when it is opened again."""
        self._database.close()

    def _age(self, rows: sqlite3.Connection) -> None:
        now = self._clock()
        too_old = (now - self._retention_s, PENDING)
        rows.execute("DELETE FROM deferred WHERE at < ? AND status <> ?", too_old)
        rows.execute(
            "UPDATE deferred SET status = ?, request = '', at = ? WHERE at < ? AND status = ?", (EXPIRED, now, *too_old)
        )


def _record(row: sqlite3.Row) -> Record:
    question = Question(row["id"], row["conversation"], row["request"], row["digest"])
    return Record(question, row["status"], row["answer"], row["at"])
