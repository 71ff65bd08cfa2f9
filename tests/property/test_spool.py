"""The spool against plain books, under any order of storing, reading, acknowledging, losing the connection and dying.

Each record ever confirmed is, at every instant, acknowledged, declared lost, or pending; in one life one of these only.
"""

from __future__ import annotations

import errno

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kon_agent.spool.frame import Entry
from kon_agent.spool.limits import MIN_BYTES, Limits
from tests.support.faulty_disk import Crash, Fault, FaultyDisk
from tests.support.spooling import Books

PLUGINS = ("cpu", "disk")
MAX_AGE_S = 100.0
SIZES = st.sampled_from((1, 60, 700, 9_000, 60_000))  # the last fills a segment by itself


class SpoolMachine(RuleBasedStateMachine):
    """One folder with a small quota, and every spool ever opened on it."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = FaultyDisk(MIN_BYTES)
        self.books = Books(self.disk, Limits(MIN_BYTES, MAX_AGE_S, 0))
        self.next_seq = dict.fromkeys(PLUGINS, 0)
        self.epoch = 1
        self.now_s = self.disk.now_s = 1000.0
        self.position = (0, 0)

    @initialize()
    def begin(self) -> None:
        self.books.open(self.now_s)

    def entries(self, plugin: str, sizes: list[int], gap: int) -> list[Entry]:
        first = self.next_seq[plugin]
        made = [
            Entry(plugin, self.epoch, first + at, (f"{plugin}{self.epoch}:{first + at} ".encode() * size)[:size])
            for at, size in enumerate(sizes)
        ]
        self.next_seq[plugin] += len(sizes)
        if gap:
            made.append(Entry(plugin, self.epoch, self.next_seq[plugin], count=gap, reason=1))
            self.next_seq[plugin] += gap
        return made

    @rule(
        plugin=st.sampled_from(PLUGINS),
        sizes=st.lists(SIZES, min_size=1, max_size=12),
        gap=st.sampled_from((0, 0, 0, 1, 5)),
    )
    def store(self, plugin: str, sizes: list[int], gap: int) -> None:
        self.books.store(self.entries(plugin, sizes, gap), self.now_s)

    @rule(
        number=st.sampled_from((errno.EIO, errno.ENOSPC)), after=st.integers(0, 8), torn=st.sampled_from((0, 0, 1, 500))
    )
    def store_with_a_fault(self, number: int, after: int, torn: int) -> None:
        self.disk.faults[self.disk.operations + after] = Fault(number, torn=torn)
        self.books.store(self.entries("cpu", [700] * 30, 0), self.now_s)
        self.disk.faults.clear()

    @rule(max_records=st.integers(1, 40), max_bytes=st.sampled_from((1, 1000, 65536)))
    def read(self, max_records: int, max_bytes: int) -> None:
        if len(self.books.in_flight) < 8:
            self.books.read(max_records, max_bytes)

    @precondition(lambda self: self.books.in_flight)
    @rule(count=st.integers(1, 8))
    def acknowledge(self, count: int) -> None:
        for _ in range(min(count, len(self.books.in_flight))):
            chunk = self.books.in_flight[0]
            self.books.acknowledge()
            self.position = chunk.number, chunk.end

    @rule()
    def lose_connection(self) -> None:
        self.books.rewind()

    @rule(seconds=st.sampled_from((1.0, 30.0, 60.0, 90.0, -50.0)))
    def let_time_pass(self, seconds: float) -> None:
        self.now_s += seconds
        self.disk.now_s = self.now_s

    @rule()
    def begin_an_epoch(self) -> None:
        self.epoch += 1
        self.next_seq = dict.fromkeys(PLUGINS, 0)

    @rule()
    def restart(self) -> None:
        self.books.spool.close()
        self.disk.kill()
        self.reopen()

    @rule()
    def kill(self) -> None:
        self.disk.kill()
        self.reopen()

    @rule(
        after=st.integers(0, 12),
        torn=st.sampled_from((0, 1, 100, 5000)),
        is_late=st.booleans(),
        keep=st.integers(0, 9000),
    )
    def crash_while_storing(self, after: int, torn: int, is_late: bool, keep: int) -> None:
        self.disk.faults[self.disk.operations + after] = Fault(0, is_late, torn)
        try:
            self.books.store(self.entries("disk", [9_000] * 5, 1), self.now_s)
        except Crash:
            self.books.has_crashed = True
            self.books.refused.clear()  # its caller is gone as well
            self.disk.cut_power(lambda tail: tail[:keep])
            self.disk.faults.clear()
            self.position = (0, 0)  # it is in memory
            self.reopen()
        self.disk.faults.clear()

    def reopen(self) -> None:
        self.books.open(self.now_s)
        self.books.spool.resume(*self.position)

    @invariant()
    def quota(self) -> None:
        assert self.disk.du() <= MIN_BYTES

    @invariant()
    def nothing_is_forgotten(self) -> None:
        settled = len(self.books.stored & (self.books.acked | set(self.books.lost)))
        assert len(self.books.stored) - settled <= self.books.spool.pending.total() + self.uncounted()

    def uncounted(self) -> int:
        """How many records are lost already, their losses waiting to be acknowledged."""
        return sum(self.books.spool.dropped.values()) + sum(self.earlier_drops)

    @property
    def earlier_drops(self) -> list[int]:
        return self.books.earlier_drops

    def teardown(self) -> None:
        """Nothing confirmed is missing: what was not acknowledged is still delivered, or declared lost."""
        self.disk.faults.clear()
        self.books.refused.clear()
        self.books.drain()
        self.books.close_books()


SpoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSpool = SpoolMachine.TestCase
