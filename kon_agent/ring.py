"""A ring: one worker's records on their way to the sender, in memory both share.

Owns the layout of two memory areas and the protocol between them. The producer's area is written by the worker alone,
the consumer's by the sender alone, so neither can rewind the other; each maps the other's read-only.

    producer's area                                   consumer's area
    word 0  magic            word 6  heartbeat_ns     word 0  selector: commits so far; its low bit names the slot
    word 1  epoch            word 7  cycles           word 1  in_flight: records sent, not yet acknowledged
    word 2  size_bytes       word 8  missed_ticks     word 2  verdict: 0 open, 1 drained, 2 faulted
    word 3  head             word 9  collect_ns       64      slot 0: tail, next_seq, acked, spooled, dropped[7]
    word 4  produced         128     last words:      192     slot 1: the same
    word 5  dropped                  length, text
    4096    the records: size_bytes, a power of two

    a record:  length u32 | crc32 u32 | seq u64 | payload | padding to 8
               the CRC covers length, seq and payload; length 0 marks a record its producer had to reject

Invariants:
* Positions (head, tail) and sequence numbers only grow; a position's place is the position modulo the size.
* `produced` counts every sequence number handed out, also those of records that found no room (`dropped`), so a gap in
  the sequence is exactly what was dropped there. A producer killed between the two leaves `produced` one ahead.
* The consumer copies a record before it verifies it. A torn, stale or hostile record is never returned (plain stores
  reach other cores unordered on ARM64, so a head seen is not yet a record seen).
* Tail, next_seq and the tallies change together, by one store to the selector: whatever instant the consumer is killed
  at, its successor finds them consistent.
* An epoch has one producer, ever. Its ring is drained and thrown away, never reused.
"""

from __future__ import annotations

import enum
import struct
import sys
import zlib
from dataclasses import dataclass

from kon_agent.errors import RingError

MAGIC = int.from_bytes(b"KONRING1", sys.byteorder)
DATA_OFFSET = 4096  # one page of words, so that records start page-aligned
CONSUMER_BYTES = 4096  # one page
MAX_RECORD_BYTES = 4096  # one page; a metric with ten long labels is some 600 bytes
TORN_PATIENCE_NS = 1_000_000_000  # stores become visible within microseconds; a second is a broken producer
LAST_WORDS_BYTES = 240
READ_ATTEMPTS = 100  # a consumer commits a few times a second: a second collision in a row is already unheard of

_RECORD = struct.Struct("=IIQ")
_CRC_PREFIX = struct.Struct("=IQ")
_LAST_WORDS_OFFSET = 128
_SLOT_OFFSETS = (64, 192)
_PLAUSIBLE_MAX = 1 << 53  # a count no producer reaches in a lifetime
_PLAUSIBLE_TICKS = 1 << 40  # a thousand years of the shortest period; a total over many producers stays a sane number


class Drop(enum.IntEnum):
    """Why a record was lost; the wire's `LossReason` numbers."""

    RING_FULL = 1
    SPOOL_EVICTED = 2
    SPOOL_CORRUPT = 3
    WORKER_CRASH = 4
    REJECTED = 5
    EXPIRED = 6


class Verdict(enum.IntEnum):
    """What the consumer has concluded about a ring."""

    OPEN = 0
    DRAINED = 1
    FAULTED = 2


_DROPS = len(Drop) + 1
_SLOT = struct.Struct(f"={4 + _DROPS}Q")


@dataclass(frozen=True, slots=True)
class Record:
    """A committed record: its sequence number and its encoded bytes; no bytes where the producer rejected it."""

    seq: int
    payload: bytes


@dataclass(slots=True)
class Tally:
    """How far the consumer has come, and what became of what it passed.

    Invariant: next_seq = acked + spooled + sum(dropped).
    """

    tail: int = 0
    next_seq: int = 0
    acked: int = 0
    spooled: int = 0
    dropped: list[int] | None = None  # indexed by Drop

    def __post_init__(self) -> None:
        if self.dropped is None:
            self.dropped = [0] * _DROPS

    def drops(self) -> dict[Drop, int]:
        """Return the non-zero drops by reason."""
        assert self.dropped is not None
        return {drop: self.dropped[drop] for drop in Drop if self.dropped[drop]}


