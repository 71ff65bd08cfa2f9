"""The committer: hands batches to the store in a thread of its own, as many at a time as have come in
meanwhile.

One commit runs while the next one's batches gather (group commit): under load one disk flush serves many
batches, and a lone batch waits for nothing. The event loop keeps answering QUIC while the disk works.

Invariants:
* Batches are committed in the order they were submitted, and reported in that order, in the event loop.
* The store is touched by one thread at a time.
* A batch the store refuses is reported as failed and the next ones are tried; any other exception is a bug,
  ends the committing and comes out of `crashed`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kon_agent.errors import StoreError
from kon_agent.receiver.batch import Batch, Outcome
from kon_agent.receiver.store import Store

MAX_GROUP_RECORDS = 20_000  # in one transaction: about 0.2 s, so that no acknowledgement waits long
MAX_WAITING_BYTES = 32 * 1024 * 1024  # of all connections; beyond it nothing more is read from the network

log = logging.getLogger(__name__)

Done = Callable[[Outcome | StoreError], None]
"""Told what became of a batch, once it is durable or has failed."""


class Committer:
    """Commits batches in groups.

    Attributes:
        on_room: called when batches may come again after `is_full` was True.
        crashed: ends with the exception that ended the committing.
    """

    def __init__(self, store: Store) -> None:
        self.on_room: Callable[[], None] = lambda: None
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "store")
        self._waiting: deque[tuple[Batch, Done]] = deque()
        self._waiting_bytes = 0
        self._commit: asyncio.Task[None] | None = None
        self._is_failing = False
        self.crashed: asyncio.Future[None] = self._loop.create_future()

    @property
    def is_full(self) -> bool:
        """Whether no more should be submitted for now."""
        return self._waiting_bytes > MAX_WAITING_BYTES

    def submit(self, batch: Batch, done: Done) -> None:
        """Queue `batch`; `done` hears of it later, never from within this call."""
        self._waiting.append((batch, done))
        self._waiting_bytes += batch.size_bytes
        if self._commit is None:
            self._commit = self._loop.create_task(self._run())

    async def close(self) -> None:
        """Commit what has been submitted, then end the thread."""
        while self._commit is not None:
            await self._commit
        self._thread.shutdown()

    async def _run(self) -> None:
        try:
            await self._commit_all()
        except Exception as err:  # the process body raises it again
            if not self.crashed.done():
                self.crashed.set_exception(err)
        finally:
            self._commit = None

    async def _commit_all(self) -> None:
        while self._waiting:
            group = self._take_group()
            result: list[Outcome] | StoreError
            try:
                result = await self._loop.run_in_executor(
                    self._thread, self._store.commit, [batch for batch, _ in group]
                )
            except StoreError as err:
                result = err
            self._note(result)
            for at, (_, done) in enumerate(group):
                done(result if isinstance(result, StoreError) else result[at])
            was_full = self.is_full
            self._waiting_bytes -= sum(batch.size_bytes for batch, _ in group)
            if was_full and not self.is_full:
                self.on_room()

    def _take_group(self) -> list[tuple[Batch, Done]]:
        group = [self._waiting.popleft()]
        records = group[0][0].records
        while self._waiting and (records := records + self._waiting[0][0].records) <= MAX_GROUP_RECORDS:
            group.append(self._waiting.popleft())
        return group

    def _note(self, result: list[Outcome] | StoreError) -> None:
        is_failing = isinstance(result, StoreError)
        if is_failing and not self._is_failing:
            log.error("%s", result)
        elif self._is_failing and not is_failing:
            log.warning("the store works again")
        self._is_failing = is_failing
