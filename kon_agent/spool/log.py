"""The spool: a log of segments, appended to while nobody can be reached, read from its oldest end when somebody can.

Owns the segments' order, the quota, the damage report and the place reading has come to. Time is an argument, the disk
a `disk.Disk`.

Invariants:
* `store` returns only when every entry is durable; what it could not make durable is still the caller's.
* A file is written by one run of one process and never appended to again: a torn tail stays where it is and is skipped.
* A failed sync is never retried on its file (the kernel may have dropped the pages and forgotten the error): what is
  not known to be durable is written again to a new one.
* The files never take more than `max_bytes` on disk: the oldest segment goes first, its records counted and declared.
* Everything that leaves the spool without having been acknowledged comes out of it as a loss, exactly once.
* Memory does not grow with the backlog: of each segment its ranges are known, of one its bytes.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kon_agent.errors import SpoolError
from kon_agent.ranges import RangeSet
from kon_agent.spool import segment
from kon_agent.spool.disk import Disk, on_disk
from kon_agent.spool.frame import Entry, Kind, decode, encode, frame_bytes, scan
from kon_agent.spool.limits import Limits
from kon_agent.spool.segment import Contents, Stream

log = logging.getLogger(__name__)

MAX_OWED = 4096  # ranges of losses waiting to be declared; adjacent ones are one
MAX_OWED_AT_ONCE = 500  # in one batch or one write: half of what a batch may declare
STATE = "state"  # what the last segment held, written when the spool is closed in order


class Reason(enum.IntEnum):
    """Why the spool loses records; the wire's `LossReason` numbers."""

    EVICTED = 2
    CORRUPT = 3
    EXPIRED = 6


@dataclass(slots=True)
class _Segment:
    number: int
    size: int
    written_s: float
    contents: Contents
    is_exact: bool = True  # its contents are known from a summary, not from what a scan could still read
    checksum: int | None = None  # of everything before the summary frame
    acked: dict[Stream, RangeSet] = field(default_factory=dict)
    acked_offset: int = 0

    def remaining(self) -> dict[Stream, RangeSet]:
        """Return the records nobody has acknowledged yet."""
        rest: dict[Stream, RangeSet] = {}
        for stream, ranges in self.contents.records.items():
            rest[stream] = RangeSet((first, last) for first, last in ranges)
            for first, last in self.acked.get(stream, ()):
                rest[stream].remove(first, last)
        return rest


@dataclass(frozen=True, slots=True)
class Chunk:
    """What was read at once, to be acknowledged at once and in order.

    Attributes:
        entries: records and losses; the first `owed` of them are losses no segment holds yet.
        number, end: the segment they came from, and the offset behind them.
        is_last: whether that is the segment's end.
    """

    entries: list[Entry]
    owed: int
    number: int
    end: int
    is_last: bool


