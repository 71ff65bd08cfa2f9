"""A tap's promises: it sees what passes, says what it missed, and touches nothing."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kon_agent.errors import RingError
from kon_agent.linux.memory import map_memory, unmap_memory
from kon_agent.ring import (
    CONSUMER_BYTES,
    DATA_OFFSET,
    MAX_RECORD_BYTES,
    TORN_PATIENCE_NS,
    Consumer,
    Producer,
    Record,
    Tally,
    format_ring,
    producer_bytes,
    record_bytes,
)
from kon_agent.supervisor.sharedring import SharedRing
from kon_agent.tapping import MARGIN_BYTES, Tap

SIZE = 16 * 1024  # the smallest ring there may be
HEAD = 3 * 8


class Tapped:
    """A ring in plain memory whose consumer keeps up by itself, and a tap in it."""

    def __init__(self) -> None:
        self.area = memoryview(bytearray(producer_bytes(SIZE)))
        consumer_area = memoryview(bytearray(CONSUMER_BYTES))
        format_ring(self.area, epoch=7, size_bytes=SIZE)
        self.producer = Producer(self.area, consumer_area)
        self.consumer = Consumer(self.area, consumer_area, SIZE)
        self.published: list[Record] = []
        self.tap = self.open()

    def open(self, *, from_start: bool = False) -> Tap:
        return Tap(self.area.toreadonly(), SIZE, from_start=from_start)

    def publish(self, payload: bytes) -> None:
        """Publish a record, and have the consumer take it."""
        assert self.producer.publish(payload)
        record = self.consumer.read(0)
        assert record is not None
        self.published.append(record)
        seen = self.consumer.cursor_seq
        self.consumer.commit(Tally(self.consumer.cursor, seen, seen))

    def fill(self, size_bytes: int) -> None:
        """Publish records that take so many bytes of the ring."""
        for _ in range(size_bytes // record_bytes(112)):
            self.publish(b"x" * 112)


def read_all(tap: Tap) -> list[Record]:
    """Return what a tap has to give now; one look may only find that it has been overtaken."""
    found = []
    for _ in range(2):
        while (record := tap.read(0)) is not None:
            found.append(record)
    return found


def test_a_tap_sees_what_passes_from_now_on() -> None:
    """Records after it began, in order, whatever the consumer did with them."""
    ring = Tapped()
    ring.publish(b"before")
    tap = ring.open()
    ring.publish(b"one")
    ring.publish(b"two")
    assert [Record(1, b"one"), Record(2, b"two")] == read_all(tap)
    assert 0 == tap.missed


def test_a_tap_can_begin_with_what_is_still_there() -> None:
    """All of a young ring; of an old one the latest, from a record's boundary on."""
    ring = Tapped()
    ring.publish(b"first")
    assert ring.published == read_all(ring.open(from_start=True))
    for number in range(500):
        ring.publish(b"y" * (1 + number % 400))
    seen = read_all(ring.open(from_start=True))
    assert ring.published[-len(seen) :] == seen
    assert sum(record_bytes(len(record.payload)) for record in seen) > SIZE - MARGIN_BYTES - MAX_RECORD_BYTES


def test_a_tap_that_was_overtaken_goes_on_and_says_what_it_missed() -> None:
    """It lets go of all there was, and the next record tells how many that were."""
    ring = Tapped()
    ring.publish(b"seen")
    assert 1 == len(read_all(ring.tap))
    ring.fill(3 * SIZE)
    assert [] == read_all(ring.tap)
    ring.publish(b"next")
    assert [Record(len(ring.published) - 1, b"next")] == read_all(ring.tap)
    assert len(ring.published) - 2 == ring.tap.missed


def test_a_tap_overtaken_before_its_first_record_counts_too() -> None:
    """What passed between its beginning and its first look was missed."""
    ring = Tapped()
    ring.fill(SIZE)
    ring.publish(b"next")
    tap = ring.tap
    assert [] == read_all(tap)
    ring.publish(b"after")
    assert [b"after"] == [record.payload for record in read_all(tap)]
    assert len(ring.published) - 1 == tap.missed


def test_what_was_dropped_at_a_full_ring_was_not_missed() -> None:
    """A record that never was in the ring is none a tap could see."""
    ring = Tapped()
    while ring.producer.publish(b"z" * 100):
        assert 1 == len(read_all(ring.tap))
    while ring.consumer.read(0) is not None:
        pass
    cursor, seen = ring.consumer.cursor, ring.consumer.cursor_seq
    ring.consumer.commit(Tally(cursor, seen, seen))
    assert ring.producer.publish(b"after")
    assert [b"after"] == [record.payload for record in read_all(ring.tap)]
    assert 0 == ring.tap.missed


class Rewritten(Tap):
    """A tap that must not believe anything it copies."""

    def _is_plausible(self, record: Record) -> bool:
        raise AssertionError("a record that was overwritten meanwhile was believed")


