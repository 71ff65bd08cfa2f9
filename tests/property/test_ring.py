"""The ring against a plain model, under any interleaving, its sender killed and its connection lost at any step."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kon_agent.ring import CONSUMER_BYTES, Consumer, Drop, Observer, Producer, Tally, format_ring, producer_bytes

SIZE = 1024


class RingMachine(RuleBasedStateMachine):
    """Publish, read, commit, and kill either side between any two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.producer_area = memoryview(bytearray(producer_bytes(SIZE)))
        self.consumer_area = memoryview(bytearray(CONSUMER_BYTES))
        format_ring(self.producer_area, 1, SIZE)
        self.producer = Producer(self.producer_area, self.consumer_area)
        self.consumer = Consumer(self.producer_area, self.consumer_area, SIZE)
        self.observer = Observer(self.producer_area, self.consumer_area, SIZE)
        self.published: dict[int, bytes] = {}
        self.numbered = 0
        self.full = 0
        self.delivered: dict[int, bytes] = {}  # committed as acknowledged
        self.read: list[tuple[int, bytes, int]] = []  # read, not committed: seq, payload, cursor behind it

    @rule(payload=st.binary(min_size=1, max_size=400))
    def publish(self, payload: bytes) -> None:
        if self.producer.publish(payload):
            self.published[self.numbered] = payload
        else:
            self.full += 1
        self.numbered += 1

    @rule()
    def take(self) -> None:
        record = self.consumer.read(0)
        if record is not None:
            assert self.published[record.seq] == record.payload
            self.read.append((record.seq, record.payload, self.consumer.cursor))

    @precondition(lambda self: self.read)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(self.read)))
        settled, self.read = self.read[:count], self.read[count:]
        old = self.consumer.tally
        last_seq, _, end = settled[-1]
        dropped = list(old.dropped or ())
        dropped[Drop.RING_FULL] += last_seq + 1 - old.next_seq - count
        self.consumer.commit(Tally(end, last_seq + 1, old.acked + count, old.spooled, dropped))
        for seq, payload, _ in settled:
            assert seq not in self.delivered
            self.delivered[seq] = payload

    @rule()
    def kill_consumer(self) -> None:
        self.consumer = Consumer(self.producer_area, self.consumer_area, SIZE)
        self.read = []

    @rule()
    def lose_connection(self) -> None:
        self.consumer.rewind()
        self.read = []

    @invariant()
    def law(self) -> None:
        stats = self.observer.stats()
        assert self.numbered == stats.produced
        assert self.full == stats.dropped.get(Drop.RING_FULL, 0)
        assert stats.produced == stats.acked + stats.in_flight + stats.in_ring + sum(stats.dropped.values())
        assert len(self.delivered) == stats.acked

    def teardown(self) -> None:
        """Nothing published is missing: what was not committed can still be read."""
        self.consumer.rewind()
        rest: dict[int, bytes] = {}
        while (record := self.consumer.read(0)) is not None:
            rest[record.seq] = record.payload
        assert self.published == self.delivered | rest
        assert not self.delivered.keys() & rest.keys()


RingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRing = RingMachine.TestCase
