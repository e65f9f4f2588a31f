"""An SQLite file of our own: WAL, every commit on the disk before it is acknowledged, readable by nobody else."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from functions.federation.errors import StoreError

_BUSY_S = 2.0


class Database:
    """One connection, one thread at a time. `path` None keeps everything in memory."""

    def __init__(self, path: Path | None, schema: str) -> None:
        """Open or create the file and its folder; raises `StoreError` if that cannot be done."""
        self._lock = threading.Lock()
        try:
            if path is not None:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._connection = sqlite3.connect(
                path or ":memory:", timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("PRAGMA secure_delete=ON")  # what is deleted leaves no trace in free pages
            self._connection.executescript(schema)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{path} cannot be opened as a database ({type(error).__name__}: {error})") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, committed when the block ends; raises `StoreError` if the database fails."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                except BaseException:
                    self._connection.execute("ROLLBACK")
                    raise
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise StoreError(f"the database failed ({type(error).__name__})") from error

    def scrub(self) -> None:
        """Move the write-ahead log into the file and empty it, so that deleted text lies in neither."""
        with self._lock:
            try:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:
                raise StoreError(f"the database failed ({type(error).__name__})") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()
