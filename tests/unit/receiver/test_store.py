"""The store: records and ledger change together or not at all, and survive being opened again."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kon_agent.errors import StoreError
from kon_agent.receiver.batch import Loss, Outcome
from kon_agent.receiver.reader import Filter, read_ledger, read_records
from kon_agent.receiver.store import Store
from kon_agent.wire import kon_agent_pb2 as pb
from tests.unit.receiver.conversation import EPOCH, stored


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path)
    yield store
    store.close()


def lost(first: int, count: int, reason: int = pb.RING_FULL) -> Loss:
    return Loss("cpu", EPOCH, first, count, reason)


def seqs(path: Path) -> list[int]:
    return [record.seq for record in read_records(path, Filter())]


def test_a_record_comes_back_as_it_went_in(store: Store, path: Path) -> None:
    """Identity, time, name, value and labels survive; NaN and a negative time too."""
    store.commit([stored(3, 1, labels={"b": "2", "a": "1"}, timestamp=-5, value=math.nan)])
    [record] = read_records(path, Filter())
    assert ("edge-1", "cpu", f"{EPOCH:016x}", 3, -5) == msgspec.structs.astuple(record)[:5]
    assert ("load", {"a": "1", "b": "2"}) == (record.name, record.labels)
    assert math.isnan(record.value)


def test_one_commit_takes_several_batches(store: Store, path: Path) -> None:
    """Batches of one commit are answered one by one, a duplicate among them included."""
    outcomes = store.commit([stored(0, 3), stored(2, 3), stored(0, 2, plugin="memory")])
    assert [Outcome(3, 0), Outcome(2, 1), Outcome(2, 0)] == outcomes
    assert {("cpu", 5, 1), ("memory", 2, 0)} == {
        (row.plugin, row.stored, row.duplicates_refused) for row in read_ledger(path)
    }


def test_the_ledger_survives(path: Path) -> None:
    """A store opened again knows ranges, losses and duplicates, and refuses what it has."""
    store = Store(path)
    store.commit([stored(0, 3, losses=[lost(3, 2), lost(10, 1, pb.EXPIRED)]), stored(0, 1), stored(7, 1)])
    before = read_ledger(path)
    store.close()
    store = Store(path)
    assert before == read_ledger(path)
    assert [Outcome(3, 1)] == store.commit([stored(2, 4)])
    store.close()
    [row] = read_ledger(path)
    assert [(0, 5), (7, 7)] == row.ranges
    assert ({"expired": 1}, 3, 2) == (row.declared_lost, row.missing, row.duplicates_refused)


def test_a_failed_commit_leaves_nothing(store: Store, path: Path) -> None:
    """After a failure neither records nor ledger have changed, on disk or in memory, and the next commit works."""
    store.commit([stored(0, 2)])
    with sqlite3.connect(path) as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON records BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    with pytest.raises(StoreError, match="disk is full"):
        store.commit([stored(2, 2)])
    assert [0, 1] == seqs(path)
    with sqlite3.connect(path) as db:
        db.execute("DROP TRIGGER full")
    assert [Outcome(2, 2)] == store.commit([stored(0, 4)])
    assert [0, 1, 2, 3] == seqs(path)


def test_a_locked_store_is_an_error_and_recovers(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While someone else holds the file's lock a commit fails; afterwards it succeeds."""
    monkeypatch.setattr("kon_agent.receiver.store.BUSY_TIMEOUT_S", 0.0)
    store._forget()  # so that the next commit opens it with that timeout
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        store.commit([stored(0, 1)])
    other.execute("ROLLBACK")
    other.close()
    assert [Outcome(1, 0)] == store.commit([stored(0, 1)])


def test_two_writers_are_one_too_many(store: Store, path: Path) -> None:
    """A second writer is told; once the first has closed, it may."""
    with pytest.raises(StoreError, match="in use by another receiver"):
        Store(path)
    store.commit([stored(0, 1)])


def test_a_foreign_file_is_left_alone(path: Path) -> None:
    """What is no store of ours, SQLite or not, is neither read nor written."""
    path.parent.mkdir()
    path.write_bytes(b"not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(path)
    with pytest.raises(StoreError, match="cannot be read"):
        list(read_records(path, Filter()))
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE other (x)")
    with pytest.raises(StoreError, match="no store of this version"):
        Store(path)


def test_reading_needs_a_store(path: Path) -> None:
    """Asking an absent store says where it was looked for."""
    with pytest.raises(StoreError, match="there is no store at"):
        read_ledger(path)


def test_records_are_chosen(store: Store, path: Path) -> None:
    """Each filter narrows, the limit keeps the newest, and the order is by time."""
    store.commit([stored(0, 5), stored(0, 2, plugin="memory", name="free")])
    assert ["cpu"] * 5 == [each.plugin for each in read_records(path, Filter(plugin="cpu"))]
    assert ["free"] * 2 == [each.name for each in read_records(path, Filter(agent="edge-1", name="free"))]
    assert [] == list(read_records(path, Filter(agent="edge-2")))
    assert [102, 103, 104] == [each.ts_ns for each in read_records(path, Filter(since_ns=102))]
    assert [103, 104] == [each.ts_ns for each in read_records(path, Filter(limit=2))]


def test_a_value_cannot_be_sql(store: Store, path: Path) -> None:
    """What a user asks for is a value, whatever it looks like."""
    store.commit([stored(0, 1)])
    assert [] == list(read_records(path, Filter(name="' OR 1=1 --")))


def test_a_mark_on_the_time_is_kept(store: Store, path: Path) -> None:
    """A record made before its agent's clock was set says so when it is read."""
    store.commit([stored(0, 1, clock_unsynced=True), stored(1, 1)])
    assert [True, False] == [record.clock_unsynced for record in read_records(path, Filter())]


def test_a_store_of_the_first_schema_is_brought_up_to_date(path: Path) -> None:
    """A receiver that is updated keeps what it has stored and what it knows."""
    old = Store(path)
    old.commit([stored(0, 2)])
    old.close()
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE records DROP COLUMN clock_unsynced")
        db.execute("PRAGMA user_version = 1")
    db.close()
    new = Store(path)
    assert [Outcome(1, 1)] == new.commit([stored(1, 2)])
    new.close()
    assert [0, 1, 2] == seqs(path)
