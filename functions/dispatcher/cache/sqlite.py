"""A store in one SQLite file, which outlives the process; one process writes it.

What is deleted is overwritten (`secure_delete`), and a deletion that somebody asked for is on the disk when `forget`
returns. All else may be lost in a power cut: it is a cache. A file that SQLite cannot read is begun anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from functions.dispatcher.cache.store import Bounds, Entry, Held, StoreError
from functions.serving.settings import ConfigError

_APPLICATION_ID = 0x65636163  # "ecac": what marks a file as ours
_APPLICATION_ID_AT = slice(68, 72)  # in SQLite's file header
_LAYOUT = 1
# `used` orders by last use. `shelf` is a number for tenant and scope together: postings are read for one shelf alone,
# and what they lead to is held against tenant and scope again.
_SCHEMA = f"""
BEGIN;
CREATE TABLE answers (
  id INTEGER PRIMARY KEY, tenant TEXT, key TEXT, scope TEXT, conversation TEXT, text TEXT, model TEXT,
  model_version TEXT, frame TEXT, made_s REAL, expires_s REAL, features TEXT, size_bytes INTEGER, used INTEGER,
  UNIQUE (tenant, key)
);
CREATE INDEX answers_by_expiry ON answers (expires_s);
CREATE INDEX answers_by_conversation ON answers (tenant, conversation);
CREATE INDEX answers_by_use ON answers (tenant, used);
CREATE INDEX answers_by_size ON answers (tenant, size_bytes);
CREATE TABLE postings (
  shelf INTEGER, feature INTEGER, answer INTEGER REFERENCES answers ON DELETE CASCADE, weight REAL,
  PRIMARY KEY (shelf, feature, answer)
) WITHOUT ROWID;
CREATE INDEX postings_by_answer ON postings (answer);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_LAYOUT};
COMMIT;
"""
_COLUMNS = "tenant, key, scope, conversation, text, model, model_version, frame, made_s, expires_s, features"
_NEAREST = """
SELECT answers.key, SUM(postings.weight * asked.weight) AS alike
FROM (SELECT json_extract(value, '$[0]') AS feature, json_extract(value, '$[1]') AS weight FROM json_each(?)) AS asked
JOIN postings ON postings.shelf = ? AND postings.feature = asked.feature
JOIN answers ON answers.id = postings.answer
WHERE answers.tenant = ? AND answers.scope = ? AND answers.expires_s > ?
GROUP BY answers.id ORDER BY alike DESC, answers.key LIMIT 1
"""


class SqliteStore:
    """An `AnswerStore` in a file that only its owner may read; raises `ConfigError` if it cannot be made."""

    def __init__(self, path: Path, bounds: Bounds) -> None:
        self._bounds = bounds
        self._lock = threading.Lock()
        try:
            self._db = _open(path)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{path} cannot be used as a cache: {error}") from error
        self._uses = self._number("SELECT COALESCE(MAX(used), 0) FROM answers")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def put(self, entry: Entry) -> bool:
        """Keep an answer."""
        if entry.size_bytes > self._bounds.bytes or not self._bounds.entries:
            return False
        with self._transaction():
            self._remove(entry.tenant, entry.key)
            while self._held().entries >= self._bounds.entries:
                self._evict("COUNT(*)")
            while self._held().bytes + entry.size_bytes > self._bounds.bytes:
                self._evict("SUM(size_bytes)")
            self._insert(entry)
        return True

    def get(self, tenant: str, key: str, now_s: float) -> Entry | None:
        """The answer to a request."""
        with self._transaction():
            return self._used(tenant, key, now_s)

    def nearest(
        self, tenant: str, scope: str, features: Mapping[int, float], now_s: float
    ) -> tuple[Entry, float] | None:
        """The answer to the question most like one."""
        asked = json.dumps(list(features.items()))
        with self._transaction():
            where = (asked, _shelf(tenant, scope), tenant, scope, now_s)
            found = self._db.execute(_NEAREST, where).fetchone()
            entry = self._used(tenant, found[0], now_s) if found else None
            return (entry, float(found[1])) if entry else None

    def forget(self, tenant: str, conversation: str) -> int:
        """Delete what came of a conversation; it is off the disk when this returns."""
        if not conversation:
            return 0
        with self._transaction(durable=True):
            chosen = "DELETE FROM answers WHERE tenant = ? AND conversation = ?"
            return self._db.execute(chosen, (tenant, conversation)).rowcount

    def purge(self, now_s: float) -> int:
        """Delete what has expired."""
        with self._transaction():
            return self._db.execute("DELETE FROM answers WHERE expires_s <= ?", (now_s,)).rowcount

    def held(self) -> Held:
        """How much there is."""
        with self._transaction():
            return self._held()

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        with self._lock, _translated():
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
            self._db.execute("BEGIN")
            with self._db:
                yield

    def _held(self) -> Held:
        row = self._db.execute("SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM answers").fetchone()
        return Held(*row)

    def _used(self, tenant: str, key: str, now_s: float) -> Entry | None:
        chosen = f"SELECT {_COLUMNS} FROM answers WHERE tenant = ? AND key = ? AND expires_s > ?"  # noqa: S608  # ours
        row = self._db.execute(chosen, (tenant, key, now_s)).fetchone()
        if row is None:
            return None
        self._uses += 1
        self._db.execute("UPDATE answers SET used = ? WHERE tenant = ? AND key = ?", (self._uses, tenant, key))
        values = dict(zip(_COLUMNS.split(", "), row, strict=True))
        return Entry(**{**values, "features": dict(json.loads(values["features"]))})

    def _insert(self, entry: Entry) -> None:
        self._uses += 1
        features = json.dumps(list(entry.features.items()))
        kept = (entry.tenant, entry.key, entry.scope, entry.conversation, entry.text, entry.model, entry.model_version)
        values = (*kept, entry.frame, entry.made_s, entry.expires_s, features, entry.size_bytes, self._uses)
        marks = ", ".join("?" * len(values))
        answer = self._db.execute(f"INSERT INTO answers VALUES (NULL, {marks})", values).lastrowid  # noqa: S608  # marks
        shelf = _shelf(entry.tenant, entry.scope)
        rows = [(shelf, feature, answer, weight) for feature, weight in entry.features.items()]
        self._db.executemany("INSERT INTO postings VALUES (?, ?, ?, ?)", rows)

    def _evict(self, size: str) -> None:
        """Remove what the tenant with the largest `size`, an aggregate, has not used for longest."""
        largest = f"SELECT tenant FROM answers GROUP BY tenant ORDER BY {size} DESC, tenant DESC LIMIT 1"  # noqa: S608
        (tenant,) = self._db.execute(largest).fetchone()
        chosen = "SELECT key FROM answers WHERE tenant = ? ORDER BY used LIMIT 1"
        self._remove(tenant, self._db.execute(chosen, (tenant,)).fetchone()[0])

    def _remove(self, tenant: str, key: str) -> None:
        self._db.execute("DELETE FROM answers WHERE tenant = ? AND key = ?", (tenant, key))

    def _number(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0])


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"the cache's file: {error}") from error


def _shelf(tenant: str, scope: str) -> int:
    digest = hashlib.sha256(f"{tenant}\n{scope}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


def _open(path: Path) -> sqlite3.Connection:
    """Open the file, new or ours; one of ours that is damaged or of another layout is begun anew."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    with path.open("rb") as file:
        header = file.read(_APPLICATION_ID_AT.stop)
    if header and header[_APPLICATION_ID_AT] != _APPLICATION_ID.to_bytes(4):
        raise ConfigError(f"{path} is there and is no cache of edgecascade; name another file")
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
    try:
        if header and not _is_sound(db):
            db.close()
            for ours in (path, path.with_name(f"{path.name}-journal")):
                ours.unlink(missing_ok=True)
            return _open(path)
        for setting in ("secure_delete = ON", "foreign_keys = ON"):
            db.execute(f"PRAGMA {setting}")
        if not header:
            db.executescript(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def _is_sound(db: sqlite3.Connection) -> bool:
    try:
        layout = db.execute("PRAGMA user_version").fetchone()[0]
        return bool(layout == _LAYOUT and db.execute("PRAGMA quick_check").fetchone()[0] == "ok")
    except sqlite3.OperationalError:  # locked, or the disk: nothing to do with what is in the file
        raise
    except sqlite3.DatabaseError:
        return False