def test_what_is_overwritten_while_it_is_copied_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is looked at again after the copy: nothing the producer may have reached meanwhile is returned."""
    ring = Tapped()
    tap = Rewritten(ring.area.toreadonly(), SIZE)
    ring.publish(b"slowly read")

    def copy_slowly(*arguments: object) -> Record:
        ring.fill(SIZE)
        return ring.published[0]

    monkeypatch.setattr("kon_agent.tapping.copy_record", copy_slowly)
    assert None is tap.read(0)


def test_a_record_that_becomes_visible_late_is_waited_for() -> None:
    """A head seen before its record (ARM64) is no reason to skip it."""
    ring = Tapped()
    ring.publish(b"payload")
    where = slice(DATA_OFFSET, DATA_OFFSET + 24)
    whole = bytes(ring.area[where])
    ring.area[where] = bytes(24)
    assert None is ring.tap.read(0)
    ring.area[where] = whole
    assert ring.published == read_all(ring.tap)


def test_a_record_that_stays_torn_is_passed() -> None:
    """A producer that broke off is the consumer's to judge; a tap goes on with what comes, and counts it."""
    ring = Tapped()
    ring.publish(b"payload")
    ring.area[DATA_OFFSET + 17] ^= 1
    assert [None, None] == [ring.tap.read(0), ring.tap.read(TORN_PATIENCE_NS + 1)]
    ring.publish(b"next")
    assert [Record(1, b"next")] == read_all(ring.tap)
    assert 1 == ring.tap.missed


@pytest.mark.parametrize("head", [12, 8])
def test_an_impossible_head_is_an_error(head: int) -> None:
    """A head that goes back, or stands where none can, ends the tap."""
    ring = Tapped()
    ring.publish(b"payload" * 10)
    tap = ring.open()
    struct.pack_into("=Q", ring.area, HEAD, head)
    with pytest.raises(RingError):
        tap.read(0)


def test_any_head_stays_within_the_ring() -> None:
    """A hostile producer's head makes a tap read nothing but the ring, and return nothing."""
    ring = Tapped()
    for head in (8, SIZE, SIZE + 8, 2**63, 2**64 - 8):
        tap = ring.open(from_start=True)
        struct.pack_into("=Q", ring.area, HEAD, head)
        assert None is tap.read(0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_record_is_seen_or_missed_and_none_is_altered(data: st.DataObject) -> None:
    """Whatever sizes pass and however seldom it looks: what it returns is what was published, in order, once."""
    ring = Tapped()
    seen: list[Record] = []
    for _ in range(data.draw(st.integers(1, 12))):
        count, size = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 1500))
        for number in range(count):
            ring.publish(bytes([number]) * (size + number))
        for _ in range(data.draw(st.integers(0, 80))):
            if (record := ring.tap.read(0)) is not None:
                seen.append(record)
    seen += read_all(ring.tap)
    ring.publish(b"the last")
    seen += read_all(ring.tap)
    by_seq = {record.seq: record for record in ring.published}
    assert seen == [by_seq[record.seq] for record in seen]
    assert sorted({record.seq for record in seen}) == [record.seq for record in seen]
    assert len(ring.published) == len(seen) + ring.tap.missed


def body(seq: int) -> bytes:
    """Return what record `seq` holds, of a size of its own."""
    return (seq.to_bytes(8, "little") * 90)[: 8 + seq * 2_654_435_761 % 700]


def publish_and_exit(ring: SharedRing, count: int) -> None:
    """Be the worker, at full speed, and a sender that keeps up."""
    try:
        producer_fd, consumer_fd = ring.consumer_fds()
        consumer = Consumer(
            map_memory(producer_fd, producer_bytes(SIZE), writable=False),
            map_memory(consumer_fd, CONSUMER_BYTES, writable=True),
            SIZE,
        )
        producer = ring.map_producer()
        for seq in range(count):
            producer.publish(body(seq))
            consumer.read(0)
            consumer.commit(Tally(consumer.cursor, seq + 1, seq + 1))
    finally:
        os._exit(0)


def test_a_producer_at_full_speed_is_never_misread() -> None:
    """Overtaken again and again by another process, a tap returns whole records only and counts all the others."""
    ring = SharedRing(1, "cpu", SIZE)
    memory = map_memory(ring.tap_fd, producer_bytes(SIZE), writable=False)
    tap = Tap(memory, SIZE)
    pid = os.fork()
    if pid == 0:
        publish_and_exit(ring, 20_000)
    seen = 0
    next_seq = 0
    has_ended = False
    while not has_ended:
        has_ended = os.waitpid(pid, os.WNOHANG) != (0, 0)
        while (record := tap.read(0)) is not None:
            assert body(record.seq) == record.payload
            assert record.seq >= next_seq
            seen, next_seq = seen + 1, record.seq + 1
    assert next_seq == seen + tap.missed
    tap.close()
    unmap_memory(memory)
    ring.release()


def test_what_is_handed_out_can_only_be_read() -> None:
    """The descriptor a tap is given maps read-only, and nothing makes it or its mapping writable."""
    ring = SharedRing(1, "cpu", SIZE)
    writer = ring.map_producer()
    memory = map_memory(ring.tap_fd, producer_bytes(SIZE), writable=False)
    tap = Tap(memory, SIZE)
    assert memory.readonly
    assert writer.publish(b"payload")
    assert Record(0, b"payload") == tap.read(0)
    with pytest.raises(PermissionError):
        map_memory(ring.tap_fd, producer_bytes(SIZE), writable=True)
    with pytest.raises(PermissionError):
        mmap.mmap(ring.tap_fd, producer_bytes(SIZE), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(ring.tap_fd, b"x", 0)
    tap.close()
    assert "r--s" in modes_of("kon-ring-cpu")
    unmap_memory(memory)
    ring.release()


def modes_of(memfd: str) -> set[str]:
    """Return the protections of this process's mappings of a memfd."""
    return {row.split()[1] for row in Path("/proc/self/maps").read_text().splitlines() if memfd in row}
