"""The ring's promises, one by one; tests/property/test_ring.py holds them under random schedules."""

from __future__ import annotations

import struct

import pytest

from kon_agent import ring
from kon_agent.errors import RingError
from kon_agent.ring import (
    CONSUMER_BYTES,
    DATA_OFFSET,
    MAX_RECORD_BYTES,
    TORN_PATIENCE_NS,
    Consumer,
    Drop,
    Observer,
    Producer,
    Record,
    Tally,
    Verdict,
    format_ring,
    producer_bytes,
)

SIZE = 4096


class Pair:
    """A ring's two areas in plain memory, and its ends."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.producer_area = memoryview(bytearray(producer_bytes(size)))
        self.consumer_area = memoryview(bytearray(CONSUMER_BYTES))
        format_ring(self.producer_area, epoch=7, size_bytes=size)
        self.producer = Producer(self.producer_area, self.consumer_area)
        self.consumer = self.reopen()
        self.observer = Observer(self.producer_area, self.consumer_area, size)

    def reopen(self) -> Consumer:
        """Return a consumer as a restarted sender would have it."""
        return Consumer(self.producer_area, self.consumer_area, self.size)

    def commit_all(self, consumer: Consumer) -> None:
        """Settle everything read so far as acknowledged."""
        done = consumer.cursor_seq - consumer.tally.next_seq
        consumer.commit(Tally(consumer.cursor, consumer.cursor_seq, consumer.tally.acked + done))


def test_records_come_out_as_they_went_in() -> None:
    """Payload and sequence survive the ring, in order."""
    pair = Pair()
    for payload in (b"one", b"two" * 100, b"3"):
        assert pair.producer.publish(payload)
    assert [Record(0, b"one"), Record(1, b"two" * 100), Record(2, b"3")] == [pair.consumer.read(0) for _ in range(3)]
    assert None is pair.consumer.read(0)


def test_a_full_ring_drops_the_newest_and_counts_it() -> None:
    """What does not fit is dropped, and shows as a gap in the sequence."""
    pair = Pair()
    while pair.producer.publish(b"x" * 100):
        pass
    kept = pair.observer.stats().produced - 1
    for _ in range(kept):
        pair.consumer.read(0)
    pair.commit_all(pair.consumer)
    assert pair.producer.publish(b"after")
    assert Record(kept + 1, b"after") == pair.consumer.read(0)
    assert {Drop.RING_FULL: 1} == pair.observer.stats().dropped


def test_records_wrap_around_the_end() -> None:
    """A record may lie across the ring's end."""
    pair = Pair()
    for number in range(500):
        payload = bytes([number & 0xFF]) * (1 + number % 300)
        assert pair.producer.publish(payload)
        assert Record(number, payload) == pair.consumer.read(0)
        pair.commit_all(pair.consumer)


def test_an_oversized_record_leaves_a_mark() -> None:
    """A record beyond the bound is rejected where it stood, not silently gone."""
    pair = Pair()
    pair.producer.publish(b"x" * (MAX_RECORD_BYTES + 1))
    pair.producer.publish(b"next")
    assert [Record(0, b""), Record(1, b"next")] == [pair.consumer.read(0), pair.consumer.read(0)]


def test_a_new_consumer_reads_what_was_not_committed() -> None:
    """A killed sender's successor starts at the tail."""
    pair = Pair()
    for payload in (b"a", b"b", b"c"):
        pair.producer.publish(payload)
    pair.consumer.read(0)
    pair.commit_all(pair.consumer)
    pair.consumer.read(0)
    assert [Record(1, b"b"), Record(2, b"c")] == [(reopened := pair.reopen()).read(0), reopened.read(0)]


@pytest.mark.parametrize("offset", range(16 + len(b"payload")))
def test_a_damaged_record_is_never_delivered(offset: int) -> None:
    """A flipped bit anywhere in header or payload keeps the record back, then faults the ring."""
    pair = Pair()
    pair.producer.publish(b"payload")
    pair.producer_area[DATA_OFFSET + offset] ^= 0x10
    assert None is pair.consumer.read(0)
    with pytest.raises(RingError):
        pair.consumer.read(TORN_PATIENCE_NS + 1)


