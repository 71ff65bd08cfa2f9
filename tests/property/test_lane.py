"""The lane against a plain model: a server that remembers, a producer and a sender killed between any two steps."""

from __future__ import annotations

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kon_agent.ring import (
    CONSUMER_BYTES,
    DATA_OFFSET,
    Consumer,
    Drop,
    Observer,
    Producer,
    Verdict,
    format_ring,
    producer_bytes,
)
from kon_agent.sender.lane import Lane, Portion

SIZE = 1024
EPOCH = 1
_PRODUCED_WORD = 4
ALL = 10_000


class LaneMachine(RuleBasedStateMachine):
    """One ring from its producer to the server, in the hands of whatever may go wrong.

    `published` and `marks` are what the producer left in the ring, `refused` what the full ring dropped, `crashed` the
    number a killed producer never used: together every number ever handed out. `stored` and `declared` are what the
    server knows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.producer_area = memoryview(bytearray(producer_bytes(SIZE)))
        self.consumer_area = memoryview(bytearray(CONSUMER_BYTES))
        format_ring(self.producer_area, EPOCH, SIZE)
        self.producer: Producer | None = Producer(self.producer_area, self.consumer_area)
        self.observer = Observer(self.producer_area, self.consumer_area, SIZE)
        self.lane = self.open_lane()
        self.numbered = 0
        self.published: dict[int, bytes] = {}
        self.marks: set[int] = set()
        self.refused: set[int] = set()
        self.crashed: set[int] = set()
        self.stored: dict[int, bytes] = {}
        self.declared: dict[int, Drop] = {}
        self.in_flight: list[Portion] = []
        self.rejected_by: dict[int, int] = {}  # records the server refused, by the sequence number behind the portion
        self.highest_next_seq = 0

    def open_lane(self) -> Lane:
        lane = Lane("cpu", EPOCH, Consumer(self.producer_area, self.consumer_area, SIZE))
        lane.is_closed = self.producer is None
        return lane

    # The producer.

    @precondition(lambda self: self.producer)
    @rule(payload=st.binary(min_size=1, max_size=400))
    def publish(self, payload: bytes) -> None:
        assert self.producer is not None
        if self.producer.publish(payload):
            self.published[self.numbered] = payload
        else:
            self.refused.add(self.numbered)
        self.numbered += 1

    @precondition(lambda self: self.producer)
    @rule()
    def reject(self) -> None:
        assert self.producer is not None
        (self.marks if self.producer.reject() else self.refused).add(self.numbered)
        self.numbered += 1

    @precondition(lambda self: self.producer)
    @rule(is_writing=st.booleans())
    def kill_producer(self, is_writing: bool) -> None:
        """Between two records, or after it has taken a number and before it has used it."""
        if is_writing:
            self.producer_area[:DATA_OFFSET].cast("Q")[_PRODUCED_WORD] += 1
            self.crashed.add(self.numbered)
            self.numbered += 1
        self.producer = None
        self.lane.is_closed = True

    # The sender.

    @rule(max_records=st.integers(1, 5), max_bytes=st.integers(1, 600))
    def take(self, max_records: int, max_bytes: int) -> None:
        portion = self.lane.take(max_records, max_bytes, 0)
        if portion is not None:
            assert portion.record_count <= max_records
            self.in_flight.append(portion)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """A portion reaches the server and its answer comes back, in any order."""
        portion = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        rejected = data.draw(st.integers(0, portion.record_count))
        self.store(portion)
        self.rejected_by[portion.end_seq] = rejected
        self.lane.settle(portion, rejected)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def store_unheard(self, data: st.DataObject) -> None:
        """A portion reaches the server, and its answer is lost with the connection."""
        self.store(data.draw(st.sampled_from(self.in_flight)))
        self.lose_connection()

    @rule()
    def lose_connection(self) -> None:
        self.lane.rewind()
        self.forget()

    @rule()
    def kill_sender(self) -> None:
        self.lane = self.open_lane()
        self.forget()

    def forget(self) -> None:
        """Forget what is in flight, and the answers that waited for an older portion's."""
        self.in_flight.clear()
        next_seq = self.open_lane()._consumer.tally.next_seq
        self.rejected_by = {end_seq: count for end_seq, count in self.rejected_by.items() if end_seq <= next_seq}

    def store(self, portion: Portion) -> None:
        """Be the server: what comes twice must be the same, and no number has two fates."""
        for run in portion.runs:
            for seq, payload in enumerate(run.records, run.first_seq):
                assert seq not in self.declared
                assert payload == self.stored.setdefault(seq, payload)
        for lost in portion.losses:
            for seq in range(lost.first_seq, lost.first_seq + lost.count):
                assert seq not in self.stored
                self.declared[seq] = lost.drop

    # What holds at every instant.

    @invariant()
    def the_law_holds(self) -> None:
        stats = self.observer.stats()
        assert self.numbered == stats.produced
        assert stats.produced == stats.acked + stats.in_flight + stats.in_ring + sum(stats.dropped.values())

    @invariant()
    def nothing_is_acknowledged_twice(self) -> None:
        tally = self.open_lane()._consumer.tally
        assert self.highest_next_seq <= tally.next_seq <= self.numbered
        self.highest_next_seq = tally.next_seq
        passed = [seq for seq in self.published if seq < tally.next_seq]
        refused = sum(count for end_seq, count in self.rejected_by.items() if end_seq <= tally.next_seq)
        assert len(passed) - refused == tally.acked

    @invariant()
    def the_tail_is_behind_what_the_server_has(self) -> None:
        known = self.stored.keys() | self.declared.keys()
        assert set(range(self.highest_next_seq)) <= known

    def teardown(self) -> None:
        """Let it all end: every number has the fate it should have, and the lane concludes."""
        self.producer, self.lane.is_closed = None, True
        self.lose_connection()
        while (portion := self.lane.take(ALL, ALL, 0)) is not None:
            self.store(portion)
            self.rejected_by[portion.end_seq] = 0
            self.lane.settle(portion)
        self.the_law_holds()
        self.nothing_is_acknowledged_twice()
        assert self.lane.is_drained()
        self.lane.conclude()
        assert Verdict.DRAINED is self.observer.stats().verdict
        assert self.published == self.stored
        assert self.declared.keys() == self.marks | self.refused | self.crashed
        assert all(self.declared[seq] is Drop.REJECTED for seq in self.marks)
        if not self.crashed:
            assert all(self.declared[seq] is Drop.RING_FULL for seq in self.refused)


LaneMachine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=60,
    deadline=None,
    phases=set(Phase) - {Phase.explain},  # which traces every line, for minutes
)
TestLane = LaneMachine.TestCase