def producer_bytes(size_bytes: int) -> int:
    """Return the size of the producer's area of a ring that holds `size_bytes` of records."""
    return DATA_OFFSET + size_bytes


def format_ring(producer: memoryview, epoch: int, size_bytes: int) -> None:
    """Make a zeroed producer's area a ring of `epoch`."""
    words = producer[:DATA_OFFSET].cast("Q")
    words[1], words[2] = epoch, size_bytes
    words[0] = MAGIC


class Producer:
    """The worker's end.

    Args:
        memory: the producer's area, writable.
        consumer: the consumer's area, read-only.
    """

    def __init__(self, memory: memoryview, consumer: memoryview) -> None:
        self._words = memory[:DATA_OFFSET].cast("Q")
        self._text = memory[_LAST_WORDS_OFFSET : _LAST_WORDS_OFFSET + 8 + LAST_WORDS_BYTES]
        self._data = memory[DATA_OFFSET:]
        self._size = self._words[2]
        self._consumer = consumer
        self._selector = consumer[:8].cast("Q")
        self._head = self._words[3]
        self._seq = self._words[4]

    def publish(self, payload: bytes) -> bool:
        """Append one encoded record; return False where the ring was full and the record was dropped and counted."""
        if len(payload) > MAX_RECORD_BYTES:
            return self.reject()
        return self._append(payload)

    def reject(self) -> bool:
        """Leave a mark for a record that cannot be delivered, so that its loss is counted where it happened."""
        return self._append(b"")

    def _append(self, payload: bytes) -> bool:
        seq = self._seq
        self._seq = seq + 1
        self._words[4] = self._seq  # first, so that dying below is one record counted, not one forgotten
        need = record_bytes(len(payload))
        if need > self._size - (self._head - self._tail()):
            self._words[5] += 1
            return False
        crc = zlib.crc32(payload, zlib.crc32(_CRC_PREFIX.pack(len(payload), seq)))
        record = (_RECORD.pack(len(payload), crc, seq) + payload).ljust(need, b"\0")
        start = self._head & (self._size - 1)
        room = self._size - start
        self._data[start : start + min(need, room)] = record[:room]
        if need > room:
            self._data[: need - room] = record[room:]
        self._head += need
        self._words[3] = self._head
        return True

    def _tail(self) -> int:
        for _ in range(READ_ATTEMPTS):
            count = self._selector[0]
            offset = _SLOT_OFFSETS[count & 1]
            tail = int.from_bytes(self._consumer[offset : offset + 8], sys.byteorder)
            if self._selector[0] == count:  # else the slot may have been rewritten under our hands
                return min(tail, self._head)
        return self._head - self._size  # a consumer gone mad: take the ring for full

    def beat(self, now_ns: int, collect_ns: int, missed_ticks: int) -> None:
        """Say that a cycle has ended: when, how long it took, and how many ticks have been skipped so far."""
        self._words[9] = collect_ns
        self._words[8] = missed_ticks
        self._words[7] += 1
        self._words[6] = now_ns

    def say(self, text: str) -> None:
        """Leave last words for the supervisor to show: why this worker is about to end."""
        data = text.encode("utf-8", "replace")[:LAST_WORDS_BYTES]
        self._text[8 : 8 + len(data)] = data
        self._text[:8] = len(data).to_bytes(8, sys.byteorder)


