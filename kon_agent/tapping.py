"""A tap: reads a ring's records as they pass, beside the consumer, and leaves no trace.

Owns a position in the producer's area, which it sees read-only, and nothing else: no lock, no flag, no word of its own
that either side would look at. So it can neither slow nor stop a ring, and nobody waits for it: where it is too slow,
the producer overtakes it, and what it did not see is counted.

Invariants:
* A record is copied, and only believed if afterwards the producer had still not come within MARGIN_BYTES of writing
  over it, and if the copy's CRC and sequence number are right. A torn or overwritten record is never returned.
* Every position is a record's boundary: the start of the ring, the end of a record read, a head, or, where a tap begins
  in the middle, the first record whose CRC is right.
"""

from __future__ import annotations

from kon_agent.errors import RingError
from kon_agent.ring import DATA_OFFSET, MAX_RECORD_BYTES, TORN_PATIENCE_NS, Record, copy_record, record_bytes

MARGIN_BYTES = 2 * MAX_RECORD_BYTES
"""How far beyond its head a producer may be writing: the next record, and one whose head is not visible yet (ARM64)."""

_HEAD, _PRODUCED = 3, 4  # words of the producer's area, see ring.py


class Tap:
    """One ring, seen from the side.

    Args:
        producer: the producer's area, read-only.
        size_bytes: the ring's size as its creator knows it, more than MARGIN_BYTES.
        from_start: begin with the oldest record that is still there instead of the next one to come.

    Attributes:
        missed: records that were overwritten before they were read.
    """

    def __init__(self, producer: memoryview, size_bytes: int, *, from_start: bool = False) -> None:
        self._words = producer[:DATA_OFFSET].cast("Q")
        self._data = producer[DATA_OFFSET:]
        self._size = size_bytes
        self._reach = size_bytes - MARGIN_BYTES
        self._torn_since_ns: int | None = None
        self._is_adrift = False  # it has let go of records, and does not know how many before it sees the next
        self.missed = 0
        self._next_seq = self._words[_PRODUCED]
        self._position = self._words[_HEAD]
        if from_start:
            self._next_seq, self._position = 0, self._oldest(self._position)

    def _oldest(self, head: int) -> int:
        if head <= self._reach:
            return 0
        for position in range(head - self._reach + (-head & 7), head, 8):
            if copy_record(self._data, self._size, position, head - position) is not None:
                return position
        return head

    def read(self, now_ns: int) -> Record | None:
        """Return the next record; None where there is none, or not yet. A rejected one has no payload.

        Raises:
            RingError: the producer's area holds what no producer of ours writes.
        """
        head = self._words[_HEAD]
        if head == self._position:
            return None
        if head < self._position or head & 7:
            raise RingError(f"head {head} is impossible behind position {self._position}")
        record = None
        if head - self._position <= self._reach:
            record = copy_record(self._data, self._size, self._position, head - self._position)
            head = self._words[_HEAD]  # again: what it passed while we copied is not to be believed
        if head - self._position > self._reach:
            self._jump(head)
            return None
        if record is None or not self._is_plausible(record):
            if self._torn_since_ns is None:
                self._torn_since_ns = now_ns
            elif now_ns - self._torn_since_ns > TORN_PATIENCE_NS:  # the consumer gives the ring up; we look further
                self._jump(head)
            return None
        self._step_over(record)
        return record

    def _is_plausible(self, record: Record) -> bool:
        # Not before what was read last; by one it may be, for a tap that began between a number and its record.
        return record.seq + 1 >= self._next_seq

    def _step_over(self, record: Record) -> None:
        if self._is_adrift:
            self.missed += max(0, record.seq - self._next_seq)
            self._is_adrift = False
        self._torn_since_ns = None
        self._position += record_bytes(len(record.payload))
        self._next_seq = record.seq + 1

    def _jump(self, head: int) -> None:
        self._position = head
        self._torn_since_ns = None
        self._is_adrift = True

    def close(self) -> None:
        """Let go of the memory, so that it can be unmapped."""
        self._words.release()
        self._data.release()
