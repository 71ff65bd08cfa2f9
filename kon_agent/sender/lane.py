"""A lane: one ring's records on their way out, from the cursor to the committed tail.

Pure but for the ring's memory. Portions leave in order and may be settled in any order; the tail moves over the oldest
ones once each of them is settled, so it never passes a record that nobody else holds yet.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kon_agent.errors import RingError
from kon_agent.ring import Consumer, Drop, Tally, Verdict
from kon_agent.wire.frames import MAX_BATCH_LOSSES

log = logging.getLogger(__name__)

MAX_LOSSES = 100  # of one portion: several lanes' share a batch


@dataclass(slots=True)
class Run:
    """Consecutive records: `first_seq` and the encoded bytes of each."""

    first_seq: int
    records: list[bytes]


@dataclass(frozen=True, slots=True)
class Lost:
    """Consecutive sequence numbers known to be lost."""

    first_seq: int
    count: int
    drop: Drop


@dataclass(slots=True, eq=False)
class Portion:
    """What one batch carries of one lane.

    Attributes:
        lane: where it came from.
        runs, losses: its records and the losses between them, in sequence.
        bytes: encoded size of its records.
        end, end_seq: ring position and sequence number behind it.
        rejected: records the server refused for good.
        is_settled: whether somebody else holds its records for good: the server, or the spool.
        is_spooled: whether it is the spool.
    """

    lane: Lane
    runs: list[Run] = field(default_factory=list)
    losses: list[Lost] = field(default_factory=list)
    bytes: int = 0
    end: int = 0
    end_seq: int = 0
    rejected: int = 0
    is_settled: bool = False
    is_spooled: bool = False

    @property
    def plugin(self) -> str:
        """Whose records they are."""
        return self.lane.plugin

    @property
    def epoch(self) -> int:
        """The epoch of the ring they come from."""
        return self.lane.epoch

    @property
    def record_count(self) -> int:
        """How many records it carries."""
        return sum(len(run.records) for run in self.runs)


class Lane:
    """One ring, read in order.

    Args:
        plugin: whose ring it is; stamped by the supervisor, a worker cannot choose it.
        epoch: the ring's epoch.
        consumer: the ring's reading end.
    """

    def __init__(self, plugin: str, epoch: int, consumer: Consumer) -> None:
        self.plugin = plugin
        self.epoch = epoch
        self.is_closed = False  # the producer is dead: what is there is all there will be
        self.is_faulted = False  # the producer wrote nonsense: nothing more can be read
        self._consumer = consumer
        self._outstanding: deque[Portion] = deque()

    def unread_bytes(self) -> int:
        """Return how many bytes wait to be taken."""
        return self._consumer.unread_bytes()

    def used_bytes(self) -> int:
        """Return how many bytes the ring still holds, in flight ones included."""
        return self._consumer.used_bytes()

    def take(self, max_records: int, max_bytes: int, now_ns: int) -> Portion | None:
        """Read the next portion within the bounds; None where there is nothing to send.

        The first record is taken even if it alone exceeds `max_bytes`, so that no record can be too large to leave.

        Raises:
            RingError: the producer wrote nonsense; `fault` the lane.
        """
        portion = Portion(self)
        count = 0
        consumer = self._consumer
        while count < max_records and portion.bytes < max_bytes and len(portion.losses) < MAX_LOSSES:
            expected = consumer.cursor_seq
            record = consumer.read(now_ns)
            if record is None:
                break
            if record.seq > expected:
                portion.losses.append(Lost(expected, record.seq - expected, Drop.RING_FULL))
            if not record.payload:
                portion.losses.append(Lost(record.seq, 1, Drop.REJECTED))
                continue
            if portion.runs and portion.runs[-1].first_seq + len(portion.runs[-1].records) == record.seq:
                portion.runs[-1].records.append(record.payload)
            else:
                portion.runs.append(Run(record.seq, [record.payload]))
            portion.bytes += len(record.payload)
            count += 1
        if self.is_closed and not consumer.unread_bytes():
            portion.losses += self._trailing_losses(portion)
        if not portion.runs and not portion.losses:
            return None
        portion.end, portion.end_seq = consumer.cursor, consumer.cursor_seq
        self._outstanding.append(portion)
        self._show_in_flight()
        return portion

    def _trailing_losses(self, portion: Portion) -> list[Lost]:
        losses = []
        known = [
            lost for other in (*self._outstanding, portion) for lost in other.losses if lost.drop is Drop.RING_FULL
        ]
        for drop, count in self._consumer.trailing_losses(sum(lost.count for lost in known)):
            losses.append(Lost(self._consumer.cursor_seq, count, drop))
            self._consumer.cursor_seq += count
        return losses

    def settle(self, portion: Portion, rejected: int = 0) -> None:
        """The server has stored `portion`, but for `rejected` records it never will."""
        if self.is_faulted or portion not in self._outstanding:  # counted lost, or taken again: its memory may be gone
            return
        portion.is_settled, portion.rejected = True, rejected
        while self._outstanding and self._outstanding[0].is_settled:
            self._commit(self._outstanding.popleft())
        self._show_in_flight()

    def shelve(self, portion: Portion) -> None:
        """The spool holds `portion` durably."""
        portion.is_spooled = True
        self.settle(portion)

    def skip_spooled(self, highest: int, now_ns: int) -> None:
        """Pass over what a predecessor made durable and did not live to commit: everything up to `highest`."""
        while self._consumer.cursor_seq <= highest:
            portion = self.take(1, 1, now_ns)
            if portion is None:
                return
            self.shelve(portion)

    def _commit(self, portion: Portion) -> None:
        old = self._consumer.tally
        dropped = list(old.dropped or ())
        for lost in portion.losses:
            dropped[lost.drop] += lost.count
        dropped[Drop.REJECTED] += portion.rejected
        self._consumer.commit(
            Tally(
                tail=portion.end,
                next_seq=portion.end_seq,
                acked=old.acked + (0 if portion.is_spooled else portion.record_count - portion.rejected),
                spooled=old.spooled + (portion.record_count if portion.is_spooled else 0),
                dropped=dropped,
            )
        )

    def rewind(self) -> None:
        """Forget what is in flight and read it again: the connection it travelled on is gone."""
        self._outstanding.clear()
        self._consumer.rewind()
        self._show_in_flight()

    def is_drained(self) -> bool:
        """Whether this lane is closed and everything in it is settled."""
        return (
            self.is_closed
            and not self._outstanding
            and not self._consumer.unread_bytes()
            and not self._consumer.trailing_losses(0)
        )

    def conclude(self) -> None:
        """Tell the supervisor that the ring may go."""
        self._consumer.conclude(Verdict.DRAINED)

    def fault(self) -> None:
        """Tell the supervisor that the ring's producer cannot be trusted; what could not be read is counted lost."""
        self.is_faulted = True
        self.rewind()
        tally = self._consumer.tally
        lost = sum(count for _, count in self._consumer.trailing_losses(0))
        dropped = list(tally.dropped or ())
        dropped[Drop.WORKER_CRASH] += lost
        self._consumer.commit(Tally(tally.tail, tally.next_seq + lost, tally.acked, tally.spooled, dropped))
        self._consumer.conclude(Verdict.FAULTED)

    def _show_in_flight(self) -> None:
        self._consumer.set_in_flight(sum(portion.record_count for portion in self._outstanding))


def gather(lanes: Sequence[Lane], max_records: int, max_bytes: int, now_ns: int) -> list[Portion]:
    """Take one batch's worth from `lanes`, in the order given; the caller rotates them for fairness.

    A lane whose ring turns out to be nonsense is faulted and contributes nothing more.
    """
    portions: list[Portion] = []
    losses = 0
    for lane in lanes:
        if max_records <= 0 or max_bytes <= 0 or losses >= MAX_BATCH_LOSSES - MAX_LOSSES:
            break
        try:
            portion = lane.take(max_records, max_bytes, now_ns)
        except RingError as err:
            log.error("the ring of %s cannot be read, its worker will be replaced: %s", lane.plugin, err)
            lane.fault()
            continue
        if portion is not None:
            portions.append(portion)
            losses += len(portion.losses)
            max_records -= portion.record_count
            max_bytes -= portion.bytes
    return portions