class Consumer:
    """The sender's end.

    Reading moves a cursor that only this process knows; `commit` moves the tail. A consumer opened on a ring another
    one has left behind starts reading at the tail: what was in flight is read again.

    Args:
        producer: the producer's area, read-only.
        memory: the consumer's area, writable.
        size_bytes: the ring's size as its creator knows it; the producer's own word is not believed.
    """

    def __init__(self, producer: memoryview, memory: memoryview, size_bytes: int) -> None:
        self._words = producer[:DATA_OFFSET].cast("Q")
        self._data = producer[DATA_OFFSET:]
        self._size = size_bytes
        self._memory = memory
        self._mine = memory[:64].cast("Q")
        self.tally = _read_tally(memory)
        self.cursor = self.tally.tail
        self.cursor_seq = self.tally.next_seq
        self._torn_since_ns: int | None = None

    def rewind(self) -> None:
        """Go back to the tail: everything not committed will be read again."""
        self.cursor, self.cursor_seq = self.tally.tail, self.tally.next_seq

    def unread_bytes(self) -> int:
        """Return how many bytes lie between the cursor and the head."""
        return max(0, self._words[3] - self.cursor)

    def used_bytes(self) -> int:
        """Return how many bytes lie between the tail and the head."""
        return max(0, self._words[3] - self.tally.tail)

    def read(self, now_ns: int) -> Record | None:
        """Return the record at the cursor and move past it; None where there is none, or not yet.

        A record whose `seq` is beyond `cursor_seq` says that those between were dropped at the full ring; the caller
        compares before it calls.

        Raises:
            RingError: the producer's area holds what no producer of ours writes.
        """
        head = self._words[3]
        if head == self.cursor:
            return None
        if not 0 < head - self.cursor <= self._size - (self.cursor - self.tally.tail) or head & 7:
            raise RingError(f"head {head} is impossible with cursor {self.cursor} and {self._size} bytes")
        record = copy_record(self._data, self._size, self.cursor, head - self.cursor)
        if record is None or record.seq < self.cursor_seq:
            if self._torn_since_ns is None:
                self._torn_since_ns = now_ns
            if now_ns - self._torn_since_ns > TORN_PATIENCE_NS:
                raise RingError(f"the record at {self.cursor} stays torn")
            return None
        self._torn_since_ns = None
        self.cursor += record_bytes(len(record.payload))
        self.cursor_seq = record.seq + 1
        return record

    def trailing_losses(self, full_in_flight: int) -> list[tuple[Drop, int]]:
        """Return what a dead producer lost after its last committed record; asked once the cursor stands at the head.

        Args:
            full_in_flight: ring-full drops the caller has met but not committed yet.
        """
        assert self.tally.dropped is not None
        trailing = min(self._words[4], _PLAUSIBLE_MAX) - self.cursor_seq
        if trailing <= 0:
            return []
        full = min(trailing, max(0, self._words[5] - self.tally.dropped[Drop.RING_FULL] - full_in_flight))
        losses = [(Drop.RING_FULL, full), (Drop.WORKER_CRASH, trailing - full)]
        return [(drop, count) for drop, count in losses if count]

    def commit(self, tally: Tally) -> None:
        """Make `tally` the truth, at once and whole."""
        assert tally.dropped is not None
        assert tally.next_seq == tally.acked + tally.spooled + sum(tally.dropped), tally
        count = self._mine[0] + 1
        _SLOT.pack_into(
            self._memory,
            _SLOT_OFFSETS[count & 1],
            tally.tail,
            tally.next_seq,
            tally.acked,
            tally.spooled,
            *tally.dropped,
        )
        self._mine[0] = count
        self.tally = tally

    def set_in_flight(self, records: int) -> None:
        """Show how many records have been sent and not yet acknowledged."""
        self._mine[1] = records

    def conclude(self, verdict: Verdict) -> None:
        """Say that nothing more will come of this ring."""
        self._mine[1] = 0
        self._mine[2] = verdict


@dataclass(frozen=True, slots=True)
class RingStats:
    """A ring as the supervisor sees it: `produced = acked + in_flight + in_ring + spooled + sum(dropped)`."""

    produced: int
    acked: int
    in_flight: int
    in_ring: int
    spooled: int
    dropped: dict[Drop, int]
    used_bytes: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Pulse:
    """A worker's sign of life: `heartbeat_ns` is 0 before its first cycle has ended."""

    heartbeat_ns: int
    cycles: int
    missed_ticks: int
    collect_ns: int


