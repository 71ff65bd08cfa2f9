"""The store: one SQLite file of records and of the ledger that keeps them single. This module writes it.

    streams   one row per (agent, plugin, epoch)             duplicates_refused
    ranges    (stream, state, first) → last                  state: STORED, or why it was lost
    series    one row per (name, labels, type)               so that a record repeats none of them
    records   (stream, seq) → ts_ns, series, value, payload  value NULL is NaN, which SQLite cannot hold

Invariants:
* Records and ledger of a batch change in one transaction, durable (WAL, synchronous=FULL) before `commit`
  returns.
* One writer: a lock file keeps a second receiver away, because the ledger is cached in memory.
* After any failure nothing cached is believed: the file is closed and opened afresh by the next commit.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kon_agent.errors import StoreError
from kon_agent.ranges import Range, count_of
from kon_agent.receiver.batch import Batch, Outcome, Segment
from kon_agent.receiver.ledger import EpochLedger
from kon_agent.wire import kon_agent_pb2 as pb

STORED = -1  # `ranges.state` of what is stored; no LossReason is negative
APPLICATION_ID = 0x4B4F4E52  # "KONR": tells our file from any other SQLite database
SCHEMA_VERSION = 2
BUSY_TIMEOUT_S = 2.0  # a foreign lock must end well within an agent's ack deadline of 5 s
MAX_CACHED_STREAMS = 4096  # ledgers in memory, a few hundred bytes each
MAX_CACHED_SERIES = 100_000  # series ids in memory, about 30 MB at the worst
WAL_LIMIT_BYTES = 64 * 1024 * 1024  # what a journal that grew under a long reader is cut back to

_SCHEMA = """
CREATE TABLE streams (
    id INTEGER PRIMARY KEY,
    agent TEXT NOT NULL, plugin TEXT NOT NULL, epoch INTEGER NOT NULL,
    duplicates_refused INTEGER NOT NULL DEFAULT 0,
    UNIQUE (agent, plugin, epoch)
);
CREATE TABLE ranges (
    stream INTEGER NOT NULL REFERENCES streams, state INTEGER NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL,
    PRIMARY KEY (stream, state, first)
) WITHOUT ROWID;
CREATE TABLE series (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL, labels TEXT NOT NULL, type INTEGER NOT NULL,
    UNIQUE (name, labels, type)
);
CREATE TABLE records (
    stream INTEGER NOT NULL REFERENCES streams, seq INTEGER NOT NULL,
    ts_ns INTEGER NOT NULL, series INTEGER NOT NULL REFERENCES series, value REAL, payload BLOB,
    clock_unsynced INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (stream, seq)
) WITHOUT ROWID;
CREATE INDEX records_by_time ON records (ts_ns);
"""

_FROM_1 = "ALTER TABLE records ADD COLUMN clock_unsynced INTEGER NOT NULL DEFAULT 0;"

_SeriesKey = tuple[str, int, tuple[tuple[str, str], ...]]
_Row = tuple[int, int, int, int, float, bytes | None, int]


class _Stream(msgspec.Struct):
    id: int
    ledger: EpochLedger


def signed(epoch: int) -> int:
    """Return an unsigned 64-bit epoch as the signed integer SQLite holds."""
    return epoch - 2**64 if epoch >= 2**63 else epoch


class Store:
    """The only writer of a store. Not thread-safe, but bound to no thread.

    Args:
        path: the SQLite file; made, with its directory, where there is none.

    Raises:
        StoreError: the file cannot be used, or another receiver uses it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._streams: dict[tuple[str, str, int], _Stream] = {}
        self._series: dict[_SeriesKey, int] = {}
        self._lock_fd = self._lock()
        self._db: sqlite3.Connection | None = None
        try:
            self._db = self._open()
        except StoreError:
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        """Close the file and let another receiver have it."""
        self._forget()
        os.close(self._lock_fd)

    def commit(self, batches: Sequence[Batch]) -> list[Outcome]:
        """Store `batches` in one durable transaction and return what became of each.

        Raises:
            StoreError: none of them is stored; a later commit may succeed.
        """
        try:
            db = self._db = self._db or self._open()
            db.execute("BEGIN IMMEDIATE")
            outcomes = [self._enter(db, batch) for batch in batches]
            self._persist_ledgers(db, batches)
            db.execute("COMMIT")
        except sqlite3.Error as err:
            self._forget()
            raise StoreError(
                f"store {self._path}: {err}; nothing of this was stored, agents will send it again"
            ) from err
        except BaseException:
            self._forget()
            raise
        self._bound_caches()
        return outcomes

    def _lock(self) -> int:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock_fd = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise StoreError(f"store {self._path}: {err.strerror}; give a writable place with --store") from err
        try:
            # flock, not SQLite's own locks: those must let `kon-receiver query` in while we run.
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            os.close(lock_fd)
            raise StoreError(
                f"store {self._path} is in use by another receiver; stop it or give another --store"
            ) from err
        return lock_fd

    def _open(self) -> sqlite3.Connection:
        db = None
        try:
            db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            self._prepare(db)
        except (sqlite3.Error, StoreError) as err:
            if db is not None:
                db.close()
            if isinstance(err, StoreError):
                raise
            what = f"store {self._path} cannot be opened: {err}"
            raise StoreError(f"{what}; move the file away to start a new one, or give another --store") from err
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        (application_id,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables and (application_id, version) == (APPLICATION_ID, 1):
            db.executescript(f"BEGIN IMMEDIATE; {_FROM_1} PRAGMA user_version = 2; COMMIT;")
            version = 2
        if tables and (application_id, version) != (APPLICATION_ID, SCHEMA_VERSION):
            what = f"{self._path} is no store of this version (id {application_id:#x}, schema {version})"
            raise StoreError(f"{what}; give another --store")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # in WAL mode anything less may lose the last commits at a power cut
        db.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
        if not tables:
            marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {marks} COMMIT;")

    def _forget(self) -> None:
        self._streams.clear()
        self._series.clear()
        if self._db is not None:
            self._db.close()  # rolls back what is open
            self._db = None

    def _bound_caches(self) -> None:
        if len(self._streams) > MAX_CACHED_STREAMS:
            self._streams.clear()
        if len(self._series) > MAX_CACHED_SERIES:
            self._series.clear()

    def _enter(self, db: sqlite3.Connection, batch: Batch) -> Outcome:
        stored = 0
        for segment in batch.segments:
            stream = self._stream(db, batch.agent_id, segment.plugin, segment.epoch)
            new = stream.ledger.store(segment.first_seq, segment.first_seq + len(segment.metrics) - 1)
            rows = self._rows(db, stream.id, segment, new)
            db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            stored += count_of(new)
        for loss in (*batch.losses, *batch.rejections):
            stream = self._stream(db, batch.agent_id, loss.plugin, loss.epoch)
            stream.ledger.lose(loss.first_seq, loss.first_seq + loss.count - 1, loss.reason)
        return Outcome(stored=stored, duplicates=batch.records - stored)

    def _rows(self, db: sqlite3.Connection, stream_id: int, segment: Segment, new: list[Range]) -> list[_Row]:
        rows: list[_Row] = []
        for first, last in new:
            start = first - segment.first_seq
            for seq, metric in enumerate(segment.metrics[start : start + last - first + 1], first):
                series_id = self._series_id(db, metric)
                payload, unsynced = metric.payload or None, int(metric.clock_unsynced)
                rows.append((stream_id, seq, metric.timestamp, series_id, metric.value, payload, unsynced))
        return rows

    def _stream(self, db: sqlite3.Connection, agent: str, plugin: str, epoch: int) -> _Stream:
        key = (agent, plugin, epoch)
        if (known := self._streams.get(key)) is not None:
            return known
        identity = (agent, plugin, signed(epoch))
        db.execute("INSERT OR IGNORE INTO streams (agent, plugin, epoch) VALUES (?, ?, ?)", identity)
        stream_id, duplicates = db.execute(
            "SELECT id, duplicates_refused FROM streams WHERE agent = ? AND plugin = ? AND epoch = ?",
            identity,
        ).fetchone()
        stream = self._streams[key] = _Stream(stream_id, load_ledger(db, stream_id, duplicates))
        return stream

    def _series_id(self, db: sqlite3.Connection, metric: pb.Metric) -> int:
        labels = tuple(sorted(metric.labels.items()))
        key = (metric.name, int(metric.type), labels)
        if (known := self._series.get(key)) is not None:
            return known
        row = (metric.name, msgspec.json.encode(dict(labels)).decode(), int(metric.type))
        db.execute("INSERT OR IGNORE INTO series (name, labels, type) VALUES (?, ?, ?)", row)
        found = db.execute("SELECT id FROM series WHERE name = ? AND labels = ? AND type = ?", row).fetchone()
        series_id = self._series[key] = int(found[0])
        return series_id

    def _persist_ledgers(self, db: sqlite3.Connection, batches: Sequence[Batch]) -> None:
        touched: set[tuple[str, str, int]] = set()
        for batch in batches:
            touched |= {(batch.agent_id, each.plugin, each.epoch) for each in batch.segments}
            touched |= {(batch.agent_id, each.plugin, each.epoch) for each in batch.losses}
            touched |= {(batch.agent_id, each.plugin, each.epoch) for each in batch.rejections}
        for key in touched:
            self._persist_ledger(db, self._streams[key])

    def _persist_ledger(self, db: sqlite3.Connection, stream: _Stream) -> None:
        ledger = stream.ledger
        for state, ranges in ((STORED, ledger.stored), *ledger.lost.items()):
            changes = ranges.take_changes()
            gone = [(stream.id, state, first) for first, last in changes.items() if last is None]
            kept = [(stream.id, state, first, last) for first, last in changes.items() if last is not None]
            db.executemany("DELETE FROM ranges WHERE stream = ? AND state = ? AND first = ?", gone)
            db.executemany("INSERT OR REPLACE INTO ranges VALUES (?, ?, ?, ?)", kept)
        db.execute(
            "UPDATE streams SET duplicates_refused = ?1 WHERE id = ?2 AND duplicates_refused <> ?1",
            (ledger.duplicates_refused, stream.id),
        )


def load_ledger(db: sqlite3.Connection, stream_id: int, duplicates_refused: int) -> EpochLedger:
    """Return what `db` knows of one stream."""
    stored: list[Range] = []
    lost: dict[int, list[Range]] = {}
    for state, first, last in db.execute("SELECT state, first, last FROM ranges WHERE stream = ?", (stream_id,)):
        (stored if state == STORED else lost.setdefault(state, [])).append((first, last))
    return EpochLedger(stored, lost, duplicates_refused)
