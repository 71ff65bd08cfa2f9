"""Reading a store: what is in it, while a receiver writes it or not. Never writes.

WAL gives each query one consistent view and never makes the writer wait.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from kon_agent.errors import StoreError
from kon_agent.receiver.store import APPLICATION_ID, SCHEMA_VERSION, load_ledger
from kon_agent.wire import kon_agent_pb2 as pb


class StoredRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One stored record.

    Attributes:
        epoch: 16 hexadecimal digits.
        value: NaN where the metric's was.
        clock_unsynced: the agent's clock had not been set since its machine started: `ts_ns` may be years off.
    """

    agent: str
    plugin: str
    epoch: str
    seq: int
    ts_ns: int
    name: str
    value: float
    labels: dict[str, str]
    clock_unsynced: bool = False


class LedgerRow(msgspec.Struct, frozen=True):
    """What has become of one epoch's sequence numbers.

    Attributes:
        ranges: first and last of each run stored.
        missing: numbers below the highest heard of that are neither stored nor declared lost.
        declared_lost: numbers the agent gave up, by reason.
    """

    agent: str
    plugin: str
    epoch: str
    stored: int
    ranges: list[tuple[int, int]]
    missing: int
    declared_lost: dict[str, int]
    duplicates_refused: int


class Filter(msgspec.Struct, frozen=True):
    """Which records to read; None lets all pass, `limit` 0 too, otherwise the newest `limit` pass."""

    agent: str | None = None
    plugin: str | None = None
    name: str | None = None
    since_ns: int | None = None
    limit: int = 0


def read_records(path: Path, where: Filter) -> Iterator[StoredRecord]:
    """Yield the records that pass `where`, oldest first.

    Raises:
        StoreError: there is no readable store at `path`.
    """
    columns = {"streams.agent": where.agent, "plugin": where.plugin, "name": where.name}
    conditions = [f"{column} = ?" for column, value in columns.items() if value is not None]
    values: list[str | int] = [value for value in columns.values() if value is not None]
    if where.since_ns is not None:
        conditions.append("ts_ns >= ?")
        values.append(where.since_ns)
    # The only text put together here is our own; what the user gave is bound.
    select = f"""
        SELECT agent, plugin, epoch, seq, ts_ns, name, value, labels, clock_unsynced
        FROM records JOIN streams ON streams.id = records.stream JOIN series ON series.id = records.series
        WHERE {" AND ".join(conditions) or "true"}"""  # noqa: S608
    if where.limit:
        select = f"SELECT * FROM ({select} ORDER BY ts_ns DESC, seq DESC LIMIT ?)"  # noqa: S608
        values.append(where.limit)
    with _opened(path) as db:
        for agent, plugin, epoch, seq, ts_ns, name, value, labels, unsynced in db.execute(
            f"{select} ORDER BY ts_ns, agent, plugin, seq", values
        ):
            number = math.nan if value is None else value
            text = msgspec.json.decode(labels, type=dict[str, str])
            yield StoredRecord(agent, plugin, epoch_text(epoch), seq, ts_ns, name, number, text, bool(unsynced))


def read_ledger(path: Path) -> list[LedgerRow]:
    """Return one row per agent, plugin and epoch, in that order, older epochs first.

    Raises:
        StoreError: there is no readable store at `path`.
    """
    rows: list[LedgerRow] = []
    with _opened(path) as db:
        db.execute("BEGIN")  # one view for all the queries below
        streams = db.execute(
            "SELECT id, agent, plugin, epoch, duplicates_refused FROM streams ORDER BY agent, plugin, id"
        ).fetchall()
        for stream_id, agent, plugin, epoch, duplicates in streams:
            ledger = load_ledger(db, stream_id, duplicates)
            lost = {pb.LossReason.Name(reason).lower(): ranges.count for reason, ranges in ledger.lost.items()}
            ranges = list(ledger.stored)
            rows.append(
                LedgerRow(
                    agent=agent,
                    plugin=plugin,
                    epoch=epoch_text(epoch),
                    stored=ledger.stored.count,
                    ranges=ranges,
                    missing=ledger.missing,
                    declared_lost={reason: count for reason, count in lost.items() if count},
                    duplicates_refused=duplicates,
                )
            )
    return rows


def epoch_text(epoch: int) -> str:
    """Return an epoch, signed or not, as 16 hexadecimal digits."""
    return f"{epoch % 2**64:016x}"


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    if not path.exists():
        raise StoreError(f"there is no store at {path}; start `kon-receiver run` or name another with --store")
    try:
        with closing(_connect(path)) as db:
            yield db
    except sqlite3.Error as err:
        raise StoreError(f"store {path} cannot be read: {err}; is it a receiver's, and yours to read?") from err


def _connect(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    db = sqlite3.connect(uri, uri=True)
    try:
        _check(db, path)
    except sqlite3.OperationalError:
        db.close()
        if Path(f"{path}-wal").exists():
            raise
        # No journal: no receiver has it open. SQLite wants to make one all the same, and here we may not.
        db = sqlite3.connect(f"{uri}&immutable=1", uri=True)
        _check(db, path)
    return db


def _check(db: sqlite3.Connection, path: Path) -> None:
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if (application_id, version) != (APPLICATION_ID, SCHEMA_VERSION):
        raise StoreError(f"{path} is no store of this version (id {application_id:#x}, schema {version})")
