"""The spool on a disk that fails: every operation in turn, in every way, and the process killed or the power cut there.

One script touches everything a spool does; it is run once for each operation it consists of. Whatever happens, opening
succeeds, nothing confirmed goes missing, nothing wrong is delivered, the counts are exact and the quota is kept.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from kon_agent.spool.frame import Entry
from kon_agent.spool.limits import MIN_BYTES, Limits
from tests.support.faulty_disk import Crash, Fault, FaultyDisk
from tests.support.spooling import Books

QUOTA = MIN_BYTES
LIMITS = Limits(QUOTA, max_age_s=1000, min_free_bytes=0)
PLUGINS = ("cpu", "disk")


def batch(turn: int, size: int = 7000) -> list[Entry]:
    """Return two records of each plugin, and now and then a loss."""
    entries = [
        Entry(plugin, 1, 3 * turn + at, bytes([turn % 256, at]) * (size // 2)) for plugin in PLUGINS for at in (0, 1)
    ]
    if turn % 3 == 0:
        entries.append(Entry("cpu", 1, 3 * turn + 2, count=1, reason=1))
    return entries


def script(books: Books) -> None:
    """Store, read, acknowledge, rewind, overflow, expire, close, reopen, and store again."""
    disk = books.disk
    assert isinstance(disk, FaultyDisk)
    for turn in range(4):
        books.store(batch(turn), 10.0)
    for _ in range(3):
        books.read(3)
    if books.in_flight:
        books.acknowledge()
    books.rewind()
    for turn in range(4, 18):
        disk.now_s = 10.0 + turn
        books.store(batch(turn), 10.0 + turn)
    books.read(2)
    books.read(3)
    books.store(batch(18), 40.0)
    if books.in_flight:
        books.acknowledge()
    books.store([entry for turn in range(19, 23) for entry in batch(turn)], 50.0)  # more than a segment takes
    books.rewind()
    books.store(batch(23), 1020.0)  # the oldest expire
    books.store(batch(24), 1021.0)
    books.spool.close()


def reopened(books: Books, now_s: float = 1030.0) -> None:
    """Begin a second life on a disk that works."""
    disk = books.disk
    assert isinstance(disk, FaultyDisk)
    disk.faults.clear()
    books.refused.clear()
    books.open(now_s)
    books.store(batch(30), now_s)
    books.drain()
    books.close_books()
    assert [name for name in disk.files if name != "state"] == []


def operations() -> list[str]:
    """Return the kinds of operation the script consists of."""
    disk = FaultyDisk()
    books = Books(disk, LIMITS)
    books.open(10.0)
    script(books)
    return disk.kinds


COUNT = len(operations())
WRITES = [at for at, kind in enumerate(operations()) if kind == "write"]


def run(at: int, fault: Fault) -> Books:
    """Run the script with one fault."""
    disk = FaultyDisk(QUOTA)
    disk.faults[at] = fault
    books = Books(disk, LIMITS)
    try:
        books.open(10.0)
    except OSError:
        assert at == 0, "only an unreadable folder is a reason not to open"
        books.lives = 0
        books.open(10.0)
    script(books)
    return books


def test_the_script_covers_every_kind_of_operation() -> None:
    """What the other tests fail one by one is all there is."""
    kinds = set(operations())
    assert {"names", "create", "write", "sync", "read", "close", "unlink", "free"} <= kinds
    assert 100 < COUNT


def test_without_a_fault_everything_adds_up() -> None:
    """The quota evicts, the age limit expires, and every record is accounted for."""
    books = run(10**9, Fault())
    assert {2, 6} == {reason for _, reason in books.spool.dropped}
    assert not books.refused
    reopened(books)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("is_late", [False, True])
def test_any_operation_may_fail(number: int, is_late: bool) -> None:
    """An operation that fails, before or after it has taken effect, costs nothing that was confirmed."""
    for at in range(COUNT):
        books = run(at, Fault(number, is_late))
        reopened(books)


def test_in_the_same_life_a_fault_leaves_the_counts_exact() -> None:
    """Without a second life each record is delivered once, and the losses declared are the losses counted."""
    for at in range(COUNT):
        books = run(at, Fault(errno.EIO))
        books.drain()
        books.close_books()


@pytest.mark.parametrize("torn", [1, 8, 43, 44, 100, 4096, 12000])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_any_write_may_be_torn(torn: int, number: int) -> None:
    """What part of a write got through makes no difference."""
    for at in WRITES:
        books = run(at, Fault(number, torn=torn))
        reopened(books)


def crash(at: int, fault: Fault, fate: Callable[[FaultyDisk], None]) -> None:
    """Run the script until it crashes, do to the disk what `fate` does, and go on."""
    disk = FaultyDisk(QUOTA)
    disk.faults[at] = fault
    books = Books(disk, LIMITS)
    try:
        books.open(10.0)
        script(books)
    except Crash:
        books.has_crashed = True
        fate(disk)
    reopened(books)


def holes(tail: bytes) -> bytes:
    """Return `tail` as a power cut may leave it: every other block is zeros."""
    return b"".join(
        bytes(len(tail[at : at + 4096])) if at // 4096 % 2 else tail[at : at + 4096] for at in range(0, len(tail), 4096)
    )


FATES: dict[str, Callable[[FaultyDisk], None]] = {
    "killed": lambda disk: disk.kill(),
    "power cut, nothing more is there": lambda disk: disk.cut_power(),
    "power cut, all is there": lambda disk: disk.cut_power(lambda tail: tail),
    "power cut, half is there": lambda disk: disk.cut_power(lambda tail: tail[: len(tail) // 2]),
    "power cut, there are holes": lambda disk: disk.cut_power(holes),
    "power cut, zeros are there": lambda disk: disk.cut_power(lambda tail: bytes(len(tail))),
}


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("is_late", [False, True])
def test_the_end_may_come_at_any_operation(fate: str, is_late: bool) -> None:
    """Killed or without power before or after any operation, the next start finds all that was confirmed."""
    for at in range(COUNT):
        crash(at, Fault(0, is_late), FATES[fate])


@pytest.mark.parametrize("torn", [1, 50, 5000])
@pytest.mark.parametrize("fate", FATES)
def test_the_end_may_come_within_any_write(fate: str, torn: int) -> None:
    """A write cut short by the end is no different."""
    for at in WRITES:
        crash(at, Fault(0, torn=torn), FATES[fate])


def test_a_torn_write_of_any_length_costs_nothing() -> None:
    """Whatever the length at which a write is torn, the entries before it are delivered and it is repeated."""
    first, second = [Entry("cpu", 1, 0, b"first")], [Entry("cpu", 1, 1, b"second" * 10), Entry("disk", 2, 0, b"x")]
    for torn in range(1, 300):
        for number in (errno.EIO, errno.ENOSPC, 0):
            disk = FaultyDisk(QUOTA)
            books = Books(disk, LIMITS)
            books.open()
            books.store(first)
            disk.faults[disk.operations + 1] = Fault(number, torn=torn)  # the one after `free`
            try:
                books.store(second)
            except Crash:
                books.has_crashed = True
                disk.kill()
                books.open()
            assert disk.kinds[min(disk.faults)] == "write"
            books.drain()
            books.close_books()
            assert ("cpu", 1, 0) in books.acked


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("kind", ["create", "write", "sync", "unlink", "truncate"])
def test_a_disk_that_does_not_work_for_a_while(kind: str, number: int) -> None:
    """Nothing is stored meanwhile or nothing is lost, and the spool resumes by itself."""
    disk = FaultyDisk(QUOTA)
    books = Books(disk, LIMITS)
    books.open()
    for turn in range(3):
        assert books.store(batch(turn))
    disk.broken = {kind: number}
    for turn in range(3, 6):
        is_stored = books.store(batch(turn))
        assert is_stored is {"write": False, "sync": False}.get(kind, is_stored)
    disk.broken = {}
    assert books.store(batch(6))
    books.drain()
    books.close_books()
    assert books.acked == books.stored
    books.spool.store([], 0)
    assert [] == list(disk.files)
