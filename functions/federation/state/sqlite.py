"""The shared log in SQLite: one process writes, all commits are on the disk before they are acknowledged."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from functions.federation.database import Database
from functions.federation.errors import ConflictError, DeletedError
from functions.federation.state.log import Bounds, Entry, Event, Page, is_same, marker

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL,
    id TEXT NOT NULL UNIQUE, conversation TEXT NOT NULL, kind TEXT NOT NULL, node TEXT NOT NULL, body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_conversation ON events (conversation, sequence);
CREATE TABLE IF NOT EXISTS deleted (conversation TEXT PRIMARY KEY, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS trimmed (only INTEGER PRIMARY KEY CHECK (only = 0), sequence INTEGER NOT NULL);
INSERT OR IGNORE INTO trimmed VALUES (0, 0);
"""


class SqliteLog:
    """A `StateLog` in one file; `path` None keeps it in memory."""

    def __init__(self, path: Path | None, bounds: Bounds, clock: Callable[[], float] = time.time) -> None:
        self._database = Database(path, _SCHEMA)
        self._bounds = bounds
        self._clock = clock
        self._changed = threading.Condition()
        with self._database.transaction() as rows:
            self._last = _last(rows)

    def append(self, event: Event) -> tuple[Entry, bool]:
        """See `StateLog`."""
        with self._database.transaction() as rows:
            self._trim(rows)
            known = rows.execute("SELECT * FROM events WHERE id = ?", (event.id,)).fetchone()
            if known is not None:
                entry = _entry(known)
                if not is_same(entry.event, event):
                    raise ConflictError
                return entry, False
            if rows.execute("SELECT 1 FROM deleted WHERE conversation = ?", (event.conversation,)).fetchone():
                raise DeletedError
            entry = self._insert(rows, event)
            self._trim(rows)
        self._tell(entry.sequence)
        return entry, True

    def read(self, after: int, limit: int, conversation: str | None = None) -> Page:
        """See `StateLog`."""
        with self._database.transaction() as rows:
            self._trim(rows)
            found = rows.execute(
                "SELECT * FROM events WHERE sequence > ?1 AND (?2 IS NULL OR conversation = ?2) "
                "ORDER BY sequence LIMIT ?3",
                (after, conversation, limit),
            ).fetchall()
            last = _last(rows)
            trimmed = rows.execute("SELECT sequence FROM trimmed").fetchone()[0]
        entries = tuple(_entry(row) for row in found)
        upto = entries[-1].sequence if len(entries) == limit else max(after, last)
        return Page(entries, upto, trimmed)

    def wait(self, after: int, timeout_s: float) -> None:
        """See `StateLog`; sees what this process wrote."""
        with self._changed:
            self._changed.wait_for(lambda: self._last > after, timeout_s)

    def is_deleted(self, conversation: str) -> bool:
        """See `StateLog`."""
        with self._database.transaction() as rows:
            self._trim(rows)
            return bool(rows.execute("SELECT 1 FROM deleted WHERE conversation = ?", (conversation,)).fetchone())

    def delete(self, conversation: str) -> int:
        """See `StateLog`."""
        event = marker(conversation)
        with self._database.transaction() as rows:
            mine = (conversation, event.id)
            gone = rows.execute("DELETE FROM events WHERE conversation = ? AND id <> ?", mine).rowcount
            rows.execute("INSERT OR IGNORE INTO deleted VALUES (?, ?)", (conversation, self._clock()))
            if not rows.execute("SELECT 1 FROM events WHERE id = ?", (event.id,)).fetchone():
                self._insert(rows, event)
            self._trim(rows)
            last = _last(rows)
        self._database.scrub()
        self._tell(last)
        return gone

    def close(self) -> None:
        """See `StateLog`."""
        self._database.close()

    def _insert(self, rows: sqlite3.Connection, event: Event) -> Entry:
        at = self._clock()
        cursor = rows.execute(
            "INSERT INTO events (at, id, conversation, kind, node, body) VALUES (?, ?, ?, ?, ?, ?)",
            (at, event.id, event.conversation, event.kind, event.node, event.body),
        )
        assert cursor.lastrowid is not None, "a row was inserted"  # noqa: S101  # a bug, not bad input
        return Entry(cursor.lastrowid, at, event)

    def _trim(self, rows: sqlite3.Connection) -> None:
        """Drop what is too old or too much, from the front, and tombstones likewise."""
        oldest = self._clock() - self._bounds.retention_s
        dated = rows.execute("SELECT max(sequence) FROM events WHERE at < ?", (oldest,)).fetchone()[0] or 0
        over = rows.execute(
            "SELECT sequence FROM events ORDER BY sequence DESC LIMIT 1 OFFSET ?", (self._bounds.max_events,)
        ).fetchone()
        upto = max(dated, over[0] if over else 0)
        if upto:
            rows.execute("DELETE FROM events WHERE sequence <= ?", (upto,))
            rows.execute("UPDATE trimmed SET sequence = max(sequence, ?)", (upto,))
        rows.execute("DELETE FROM deleted WHERE at < ?", (oldest,))
        rows.execute(
            "DELETE FROM deleted WHERE rowid IN (SELECT rowid FROM deleted ORDER BY at DESC LIMIT -1 OFFSET ?)",
            (self._bounds.max_events,),
        )

    def _tell(self, sequence: int) -> None:
        with self._changed:
            self._last = max(self._last, sequence)
            self._changed.notify_all()


def _entry(row: sqlite3.Row) -> Entry:
    event = Event(row["id"], row["conversation"], row["kind"], row["node"], row["body"])
    return Entry(row["sequence"], row["at"], event)


def _last(rows: sqlite3.Connection) -> int:
    """The highest number given so far, also where its event is gone."""
    found = rows.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
    return found[0] if found else 0
