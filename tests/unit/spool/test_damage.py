"""A small spool, closed in order, damaged in every way one change can: only what was hit is lost, and declared so."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest

from kon_agent.spool.frame import HEAD_BYTES, Entry, Kind, scan
from kon_agent.spool.limits import MIN_BYTES, Limits
from kon_agent.spool.log import Reason, Spool
from kon_agent.spool.segment import name_of
from kon_agent.spool.survey import STATE
from tests.support.faulty_disk import FaultyDisk
from tests.support.spooling import Identity, identity, members

LIMITS = Limits(MIN_BYTES, max_age_s=1e6, min_free_bytes=0)
KNOWN_LOSS = Entry("disk", 9, 100, count=7, reason=1)


def payload(plugin: str, seq: int) -> bytes:
    """Return a record's bytes, none like another's."""
    return f"{plugin} {seq} ".encode() * (1 + seq % 3)


def make() -> FaultyDisk:
    """Return the disk of a spool with three segments, two plugins' records and a loss in the middle one."""
    disk = FaultyDisk()
    spool = Spool(disk, LIMITS)
    spool.open(0)
    for turn in range(3):
        entries = [
            Entry(plugin, 9, 2 * turn + at, payload(plugin, 2 * turn + at))
            for plugin in ("cpu", "disk")
            for at in (0, 1)
        ]
        spool.store(entries + [KNOWN_LOSS] * (turn == 1), 0)
        while spool.read(100, 10_000) is not None:
            pass  # reading all there is ends the segment that is being written
        spool.rewind()
    spool.close()
    disk.kill()
    return disk


SPOOL = make()
SEGMENTS = sorted(name for name in SPOOL.files if name != STATE)
RECORDS = {
    identity(frame.entry): frame.entry.payload
    for name in SEGMENTS
    for frame in scan(bytes(SPOOL.files[name].data))
    if frame.kind is Kind.RECORD
}


def deliver(disk: FaultyDisk) -> tuple[dict[Identity, bytes], dict[Identity, int], Spool]:
    """Open and drain the spool; return what was delivered, and what declared lost for which reason."""
    spool = Spool(disk, LIMITS)
    spool.open(0)
    delivered: dict[Identity, bytes] = {}
    lost: dict[Identity, int] = {}
    while not spool.is_empty():
        chunk = spool.read(3, 1000)
        assert chunk is not None
        for entry in chunk.entries:
            if entry.is_loss:
                lost.update(dict.fromkeys(members(entry), entry.reason))
            else:
                assert identity(entry) not in delivered
                delivered[identity(entry)] = entry.payload
        spool.acknowledge(chunk)
    return delivered, lost, spool


def expect(disk: FaultyDisk, hit: set[Identity], case: str) -> None:
    """Exactly `hit` is lost, declared and counted; all else is delivered as it was."""
    delivered, lost, spool = deliver(disk)
    expected = dict.fromkeys(hit, int(Reason.CORRUPT)) | dict.fromkeys(members(KNOWN_LOSS), KNOWN_LOSS.reason)
    assert expected == lost, case
    assert {key: value for key, value in RECORDS.items() if key not in hit} == delivered, case
    assert len(hit) == sum(spool.dropped.values()), case
    assert not +spool.pending, case
    assert set(disk.files) <= {STATE}, case


def extents(name: str) -> Iterator[tuple[int, int, Identity]]:
    """Yield begin, end and identity of each record in a file; the padding behind it is not part of it."""
    for frame in scan(bytes(SPOOL.files[name].data)):
        if frame.kind is Kind.RECORD:
            entry = frame.entry
            yield frame.start, frame.start + HEAD_BYTES + len(entry.plugin) + len(entry.payload), identity(entry)


def test_undamaged_everything_is_delivered() -> None:
    """The spool the other tests damage is whole, and has what they say."""
    assert 3 == len(SEGMENTS)
    assert 12 == len(RECORDS)
    expect(copy.deepcopy(SPOOL), set(), "whole")


@pytest.mark.parametrize("name", [*SEGMENTS, STATE])
def test_a_bit_flip_in_every_byte(name: str) -> None:
    """A flipped bit costs the record it is in, or nothing."""
    for at in range(len(SPOOL.files[name].data)):
        for bit in (at % 8, (at + 3) % 8):
            disk = copy.deepcopy(SPOOL)
            disk.files[name].data[at] ^= 1 << bit
            hit = {record for begin, end, record in extents(name) if begin <= at < end}
            expect(disk, hit, f"{name}: bit {bit} of byte {at}")


@pytest.mark.parametrize("name", [*SEGMENTS, STATE])
def test_every_truncation_length(name: str) -> None:
    """A file cut short costs the records that are no longer all there."""
    for length in range(len(SPOOL.files[name].data)):
        disk = copy.deepcopy(SPOOL)
        del disk.files[name].data[length:]
        hit = {record for _, end, record in extents(name) if end > length}
        expect(disk, hit, f"{name}: {length} bytes")


@pytest.mark.parametrize("name", SEGMENTS[1:])
def test_a_file_that_has_vanished(name: str) -> None:
    """What it held is declared lost; only the oldest one's absence looks as if it had been delivered."""
    disk = copy.deepcopy(SPOOL)
    del disk.files[name]
    expect(disk, {record for _, _, record in extents(name)}, name)


def test_a_file_of_zeros() -> None:
    """Zeros, as a file system may leave them after a power cut, cost what stood in their place."""
    for name in SEGMENTS:
        disk = copy.deepcopy(SPOOL)
        disk.files[name].data[:] = bytes(len(disk.files[name].data))
        expect(disk, {record for _, _, record in extents(name)}, name)


def test_a_loss_is_not_declared_twice_over_a_restart_in_the_middle() -> None:
    """A spool reopened while its damage is being told tells it once more or no more, and counts it once."""
    for stop_after in range(1, 8):
        disk = copy.deepcopy(SPOOL)
        disk.files[SEGMENTS[1]].data[100:400] = bytes(300)
        spool = Spool(disk, LIMITS)
        spool.open(0)
        lost = 0
        for _ in range(stop_after):
            chunk = spool.read(2, 1000)
            if chunk is not None:
                spool.acknowledge(chunk)
                position = chunk.number, chunk.end
        lost += sum(spool.dropped.values())
        disk.kill()
        spool = Spool(disk, LIMITS)
        spool.open(0)
        spool.resume(*position)
        while (chunk := spool.read(2, 1000)) is not None:
            spool.acknowledge(chunk)
        lost += sum(spool.dropped.values())
        whole = Spool(again := copy.deepcopy(SPOOL), LIMITS)
        again.files[SEGMENTS[1]].data[100:400] = bytes(300)
        whole.open(0)
        while (chunk := whole.read(2, 1000)) is not None:
            whole.acknowledge(chunk)
        assert sum(whole.dropped.values()) == lost
        assert not +spool.pending


def test_names_sort_as_numbers() -> None:
    """The folder's order is the segments' order."""
    assert sorted(map(name_of, (9, 10, 100))) == [name_of(9), name_of(10), name_of(100)]