def test_a_record_that_becomes_visible_late_is_delivered() -> None:
    """A head seen before its record (ARM64) is waited for."""
    pair = Pair()
    pair.producer.publish(b"payload")
    whole = bytes(pair.producer_area[DATA_OFFSET : DATA_OFFSET + 32])
    pair.producer_area[DATA_OFFSET : DATA_OFFSET + 32] = bytes(32)
    assert None is pair.consumer.read(0)
    pair.producer_area[DATA_OFFSET : DATA_OFFSET + 32] = whole
    assert Record(0, b"payload") == pair.consumer.read(TORN_PATIENCE_NS * 10)


@pytest.mark.parametrize("head", [8 * SIZE, SIZE + 8, 12, 2**64 - 8])
def test_an_impossible_head_faults(head: int) -> None:
    """A producer cannot make its consumer read outside of what it may have written."""
    pair = Pair()
    struct.pack_into("=Q", pair.producer_area, 3 * 8, head)
    with pytest.raises(RingError):
        pair.consumer.read(0)


def test_death_between_number_and_record_is_one_crash_loss() -> None:
    """A producer killed after taking a number and before publishing shows as one record lost to the crash."""
    pair = Pair()
    pair.producer.publish(b"a")
    struct.pack_into("=Q", pair.producer_area, 4 * 8, 2)  # produced says 2, head knows of 1
    pair.consumer.read(0)
    assert [(Drop.WORKER_CRASH, 1)] == pair.consumer.trailing_losses(0)


def test_the_law_holds_for_an_observer() -> None:
    """produced = acked + in flight + in ring + spooled + dropped, whatever has happened."""
    pair = Pair()
    while pair.producer.publish(b"y" * 200):
        pass
    for _ in range(5):
        pair.consumer.read(0)
    pair.commit_all(pair.consumer)
    pair.consumer.read(0)
    pair.consumer.set_in_flight(1)
    stats = pair.observer.stats()
    assert (5, 1, Verdict.OPEN) == (stats.acked, stats.in_flight, stats.verdict)
    terms = stats.acked + stats.in_flight + stats.in_ring + stats.spooled + sum(stats.dropped.values())
    assert stats.produced == terms


def test_last_words_are_shown_harmless() -> None:
    """Control characters of a hostile worker do not reach the operator's terminal."""
    pair = Pair()
    pair.producer.say("ImportError: no\x1b[31m such module\n")
    assert "ImportError: no [31m such module " == pair.observer.last_words()


def test_nonsense_in_the_words_stays_in_range() -> None:
    """Whatever a child writes into its words, the supervisor's figures stay plausible."""
    pair = Pair()
    for word in range(3, 10):
        struct.pack_into("=Q", pair.producer_area, word * 8, 2**64 - 1)
    stats = pair.observer.stats()
    assert 0 <= stats.used_bytes <= SIZE
    assert all(0 <= n < 2**54 for n in (stats.produced, stats.in_ring, *stats.dropped.values()))
    assert 2**40 == pair.observer.pulse().missed_ticks  # summed up over many workers, it is still a number of 64 bits


def test_a_ring_concluded_while_it_is_looked_at_loses_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last commit and the verdict may both come between an observer's reads: it sees neither, or both."""
    pair = Pair()
    for payload in (b"one", b"two"):
        pair.producer.publish(payload)
        pair.consumer.read(0)

    def read_then_conclude(area: memoryview) -> Tally:
        tally = read_tally(area)
        pair.commit_all(pair.consumer)
        pair.consumer.conclude(Verdict.DRAINED)
        return tally

    read_tally = ring._read_tally
    with monkeypatch.context() as patch:
        patch.setattr(ring, "_read_tally", read_then_conclude)
        during = pair.observer.stats()
    after = pair.observer.stats()
    assert (Verdict.OPEN, 2, 0, 2) == (during.verdict, during.produced, during.acked, during.in_ring)
    assert (Verdict.DRAINED, 2, 2, 0) == (after.verdict, after.produced, after.acked, after.in_ring)