class Spool:
    """One spool folder.

    Args:
        disk: the folder; nobody else uses it.
        limits: what it may take.
    """

    def __init__(self, disk: Disk, limits: Limits) -> None:
        self._disk = disk
        self._limits = limits
        self._segments: list[_Segment] = []  # the oldest first; the one being written is not among them
        self._active: _Segment | None = None
        self._active_fd = -1
        self._active_crc = 0
        self._next_number = 1
        self._reading: int | None = None  # number of the segment in `_data`
        self._data = b""
        self._offset = 0
        self.pending: Counter[str] = Counter()
        self.dropped: Counter[tuple[str, int]] = Counter()  # (plugin, reason), since this object was made
        self._owed: list[Entry] = []

    # Opening and closing.

    def open(self, now_s: float) -> None:
        """Learn what is there. Damage is found when it is read; nothing a file holds can make this fail.

        Raises:
            OSError: the folder cannot be read.
        """
        numbers = sorted(n for name in self._disk.names() if (n := segment.number_of(name)) is not None)
        told = self._read_state()
        self._next_number = max([*numbers, *(number for number, _ in told.items())], default=0) + 1
        for number in numbers:
            self._learn(number, told)
        # A segment cut short still has its summary in the header of the next one, or in the state file.
        for known in self._segments:
            if not known.is_exact and known.number in told:
                known.contents, known.is_exact = told[known.number], True
        for number in sorted(set(told) - set(numbers)):
            if numbers and number > numbers[0]:
                self._lose(told[number].as_losses(Reason.CORRUPT))  # a whole file has vanished
        for known in self._segments:
            for (plugin, _), count in known.contents.counts():
                self.pending[plugin] += count
        self._expire(now_s)

    def _learn(self, number: int, told: dict[int, Contents]) -> None:
        name = segment.name_of(number)
        size = self._disk.size(name)
        head = decode(self._disk.read(name, 0, segment.SUMMARY_READ_BYTES), 0)
        if head is not None and head.kind is Kind.HEADER and not head.is_damaged and head.entry.payload:
            previous = segment.parse_summary(head.entry.payload)
            if previous is not None:
                told[head.entry.epoch] = previous
        start = max(0, size - segment.SUMMARY_READ_BYTES) & ~7
        tail = list(scan(self._disk.read(name, start, size - start)))
        contents = None
        checksum = None
        if tail and tail[-1].kind is Kind.SUMMARY and not tail[-1].is_damaged and start + tail[-1].end == size:
            contents = segment.parse_summary(tail[-1].entry.payload)
            checksum = tail[-1].entry.seq
        known = _Segment(
            number, size, self._disk.modified_s(name), contents or Contents(), contents is not None, checksum
        )
        if contents is None:
            known.contents = segment.scanned(scan(self._disk.read(name, 0, size)))
        self._segments.append(known)

    def _read_state(self) -> dict[int, Contents]:
        try:
            frame = decode(self._disk.read(STATE, 0, segment.SUMMARY_READ_BYTES), 0)
        except OSError:
            return {}
        if frame is None or frame.is_damaged:
            return {}
        contents = segment.parse_summary(frame.entry.payload)
        return {frame.entry.epoch: contents} if contents is not None else {}

    def close(self) -> None:
        """Finish the segment being written and note what it holds; losing this costs exactness, not records."""
        try:
            self._roll()
            with_summary = self._segments[-1] if self._segments else None
            payload = segment.summarize(with_summary.contents) if with_summary else None
            if with_summary is None or payload is None:
                return
            if STATE in self._disk.names():
                self._disk.unlink(STATE)
            fd = self._disk.create(STATE)
            try:
                self._disk.write(fd, encode(Kind.HEADER, 0, Entry("", with_summary.number, 0, payload)))
                self._disk.sync(fd)
            finally:
                self._disk.close(fd)
        except OSError as err:
            log.warning("the spool could not be closed in order: %s", err)

    # Writing.

    def store(self, entries: Sequence[Entry], now_s: float) -> None:
        """Make `entries` durable, and the losses the spool itself has to tell of with them.

        Raises:
            SpoolError: they are not; why, in words for the operator.
        """
        self._expire(now_s)
        try:
            self._store(entries, now_s)
        except OSError as first:
            # What was written to this file since its last sync may or may not be there: start another.
            self._abandon()
            if first.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise SpoolError(_in_words(first)) from first
            log.error("the spool goes on in a new segment: %s", _in_words(first))
            try:
                self._store(entries, now_s)
            except OSError as err:
                self._abandon()
                raise SpoolError(_in_words(err)) from err

    def _store(self, entries: Sequence[Entry], now_s: float) -> None:
        need = sum(map(frame_bytes, entries))
        if self._active is not None and self._active.size + need > self._limits.segment_bytes:
            self._roll()
        self._make_room(need, now_s)
        owed = self._owed[:MAX_OWED_AT_ONCE]
        active = self._active or self._begin(now_s)
        frames = []
        for ordinal, entry in enumerate([*owed, *entries], active.contents.frames):
            frames.append(encode(Kind.LOSS if entry.is_loss else Kind.RECORD, ordinal, entry))
        data = b"".join(frames)
        self._disk.write(self._active_fd, data)
        self._disk.sync(self._active_fd)
        self._active_crc = zlib.crc32(data, self._active_crc)
        active.size += len(data)
        active.written_s = now_s
        for entry in (*owed, *entries):
            active.contents.add(entry)
            if not entry.is_loss:
                self.pending[entry.plugin] += 1
        del self._owed[: len(owed)]

    def _begin(self, now_s: float) -> _Segment:
        number = self._next_number
        self._next_number += 1
        self._active_fd = self._disk.create(segment.name_of(number))
        previous = self._segments[-1] if self._segments else None
        payload = (segment.summarize(previous.contents) or b"") if previous else b""
        data = encode(Kind.HEADER, 0, Entry("", previous.number if previous else 0, number, payload))
        self._active = _Segment(number, 0, now_s, Contents())
        self._disk.write(self._active_fd, data)
        self._active_crc = zlib.crc32(data)
        self._active.size = len(data)
        self._active.contents.frames = 1
        return self._active

    def _roll(self) -> None:
        """Finish the segment being written: its summary behind its last frame."""
        active = self._active
        if active is None:
            return
        payload = segment.summarize(active.contents)
        if payload is not None:
            entry = Entry("", active.number, self._active_crc, payload)
            data = encode(Kind.SUMMARY, active.contents.frames, entry)
            try:
                self._disk.write(self._active_fd, data)
                self._disk.sync(self._active_fd)
                active.size += len(data)
                active.checksum = self._active_crc
            except OSError as err:  # the records are durable; only a later start will have to scan
                log.debug("segment %d has no summary: %s", active.number, err)
        self._finish()

    def _abandon(self) -> None:
        """Leave the segment being written as it was after its last sync."""
        if self._active is not None:
            self._finish()

    def _finish(self) -> None:
        assert self._active is not None
        active, self._active = self._active, None
        fd, self._active_fd = self._active_fd, -1
        try:
            self._disk.close(fd)
        except OSError as err:
            log.debug("segment %d: %s", active.number, err)
        if active.contents.frames > 1:
            self._segments.append(active)
        else:
            self._remove_file(active)

    # Making room.

    def bytes_on_disk(self) -> int:
        """Return what the spool takes on disk, as `du` counts it."""
        active = on_disk(self._active.size) if self._active else 0
        return sum(on_disk(known.size) for known in self._segments) + active

    def _make_room(self, need: int, now_s: float) -> None:
        room = on_disk(need) + on_disk(segment.SUMMARY_READ_BYTES)  # a header and a summary may come with it
        if room > self._limits.max_bytes:
            raise SpoolError(f"cache.max_size {self._limits.max_bytes} is too small for {need} bytes; raise it")
        if self._disk.free_bytes() - need < self._limits.min_free_bytes:
            raise OSError(errno.ENOSPC, f"less than cache.min_free ({self._limits.min_free_bytes} bytes) would be left")
        while self.bytes_on_disk() + room > self._limits.max_bytes:
            oldest = next((known for known in self._segments if not self._is_in_use(known)), None)
            if oldest is not None:
                self._drop(oldest, Reason.EVICTED)
            elif self._active is not None and self._reading is None:
                self._roll()
            else:
                raise SpoolError("cache.max_size is reached and its only segment is being sent; raise cache.max_size")

    def _expire(self, now_s: float) -> None:
        for known in list(self._segments):
            if now_s - known.written_s > self._limits.max_age_s and not self._is_in_use(known):
                self._drop(known, Reason.EXPIRED)

    def _is_in_use(self, known: _Segment) -> bool:
        """Whether something of it has been read and not acknowledged: it may be on its way to the store."""
        return self._reading is not None and known.number <= self._reading

    def _drop(self, known: _Segment, reason: Reason) -> None:
        """Give up a segment: what it still had to deliver becomes losses."""
        gone = [loss for loss in known.contents.losses if known.acked_offset == 0]
        for (plugin, epoch), ranges in known.remaining().items():
            for first, last in ranges:
                gone.append(Entry(plugin, epoch, first, count=last - first + 1, reason=reason))
                self.pending[plugin] -= last - first + 1
                self.dropped[plugin, reason] += last - first + 1
        self._lose(gone)
        self._remove_file(known)
        self._segments.remove(known)

    def _lose(self, losses: Iterable[Entry]) -> None:
        for loss in losses:
            for at, owed in enumerate(self._owed):
                is_same = (owed.plugin, owed.epoch, owed.reason) == (loss.plugin, loss.epoch, loss.reason)
                if is_same and owed.seq + owed.count == loss.seq:
                    self._owed[at] = Entry(owed.plugin, owed.epoch, owed.seq, b"", owed.count + loss.count, owed.reason)
                    break
            else:
                self._owed.append(loss)
        if len(self._owed) > MAX_OWED:
            log.warning("%d ranges of lost records can no longer be declared, only counted", len(self._owed) - MAX_OWED)
            del self._owed[: len(self._owed) - MAX_OWED]

    def _remove_file(self, known: _Segment) -> None:
        try:
            self._disk.unlink(segment.name_of(known.number))
        except FileNotFoundError:
            pass
        except OSError as err:
            log.error("segment %d cannot be removed: %s", known.number, _in_words(err))

    # Reading.

    def is_empty(self) -> bool:
        """Whether there is nothing to read."""
        return not self._segments and self._active is None and not self._owed

    def read(self, max_records: int, max_bytes: int) -> Chunk | None:
        """Return the next entries, from the oldest on; None where everything has been read.

        Raises:
            SpoolError: the disk does not give them back.
        """
        while True:
            known = self._current()
            if known is None:
                return None
            chunk = self._take(known, max_records, max_bytes)
            if chunk.entries or chunk.is_last:
                return chunk

    def _current(self) -> _Segment | None:
        """Return the segment to read from, its bytes loaded."""
        known = next((k for k in self._segments if self._reading is None or k.number >= self._reading), None)
        if known is not None and known.number == self._reading and self._offset >= len(self._data):
            known = next((k for k in self._segments if k.number > known.number), None)
        if known is None:
            if self._active is None:
                return None
            self._roll()
            return self._current()
        if known.number != self._reading:
            self._load(known)
        return known

    def _load(self, known: _Segment) -> None:
        try:
            data = self._disk.read(segment.name_of(known.number), 0, known.size)
        except OSError as err:
            if isinstance(err, FileNotFoundError):
                data = b""  # somebody removed it: all it held is damage
            else:
                raise SpoolError(_in_words(err)) from err
        self._reading, self._data, self._offset = known.number, data, known.acked_offset
        if known.acked_offset == 0 and known.checksum is not None:
            end = len(data) - segment.summary_frame_bytes(segment.summarize(known.contents) or b"")
            if len(data) == known.size and zlib.crc32(data[:end]) == known.checksum:
                return  # every byte is as it was written
        self._report_damage(known)

    def _report_damage(self, known: _Segment) -> None:
        """Turn the records a segment should hold and does not into losses."""
        if known.acked_offset:
            return
        whole: dict[Stream, RangeSet] = {}
        for frame in scan(self._data):
            if frame.kind is Kind.RECORD and not frame.is_damaged:
                stream = (frame.entry.plugin, frame.entry.epoch)
                whole.setdefault(stream, RangeSet()).add(frame.entry.seq, frame.entry.seq)
        lost = []
        for (plugin, epoch), ranges in known.contents.records.items():
            held = whole.get((plugin, epoch), RangeSet())
            for first, last in ranges:
                for low, high in held.absent(first, last):
                    lost.append(Entry(plugin, epoch, low, count=high - low + 1, reason=Reason.CORRUPT))
        for loss in lost:
            self.pending[loss.plugin] -= loss.count
            self.dropped[loss.plugin, Reason.CORRUPT] += loss.count
            known.acked.setdefault((loss.plugin, loss.epoch), RangeSet()).add(loss.seq, loss.seq + loss.count - 1)
        if lost:
            count = sum(loss.count for loss in lost)
            log.error("segment %d is damaged: %d records are lost and declared so", known.number, count)
        self._lose(lost)

    def _take(self, known: _Segment, max_records: int, max_bytes: int) -> Chunk:
        entries = self._owed[:MAX_OWED_AT_ONCE]
        owed = len(entries)
        del self._owed[:owed]
        size = 0
        while len(entries) < max_records and size < max_bytes and self._offset < len(self._data):
            frame = next(scan(self._data, self._offset), None)
            if frame is None:
                self._offset = len(self._data)
                break
            self._offset = frame.end
            if frame.kind in (Kind.RECORD, Kind.LOSS) and not frame.is_damaged:
                entries.append(frame.entry)
                size += len(frame.entry.payload)
        is_last = self._offset >= len(self._data)
        return Chunk(entries, owed, known.number, self._offset, is_last)

    def acknowledge(self, chunk: Chunk) -> None:
        """The server has everything in `chunk`, and in the chunks read before it."""
        known = next((k for k in self._segments if k.number == chunk.number), None)
        if known is None:
            return
        for entry in chunk.entries:
            if not entry.is_loss:
                self.pending[entry.plugin] -= 1
                known.acked.setdefault((entry.plugin, entry.epoch), RangeSet()).add(entry.seq, entry.seq)
        known.acked_offset = chunk.end
        if chunk.is_last:
            self._remove_file(known)
            self._segments.remove(known)
            if self._reading == known.number:
                self._reading, self._data, self._offset = None, b"", 0

    def rewind(self, unacknowledged: Iterable[Chunk]) -> None:
        """Forget what was read and not acknowledged: it will be read again."""
        for chunk in unacknowledged:
            self._lose(chunk.entries[: chunk.owed])
        self._reading, self._data, self._offset = None, b"", 0

    def resume(self, number: int, offset: int) -> None:
        """Go on where a predecessor has come to: everything before `offset` of segment `number` is acknowledged."""
        for known in [known for known in self._segments if known.number <= number]:
            if known.number < number:
                self._forget_acknowledged(known)
                continue
            try:
                data = self._disk.read(segment.name_of(number), 0, offset)
            except OSError as err:
                log.error("segment %d cannot be read: %s; what it held is sent again", number, _in_words(err))
                continue
            for frame in scan(data):
                if frame.kind is Kind.RECORD and not frame.is_damaged:
                    entry = frame.entry
                    known.acked.setdefault((entry.plugin, entry.epoch), RangeSet()).add(entry.seq, entry.seq)
                    self.pending[entry.plugin] -= 1
            known.acked_offset = offset

    def _forget_acknowledged(self, known: _Segment) -> None:
        for (plugin, _), count in known.contents.counts():
            self.pending[plugin] -= count
        self._remove_file(known)
        self._segments.remove(known)

    def highest(self) -> dict[Stream, int]:
        """Return the highest sequence number of each stream that is on disk."""
        found: dict[Stream, int] = {}
        for known in (*self._segments, *([self._active] if self._active else ())):
            for stream, ranges in known.contents.records.items():
                found[stream] = max(found.get(stream, -1), max(last for _, last in ranges))
        return found

    def segment_count(self) -> int:
        """Return how many files there are."""
        return len(self._segments) + (self._active is not None)

    def oldest_s(self) -> float | None:
        """Return when the oldest segment was last written, wall time in seconds; None where there is none."""
        known = self._segments[0] if self._segments else self._active
        return known.written_s if known else None


def _in_words(err: OSError) -> str:
    if err.errno == errno.ENOSPC and "cache.min_free" in str(err):
        return f"{err.args[1]}; free some space"
    advice = {
        errno.ENOSPC: "; free some space, or lower cache.max_size",
        errno.EROFS: "; it may have been remounted after an error, see the kernel's log",
        errno.EIO: "; the disk may be failing, see the kernel's log",
    }
    return f"{os.strerror(err.errno or 0)}{advice.get(err.errno or 0, '')}"