class Observer:
    """The supervisor's view: fixed-size words, range-checked, nothing else.

    Args:
        producer: the producer's area, read-only.
        consumer: the consumer's area, read-only.
        size_bytes: the ring's size.
    """

    def __init__(self, producer: memoryview, consumer: memoryview, size_bytes: int) -> None:
        self._words = producer[:DATA_OFFSET].cast("Q")
        self._text = producer[_LAST_WORDS_OFFSET : _LAST_WORDS_OFFSET + 8 + LAST_WORDS_BYTES]
        self._consumer = consumer
        self._consumer_words = consumer[:64].cast("Q")
        self._size = size_bytes

    def stats(self) -> RingStats:
        """Return the ring's terms of the conservation law.

        The consumer's words are read first: what its producer adds meanwhile then shows up as still in the ring. And
        its verdict before its tally: a concluded ring's tally is the last one, which one read before would not be.
        """
        verdict = Verdict(min(self._consumer_words[2], Verdict.FAULTED))  # one read: it may change between two
        tally = _read_tally(self._consumer)
        dropped = tally.drops()
        passed_full = dropped.get(Drop.RING_FULL, 0)
        full = max(passed_full, min(self._words[5], _PLAUSIBLE_MAX))
        produced = max(tally.next_seq, min(self._words[4], _PLAUSIBLE_MAX))
        waiting = produced - tally.next_seq
        if verdict is Verdict.OPEN:
            pending_full = min(full - passed_full, waiting)
        else:  # a concluded ring's words no longer count: what its consumer passed is all there was
            pending_full, waiting, produced = 0, 0, tally.next_seq
        if pending_full:
            dropped[Drop.RING_FULL] = passed_full + pending_full
        in_flight = min(self._consumer_words[1], waiting - pending_full)
        used = self._words[3] - tally.tail
        return RingStats(
            produced=produced,
            acked=tally.acked,
            in_flight=in_flight,
            in_ring=waiting - pending_full - in_flight,
            spooled=tally.spooled,
            dropped=dropped,
            used_bytes=used if 0 <= used <= self._size else self._size,
            verdict=verdict,
        )

    def pulse(self) -> Pulse:
        """Return the producer's heartbeat and what came with it."""
        return Pulse(self._words[6], self._words[7], min(self._words[8], _PLAUSIBLE_TICKS), self._words[9])

    def last_words(self) -> str:
        """Return what the producer left to be shown, printable characters only; empty where it left nothing."""
        length = min(int.from_bytes(self._text[:8], sys.byteorder), LAST_WORDS_BYTES)
        text = bytes(self._text[8 : 8 + length]).decode("utf-8", "replace")
        return "".join(char if char.isprintable() else " " for char in text)


def copy_record(data: memoryview, size_bytes: int, position: int, available: int) -> Record | None:
    """Copy the record at a position out of a ring and return the copy; None where it is not one.

    Args:
        data: the records' part of the producer's area.
        size_bytes: how much that is.
        available: bytes from the position to the head.
    """
    if available < _RECORD.size:
        return None
    length, crc, seq = _RECORD.unpack(_copy(data, size_bytes, position, _RECORD.size))
    if length > MAX_RECORD_BYTES or record_bytes(length) > available:
        return None
    payload = _copy(data, size_bytes, position + _RECORD.size, length)
    if zlib.crc32(payload, zlib.crc32(_CRC_PREFIX.pack(length, seq))) != crc or seq >= _PLAUSIBLE_MAX:
        return None
    return Record(seq, payload)


def _copy(data: memoryview, size_bytes: int, position: int, length: int) -> bytes:
    start = position & (size_bytes - 1)
    room = size_bytes - start
    if length <= room:
        return bytes(data[start : start + length])
    return bytes(data[start:]) + bytes(data[: length - room])


def record_bytes(length: int) -> int:
    """Return how much of a ring a record takes whose payload has `length` bytes."""
    return (_RECORD.size + length + 7) & ~7


def _read_tally(consumer: memoryview) -> Tally:
    selector = consumer[:8].cast("Q")
    for _ in range(READ_ATTEMPTS):
        count = selector[0]
        tail, next_seq, acked, spooled, *dropped = _SLOT.unpack_from(consumer, _SLOT_OFFSETS[count & 1])
        if selector[0] == count:  # the slot it names is rewritten only after the next commit is complete
            break
    return Tally(tail, next_seq, acked, spooled, dropped)
