"""The shared log in Redis, for several nodes: a stream whose ids are our sequence numbers, changed by scripts alone.

A script runs as one step, so no reader sees half of it. What was acknowledged survives a crash of the server as far as
the server keeps its word: run it with `appendonly yes` and `appendfsync always`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from functions.federation.errors import ConflictError, DeletedError, StoreError
from functions.federation.state.log import Bounds, Entry, Event, Page, is_same, marker

_TIMEOUT_S = 2.0
_WAIT_S = 1.0  # one look of a waiting reader; shorter than the time-out
_SCAN = 1000

# KEYS: log, ids, deleted, meta. ARGV: now, the oldest time kept, the most events kept, then what the script takes.
_TRIM = """
local log, ids, deleted, meta = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now, oldest, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local function field(entry, name)
  for i = 1, #entry[2], 2 do if entry[2][i] == name then return entry[2][i + 1] end end
end
local function sequence_of(entry) return string.match(entry[1], '^(%d+)') end
local function remove(entry)
  redis.call('XDEL', log, entry[1])
  redis.call('HDEL', ids, field(entry, 'id'))
end
local function trim()
  local first = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)[1]
  while first and (redis.call('XLEN', log) > most or tonumber(field(first, 'at')) < oldest) do
    remove(first)
    redis.call('HSET', meta, 'trimmed', sequence_of(first))
    first = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)[1]
  end
  redis.call('ZREMRANGEBYSCORE', deleted, '-inf', '(' .. ARGV[2])
  redis.call('ZREMRANGEBYRANK', deleted, 0, -most - 1)
end
local function insert(id, conversation, kind, node, body)
  local sequence = redis.call('HINCRBY', meta, 'last', 1)
  redis.call('XADD', log, sequence .. '-0', 'at', now, 'id', id, 'conversation', conversation,
             'kind', kind, 'node', node, 'body', body)
  redis.call('HSET', ids, id, sequence)
  return sequence
end
trim()
"""
_APPEND = (
    _TRIM
    + """
local known = redis.call('HGET', ids, ARGV[4])
if known then return {0, redis.call('XRANGE', log, known .. '-0', known .. '-0')[1]} end
if redis.call('ZSCORE', deleted, ARGV[5]) then return {-1} end
local sequence = insert(ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8])
trim()
return {1, sequence}
"""
)
_READ = (
    _TRIM
    + """
local after, limit, wanted, scan = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])
local found, upto, full = {}, after, false
local page
repeat
  page = redis.call('XRANGE', log, '(' .. upto .. '-0', '+', 'COUNT', scan)
  for _, entry in ipairs(page) do
    upto = tonumber(sequence_of(entry))
    if wanted == '' or field(entry, 'conversation') == wanted then found[#found + 1] = entry end
    if #found == limit then full = true break end
  end
until full or #page < scan
if not full then upto = math.max(after, tonumber(redis.call('HGET', meta, 'last') or 0)) end
return {found, upto, tonumber(redis.call('HGET', meta, 'trimmed') or 0)}
"""
)
_DELETE = (
    _TRIM
    + """
local gone = 0
for _, entry in ipairs(redis.call('XRANGE', log, '-', '+')) do
  if field(entry, 'conversation') == ARGV[5] and field(entry, 'id') ~= ARGV[4] then remove(entry) gone = gone + 1 end
end
redis.call('ZADD', deleted, 'NX', now, ARGV[5])
if redis.call('HEXISTS', ids, ARGV[4]) == 0 then insert(ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]) end
trim()
return gone
"""
)


class RedisLog:
    """A `StateLog` on a Redis server (5 or newer); all nodes that name the same `prefix` share it."""

    def __init__(
        self, url: str, bounds: Bounds, prefix: str = "edgecascade", clock: Callable[[], float] = time.time
    ) -> None:
        """Connect lazily; a dead server shows with the first call."""
        # Every call may be sent twice without harm, so one retry over a fresh connection is.
        self._client: Any = redis.Redis.from_url(
            url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=Retry(NoBackoff(), 1)
        )
        self._keys = [f"{{{prefix}}}:{name}" for name in ("log", "ids", "deleted", "meta")]
        self._bounds = bounds
        self._clock = clock
        self._append, self._read, self._delete = (self._client.register_script(s) for s in (_APPEND, _READ, _DELETE))

    def append(self, event: Event) -> tuple[Entry, bool]:
        """See `StateLog`."""
        at = self._clock()
        with _translated():
            outcome = self._run(self._append, at, *_arguments(event))
        if outcome[0] < 0:
            raise DeletedError
        if outcome[0]:
            return Entry(outcome[1], at, event), True
        entry = _entry(outcome[1])
        if not is_same(entry.event, event):
            raise ConflictError
        return entry, False

    def read(self, after: int, limit: int, conversation: str | None = None) -> Page:
        """See `StateLog`."""
        with _translated():
            found, upto, trimmed = self._run(self._read, self._clock(), after, limit, conversation or "", _SCAN)
        return Page(tuple(_entry(one) for one in found), upto, trimmed)

    def wait(self, after: int, timeout_s: float) -> None:
        """See `StateLog`."""
        ends = time.monotonic() + timeout_s
        with _translated():
            while (left_s := ends - time.monotonic()) > 0:
                block_ms = max(1, int(1e3 * min(left_s, _WAIT_S)))
                if self._client.xread({self._keys[0]: f"{after}-0"}, count=1, block=block_ms):
                    return

    def is_deleted(self, conversation: str) -> bool:
        """See `StateLog`."""
        with _translated():
            since = self._client.zscore(self._keys[2], conversation)
        return since is not None and since >= self._clock() - self._bounds.retention_s

    def delete(self, conversation: str) -> int:
        """See `StateLog`; looks at every event, since this is rare and writing is not."""
        with _translated():
            gone = int(self._run(self._delete, self._clock(), *_arguments(marker(conversation))))
            # The server's file holds what was deleted until it is written anew; it may not let us, or be at it already.
            with suppress(redis.ResponseError):
                self._client.bgrewriteaof()
        return gone

    def close(self) -> None:
        """See `StateLog`."""
        self._client.close()

    def _run(self, script: Any, now: float, *arguments: Any) -> Any:
        common = (repr(now), repr(now - self._bounds.retention_s), self._bounds.max_events)
        return script(keys=self._keys, args=[*common, *arguments])


def _arguments(event: Event) -> tuple[str, ...]:
    return event.id, event.conversation, event.kind, event.node, event.body


def _entry(raw: Any) -> Entry:
    key, flat = raw
    values = {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}
    at = float(values.pop("at"))
    return Entry(int(key.split(b"-")[0]), at, Event(**values))


@contextmanager
def _translated() -> Iterator[None]:
    """The client's errors as ours; they never quote the address, which may hold a password."""
    try:
        yield
    except redis.RedisError as error:
        raise StoreError(f"Redis failed ({type(error).__name__})") from error
