"""The lane's promises: in order out, in any order back, and the tail never passes what nobody else holds."""

from __future__ import annotations

import struct

import pytest

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
    Verdict,
    format_ring,
    producer_bytes,
)
from kon_agent.sender.lane import Lane, Lost, Portion, gather
from kon_agent.wire.frames import MAX_BATCH_LOSSES

SIZE = 4096
MANY = 1000
_PRODUCED_WORD = 4
_HEAD_WORD = 3


class Rig:
    """A ring in plain memory with its producer, its lane, and the supervisor's view of both."""

    def __init__(self, plugin: str = "cpu", size: int = SIZE) -> None:
        self.plugin = plugin
        self.size = size
        self.producer_area = memoryview(bytearray(producer_bytes(size)))
        self.consumer_area = memoryview(bytearray(CONSUMER_BYTES))
        format_ring(self.producer_area, epoch=7, size_bytes=size)
        self.producer = Producer(self.producer_area, self.consumer_area)
        self.observer = Observer(self.producer_area, self.consumer_area, size)
        self.lane = self.reopen()

    def reopen(self) -> Lane:
        """Return the lane as a restarted sender would have it."""
        return Lane(self.plugin, 7, Consumer(self.producer_area, self.consumer_area, self.size))

    def publish(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.producer.publish(payload)

    def fill(self, payload: bytes) -> int:
        """Publish until one is dropped; return how many fitted."""
        before = self.observer.stats().produced
        while self.producer.publish(payload):
            pass
        return self.observer.stats().produced - before - 1

    def die_writing(self) -> None:
        """Die after taking a number and before publishing its record."""
        words = self.producer_area[:DATA_OFFSET].cast("Q")
        words[_PRODUCED_WORD] += 1
        self.lane.is_closed = True

    def take(self, max_records: int = MANY, max_bytes: int = 1 << 20) -> Portion:
        portion = self.lane.take(max_records, max_bytes, 0)
        assert portion is not None
        return portion


def runs(portion: Portion) -> list[tuple[int, list[bytes]]]:
    """Return the portion's runs as plain values."""
    return [(run.first_seq, run.records) for run in portion.runs]


def test_a_portion_carries_consecutive_records_in_one_run() -> None:
    """What was published comes out once, in order, numbered from the first."""
    rig = Rig()
    rig.publish(b"a", b"bb", b"ccc")
    portion = rig.take()
    assert [(0, [b"a", b"bb", b"ccc"])] == runs(portion)
    assert (3, 6, 3) == (portion.record_count, portion.bytes, portion.end_seq)
    assert None is rig.lane.take(MANY, SIZE, 0)


def test_a_portion_stays_within_its_bounds() -> None:
    """No more records than asked for, and no further record once the bytes are reached."""
    rig = Rig()
    rig.publish(*[b"x" * 10] * 10)
    assert 4 == rig.take(max_records=4).record_count
    assert 3 == rig.take(max_bytes=21).record_count
    assert 3 == rig.take().record_count


def test_the_first_record_leaves_whatever_its_size() -> None:
    """A bound smaller than a record cannot keep it in the ring for ever."""
    rig = Rig(size=2 * MAX_RECORD_BYTES)
    rig.publish(b"x" * MAX_RECORD_BYTES)
    assert 1 == rig.take(max_bytes=1).record_count


def test_a_gap_is_declared_where_it_is() -> None:
    """Records dropped at the full ring are a loss between the runs around them."""
    rig = Rig()
    fitted = rig.fill(b"x" * 100)
    rig.lane.settle(rig.take())
    rig.publish(b"after")
    portion = rig.take()
    assert [Lost(fitted, 1, Drop.RING_FULL)] == portion.losses
    assert [(fitted + 1, [b"after"])] == runs(portion)


def test_a_rejected_record_is_declared_where_it_was() -> None:
    """The mark a producer leaves for what it could not encode parts the run around it."""
    rig = Rig()
    rig.publish(b"a")
    rig.producer.reject()
    rig.publish(b"c")
    portion = rig.take()
    assert [Lost(1, 1, Drop.REJECTED)] == portion.losses
    assert [(0, [b"a"]), (2, [b"c"])] == runs(portion)


def test_the_tail_waits_for_the_oldest() -> None:
    """A later portion's answer does not let go of an earlier portion's records."""
    rig = Rig()
    rig.publish(b"a", b"b")
    first, second = rig.take(max_records=1), rig.take(max_records=1)
    rig.lane.settle(second)
    assert 0 == rig.observer.stats().acked
    assert [(0, [b"a"])] == runs(rig.reopen().take(1, SIZE, 0) or Portion(rig.lane))
    rig.lane.settle(first)
    assert (2, 0) == (rig.observer.stats().acked, rig.lane.used_bytes())


def test_what_the_server_refuses_counts_as_rejected() -> None:
    """A rejected record is passed, counted, and not acknowledged."""
    rig = Rig()
    rig.publish(b"a", b"b", b"c")
    rig.lane.settle(rig.take(), rejected=2)
    stats = rig.observer.stats()
    assert (1, {Drop.REJECTED: 2}) == (stats.acked, stats.dropped)


def test_what_is_in_flight_is_shown() -> None:
    """The supervisor sees how many records are on their way, until they are answered for or the connection is lost."""
    rig = Rig()
    rig.publish(b"a", b"b", b"c")
    first = rig.take(max_records=1)
    rig.take()
    seen = [rig.observer.stats().in_flight]
    rig.lane.settle(first)
    seen.append(rig.observer.stats().in_flight)
    rig.lane.rewind()
    seen.append(rig.observer.stats().in_flight)
    assert [3, 2, 0] == seen


def test_a_lost_connection_sends_everything_unanswered_again() -> None:
    """After a rewind the same records come out, settled ones excepted."""
    rig = Rig()
    rig.publish(b"a", b"b", b"c")
    rig.lane.settle(rig.take(max_records=1))
    assert [(1, [b"b", b"c"])] == runs(rig.take())
    rig.lane.rewind()
    assert [(1, [b"b", b"c"])] == runs(rig.take())


def test_a_lane_that_may_grow_is_not_drained() -> None:
    """An empty ring whose producer lives is not concluded."""
    rig = Rig()
    assert not rig.lane.is_drained()
    rig.lane.is_closed = True
    assert rig.lane.is_drained()
    rig.lane.conclude()
    assert Verdict.DRAINED is rig.observer.stats().verdict


def test_a_closed_lane_is_drained_once_all_is_answered_for() -> None:
    """Records read are not records delivered."""
    rig = Rig()
    rig.publish(b"a")
    rig.lane.is_closed = True
    portion = rig.take()
    assert not rig.lane.is_drained()
    rig.lane.settle(portion)
    assert rig.lane.is_drained()


def test_a_crash_in_the_middle_of_a_record_is_declared() -> None:
    """The number a killed producer took and never used is lost to the crash, once."""
    rig = Rig()
    rig.publish(b"a")
    rig.die_writing()
    portion = rig.take()
    assert [Lost(1, 1, Drop.WORKER_CRASH)] == portion.losses
    assert None is rig.lane.take(MANY, SIZE, 0)
    rig.lane.settle(portion)
    assert rig.lane.is_drained()
    assert {Drop.WORKER_CRASH: 1} == rig.observer.stats().dropped


def test_drops_after_the_last_record_are_declared_at_the_end() -> None:
    """A producer that died while its ring was full leaves no silent loss behind."""
    rig = Rig()
    fitted = rig.fill(b"x" * 100)
    rig.lane.is_closed = True
    assert [Lost(fitted, 1, Drop.RING_FULL)] == rig.take().losses


def test_a_gap_met_before_is_not_taken_for_a_trailing_one() -> None:
    """Of a gap and a crash in the same portion, each keeps its own reason."""
    rig = Rig()
    fitted = rig.fill(b"x" * 100)
    rig.lane.settle(rig.take())
    rig.publish(b"after the gap")
    rig.die_writing()
    assert [Lost(fitted, 1, Drop.RING_FULL), Lost(fitted + 2, 1, Drop.WORKER_CRASH)] == rig.take().losses


def test_a_faulted_lane_counts_what_it_could_not_read() -> None:
    """What lies behind nonsense is lost to the crash, and the supervisor is told."""
    rig = Rig()
    rig.publish(b"a", b"b", b"c")
    rig.lane.settle(rig.take(max_records=1))
    rig.lane.fault()
    stats = rig.observer.stats()
    assert (Verdict.FAULTED, 3, 1, {Drop.WORKER_CRASH: 2}) == (
        stats.verdict,
        stats.produced,
        stats.acked,
        stats.dropped,
    )


def test_an_answer_after_the_fault_changes_nothing() -> None:
    """A faulted lane's memory may be unmapped by the time the server answers for what it sent before."""
    rig = Rig()
    rig.publish(b"a")
    portion = rig.take()
    rig.lane.fault()
    before = bytes(rig.consumer_area)
    rig.lane.settle(portion)
    assert before == bytes(rig.consumer_area)


def test_an_answer_for_what_was_taken_again_changes_nothing() -> None:
    """After a rewind only the new portion counts: the old one's answer may come when the ring is long unmapped."""
    rig = Rig()
    rig.publish(b"a")
    old = rig.take()
    rig.lane.rewind()
    rig.lane.shelve(rig.take())
    before = bytes(rig.consumer_area)
    rig.lane.settle(old)
    assert before == bytes(rig.consumer_area)
    assert (0, 1) == (rig.observer.stats().acked, rig.observer.stats().spooled)


def test_a_successor_passes_over_what_is_spooled_already() -> None:
    """Records durable in the spool and not yet committed are counted as spooled, and not kept twice."""
    rig = Rig()
    rig.publish(b"a", b"b", b"c")
    rig.lane.skip_spooled(1, 0)
    assert 2 == rig.observer.stats().spooled
    assert [(2, [b"c"])] == runs(rig.take())


def test_a_torn_record_is_waited_for_then_a_fault() -> None:
    """A record whose bytes never match its checksum ends the lane, not the sender."""
    rig = Rig()
    rig.publish(b"payload")
    rig.producer_area[DATA_OFFSET + 16] ^= 1
    assert None is rig.lane.take(MANY, SIZE, 0)
    with pytest.raises(RingError):
        rig.lane.take(MANY, SIZE, TORN_PATIENCE_NS + 1)


def test_a_batch_is_shared_by_lanes_in_turn() -> None:
    """What the first lanes leave of the bounds is the next one's; one that gets nothing waits."""
    rigs = [Rig("a"), Rig("b"), Rig("c")]
    for rig in rigs:
        rig.publish(b"x", b"y")
    portions = gather([rig.lane for rig in rigs], 3, SIZE, 0)
    assert [("a", 2), ("b", 1)] == [(portion.lane.plugin, portion.record_count) for portion in portions]


def test_one_hostile_ring_spoils_nobody_elses_batch() -> None:
    """A lane full of nonsense is faulted; the others' records leave all the same."""
    good, bad = Rig("good"), Rig("bad")
    good.publish(b"x")
    struct.pack_into("=Q", bad.producer_area, _HEAD_WORD * 8, 12)
    assert ["good"] == [portion.lane.plugin for portion in gather([bad.lane, good.lane], MANY, SIZE, 0)]
    assert bad.lane.is_faulted


def test_a_flood_of_rejected_records_fits_a_batch() -> None:
    """A plugin whose every metric is refused cannot make a batch no receiver accepts."""
    rig = Rig(size=64 * 1024)
    while rig.producer.reject():
        pass
    declared = 0
    while portion := rig.lane.take(MANY, SIZE, 0):
        assert MAX_BATCH_LOSSES >= len(portion.losses)
        declared += sum(lost.count for lost in portion.losses if lost.drop is Drop.REJECTED)
        rig.lane.settle(portion)
    assert {Drop.REJECTED: declared, Drop.RING_FULL: 1} == rig.observer.stats().dropped
