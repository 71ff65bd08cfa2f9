"""The committer: order, groups, back-pressure and failures, without a disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest

from kon_agent.errors import StoreError
from kon_agent.receiver.batch import Batch, Outcome
from kon_agent.receiver.committer import MAX_GROUP_RECORDS, MAX_WAITING_BYTES, Committer
from kon_agent.receiver.store import Store
from tests.unit.receiver.conversation import stored


class FakeStore:
    """Keeps the groups it is given; commits only while `gate` is open."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gate = threading.Event()
        self.error: Exception | None = None

    def commit(self, batches: Sequence[Batch]) -> list[Outcome]:
        assert self.gate.wait(10)
        self.groups.append([batch.batch_id for batch in batches])
        if self.error is not None:
            raise self.error
        return [Outcome(batch.batch_id, 0) for batch in batches]


def numbered(batch_id: int, size_bytes: int = 10, records: int = 1) -> Batch:
    batch = stored(0, records)
    return Batch("edge-1", batch_id, batch.segments, [], [], size_bytes, 0.0)


def run(scenario: Any) -> None:
    async def main() -> None:
        store = FakeStore()
        await scenario(store, Committer(cast(Store, store)))

    asyncio.run(main())


def test_what_gathers_meanwhile_is_one_group() -> None:
    """While one commit runs, the next batches gather; all are reported, in the order submitted."""

    async def scenario(store: FakeStore, committer: Committer) -> None:
        reports: list[Any] = []
        committer.submit(numbered(1), reports.append)
        await asyncio.sleep(0)  # let the first commit begin
        for batch_id in (2, 3, 4):
            committer.submit(numbered(batch_id), reports.append)
        store.gate.set()
        await committer.close()
        assert [[1], [2, 3, 4]] == store.groups
        assert [1, 2, 3, 4] == [report.stored for report in reports]

    run(scenario)


def test_a_group_is_bounded() -> None:
    """A transaction takes no more records than its limit, but always one batch."""

    async def scenario(store: FakeStore, committer: Committer) -> None:
        store.gate.set()
        for batch_id, records in enumerate((MAX_GROUP_RECORDS + 1, MAX_GROUP_RECORDS - 1, 1, 1)):
            committer.submit(numbered(batch_id, records=records), lambda report: None)
        await committer.close()
        assert [[0], [1, 2], [3]] == store.groups

    run(scenario)


def test_fullness_is_announced_and_relieved() -> None:
    """Beyond the limit it is full; when the store has caught up, `on_room` is called."""

    async def scenario(store: FakeStore, committer: Committer) -> None:
        room: list[bool] = []
        committer.on_room = lambda: room.append(committer.is_full)
        committer.submit(numbered(1, MAX_WAITING_BYTES), lambda report: None)
        assert not committer.is_full
        committer.submit(numbered(2, 1), lambda report: None)
        assert committer.is_full
        store.gate.set()
        await committer.close()
        assert [False] == room

    run(scenario)


def test_a_failed_group_is_reported_and_the_next_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    """Each batch of a failed group hears why; the failure is logged once, and so is the recovery."""

    async def scenario(store: FakeStore, committer: Committer) -> None:
        reports: list[Any] = []
        store.gate.set()
        store.error = StoreError("disk is full")
        for batch_id in (1, 2):
            committer.submit(numbered(batch_id), reports.append)
        await committer.close()
        assert [store.error] * 2 == reports

    run(scenario)
    assert ["disk is full"] == [record.getMessage() for record in caplog.records]


def test_a_bug_comes_out() -> None:
    """Any other exception ends the committing and is there for the process to end with."""

    async def scenario(store: FakeStore, committer: Committer) -> None:
        store.gate.set()
        store.error = ZeroDivisionError()
        committer.submit(numbered(1), lambda report: None)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(committer.crashed, 10)
        await committer.close()

    run(scenario)
