"""The spool: a log of segments, appended to while nobody can be reached, read from its oldest end when somebody can.

Owns the segments' order, the quota, and what is in flight. Time is an argument, the disk a `disk.Disk`.

Invariants:
* `store` returns only when every entry is durable; what it could not make durable is still the caller's, all of it.
* A record is pending until it is acknowledged, or its loss is acknowledged or durable. Never is it neither, whatever
  is killed when: a segment is removed after what remained of it has been declared, not before.
* The folder never takes more than `max_bytes` on disk: the oldest segment that is not in flight goes first.
* Memory does not grow with the backlog: of each segment its index is known, of one its bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from kon_agent.errors import SpoolError
from kon_agent.spool import lock, segment, survey
from kon_agent.spool.disk import BLOCK_BYTES, NAME_BYTES, Disk, on_disk
from kon_agent.spool.frame import HEAD_BYTES, Entry
from kon_agent.spool.limits import MIN_BYTES, Limits
from kon_agent.spool.portion import Portion, cut
from kon_agent.spool.reader import Chunk, Reader, records_before
from kon_agent.spool.segment import MAX_INDEX_BYTES, Contents, Reason, Segment, Stream
from kon_agent.spool.writer import Writer

__all__ = ["Chunk", "Reason", "Spool"]

log = logging.getLogger(__name__)

# A new segment's header, which repeats the one before, and its own summary
OVERHEAD_BYTES = on_disk(2 * (HEAD_BYTES + MAX_INDEX_BYTES)) + BLOCK_BYTES
# Kept free so that what remains of a segment can be declared lost before it is removed
RESERVE_BYTES = OVERHEAD_BYTES + on_disk(MAX_INDEX_BYTES)
STATE_BYTES = on_disk(HEAD_BYTES + MAX_INDEX_BYTES)
MAX_CARRIED_BYTES = MAX_INDEX_BYTES // 4  # of losses handed on from segment to segment: they must not fill the spool
MAX_EXPIRED_AT_ONCE = 4  # segments removed for their age by one `store`: each costs a sync
MAX_EVICTED_AT_ONCE = 1024  # segments evicted by one `store`; so many are only ever removed where the quota shrank
CLOCK_SET_S = 1_577_836_800.0  # 2020: a clock that shows less has not been set since the machine was switched on
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # another file would fare no better


class Spool:
    """One spool folder.

    Args:
        disk: the folder; nobody else uses it.
        limits: what it may take.

    Attributes:
        pending: records held by plugin, those in flight included.
        dropped: records declared lost by plugin and `Reason`, since this object was made.
        undeclared: losses that could only be counted, for there were too many to be declared one by one.
    """

    def __init__(self, disk: Disk, limits: Limits) -> None:
        self.pending: Counter[str] = Counter()
        self.dropped: Counter[tuple[str, int]] = Counter()
        self.undeclared = 0
        self._disk = disk
        self._limits = limits
        self._segments: dict[int, Segment] = {}  # in order; the one being written is not among them
        self._writer = Writer(disk)
        self._reader = Reader(disk)
        self._in_flight: deque[Chunk] = deque()
        self._read_up_to = 0  # number of the last segment read to its end
        self._next_number = 1
        self._litter: dict[str, int] = {}  # files that could not be removed, and what they take on disk
        self._state_bytes = 0
        self._unsafe: set[int] = set()  # segments a predecessor wrote of which we cannot tell whether they are durable

    # Opening and closing.

    def open(self, now_s: float) -> None:
        """Learn what is there, and make durable what a predecessor may not have. No file can make this fail.

        Raises:
            OSError: the folder cannot be read.
        """
        found = survey.survey(self._disk)
        self._state_bytes = found.state_bytes
        # Not below the clock, so that no number is used twice although a folder once emptied has forgotten its last.
        self._next_number = max(found.taken + 1, int(now_s))
        for known in found.segments:
            self._segments[known.number] = known
            self.pending += known.contents.counts() if known.contents else Counter()
            if not known.is_exact:
                self._harden(known)
        for name in found.empty:
            self._remove(name, 0)
        self._expire(now_s)
        with contextlib.suppress(OSError, SpoolError):  # the quota may have shrunk; `store` will say what is wrong
            self._make_room(0, now_s)

    def _harden(self, known: Segment) -> None:
        try:
            self._disk.harden(segment.name_of(known.number))
        except OSError as err:
            log.error("segment %d may not be durable: %s", known.number, _in_words(err))
            self._unsafe.add(known.number)

    def resume(self, number: int, offset: int) -> None:
        """Go on where a predecessor has come to: segment `number` is acknowledged up to position `offset`."""
        self._next_number = max(self._next_number, number + 1)
        known = self._segments.get(number)
        if known is None:
            return
        if offset > known.size:
            for (plugin, _), ranges in known.remaining().items():
                self.pending[plugin] -= ranges.count
            self._forget(known)
            return
        try:
            data = self._disk.read(segment.name_of(number), 0, offset)
        except OSError as err:
            log.error("segment %d cannot be read: %s; what it held is sent again", number, _in_words(err))
            return
        self._settle(known, records_before(data, known))
        known.acked_offset = offset

    def close(self) -> None:
        """Finish the segment being written and note what it holds; losing this costs exactness, not records."""
        self._roll()
        self._sweep()
        if not self._segments:
            return
        data = survey.state_frame(next(reversed(self._segments.values())))
        try:
            if survey.STATE in self._disk.names():
                self._disk.unlink(survey.STATE)
            fd = self._disk.create(survey.STATE)
            try:
                self._state_bytes = on_disk(len(data))
                self._disk.write(fd, data)
                self._disk.sync(fd)
            finally:
                self._disk.close(fd)
        except OSError as err:
            log.warning("the spool could not be closed in order: %s", _in_words(err))

    # Writing.

    def store(self, entries: Sequence[Entry], now_s: float) -> None:
        """Make `entries` durable.

        Raises:
            SpoolError: none of them is kept; why, in words for the operator.
        """
        if self._limits.max_bytes < MIN_BYTES:
            raise SpoolError(
                f"cache.max_size {self._limits.max_bytes} is too small; make it at least {MIN_BYTES} bytes"
            )
        portions = cut(entries, self._limits.segment_bytes)
        self._expire(now_s)
        try:
            self._store(portions, now_s)
        except OSError as first:
            if first.errno in _NO_ROOM:
                raise SpoolError(_in_words(first)) from first
            log.error("the spool goes on in a new segment: %s", _in_words(first))
            try:
                self._store(portions, now_s)
            except OSError as err:
                raise SpoolError(_in_words(err)) from err

    def _store(self, portions: Sequence[Portion], now_s: float) -> None:
        self._sweep()
        self._give_up_expired(now_s)
        need = sum(on_disk(portion.size) + OVERHEAD_BYTES for portion in portions)
        if self._disk.free_bytes() - need < self._limits.min_free_bytes:
            raise OSError(errno.ENOSPC, f"less than cache.min_free ({self._limits.min_free_bytes} bytes) would be left")
        self._make_room(need, now_s)
        before = self._writer.segment
        held = before.contents.copy() if before and before.contents and len(portions) > 1 else None
        size = before.size if before else 0
        first_new = self._next_number
        try:
            for portion in portions:
                self._append(portion, now_s)
        except OSError:
            self._undo(before, held, size, first_new)
            raise

    def _append(self, portion: Portion, now_s: float) -> None:
        """Write `portion` to the segment being written, or to a new one where it does not fit."""
        try:
            if self._writer.segment and not self._writer.fits(*portion[1:], self._limits.segment_bytes):
                self._roll()
            if self._writer.segment is None:
                self._begin(now_s)
            self.pending += self._writer.append(portion.entries, now_s)
        except OSError:
            self._keep(self._writer.segment, self._writer.abandon())
            raise

    def _begin(self, now_s: float) -> None:
        number, self._next_number = self._next_number, self._next_number + 1
        try:
            self._writer.begin(number, next(reversed(self._segments.values()), None), now_s)
        except OSError:
            if self._writer.segment is None:
                self._litter[segment.name_of(number)] = 0  # the file may be there, empty
            raise

    def _undo(self, before: Segment | None, held: Contents | None, size: int, first_new: int) -> None:
        """Take back the portions of a `store` that failed at a later one."""
        if before is not None and before.contents is not None and held is not None:
            self.pending -= before.contents.counts() - held.counts()
            before.contents, before.size, before.checksum = held, size, None
        for known in [known for known in self._segments.values() if known.number >= first_new]:
            self.pending -= known.contents.counts() if known.contents else Counter()
            self._forget(known)

    def _roll(self) -> None:
        """Finish the segment being written."""
        if self._writer.segment is not None:
            self._keep(self._writer.segment, self._writer.finish())

    def _keep(self, written: Segment | None, kept: Segment | None) -> None:
        """Enter a segment that is no longer written, or remove its file where nothing of it was confirmed."""
        if kept is not None:
            self._segments[kept.number] = kept
        elif written is not None:
            self._remove(segment.name_of(written.number), written.disk_bytes)

    # Making room.

    def bytes_on_disk(self) -> int:
        """Return what the spool's files take on disk at most, as `du` counts them."""
        active = self._writer.segment.disk_bytes if self._writer.segment else 0
        files = sum(known.disk_bytes for known in self._segments.values())
        return files + active + sum(self._litter.values()) + self._state_bytes

    def _budget(self) -> int:
        """Return how much of the quota segments may take: not the folder, its lock, the state file, the reserve."""
        folder = on_disk(BLOCK_BYTES + NAME_BYTES * (len(self._segments) + len(self._litter)))
        fixed = folder + BLOCK_BYTES + max(STATE_BYTES, self._state_bytes) + RESERVE_BYTES
        return self._limits.max_bytes - fixed + self._state_bytes

    def _make_room(self, need: int, now_s: float) -> None:
        """Evict the oldest segments until `need` more bytes fit.

        Raises:
            SpoolError: they cannot be made to.
            OSError: the losses cannot be written.
        """
        if need > self._budget():
            raise SpoolError(f"cache.max_size {self._limits.max_bytes} has no room for {need} bytes at once; raise it")
        for _ in range(MAX_EVICTED_AT_ONCE):
            if self.bytes_on_disk() + need <= self._budget():
                return
            victim = next((k for k in self._segments.values() if k.disk_bytes and not self._is_in_flight(k)), None)
            if victim is not None:
                self._give_up(victim, victim.fate or Reason.EVICTED, now_s)
            elif self._writer.segment is not None:
                self._roll()
            else:
                break
        raise SpoolError("cache.max_size is reached, and what there is is being sent or cannot be removed; raise it")

    def _expire(self, now_s: float) -> None:
        """Condemn what is too old. A clock set back makes nothing older, and nothing condemned young again."""
        for known in self._segments.values():
            if known.written_s < CLOCK_SET_S <= now_s:
                known.written_s = now_s  # its age is not known: it is counted from here
            is_old = now_s - known.written_s > self._limits.max_age_s
            if is_old and known.fate is None and not self._is_in_flight(known):
                known.fate = Reason.EXPIRED
                self._stop_reading(known)

    def _give_up_expired(self, now_s: float) -> None:
        expired = [k for k in self._segments.values() if k.fate is Reason.EXPIRED and not self._is_in_flight(k)]
        for known in expired[:MAX_EXPIRED_AT_ONCE]:
            self._give_up(known, Reason.EXPIRED, now_s)

    def _is_in_flight(self, known: Segment) -> bool:
        """Whether something of it has been read and not acknowledged: it may be on its way to the store."""
        return bool(self._in_flight) and self._in_flight[0].number <= known.number <= self._in_flight[-1].number

    def _give_up(self, known: Segment, reason: Reason, now_s: float) -> None:
        """Declare lost what remains of a segment, durably; then remove it."""
        lost = known.as_losses(reason)
        carried = segment.merged(known.contents.losses) if known.contents else []
        most = MAX_CARRIED_BYTES // segment.loss_bytes("")
        declared = segment.merged([*carried[-most:], *lost])
        fitting = MAX_INDEX_BYTES // max((segment.loss_bytes(entry.plugin) for entry in declared), default=1)
        if len(carried) > most or len(declared) > fitting:
            excess = [*carried[:-most], *declared[fitting:]]
            self.undeclared += sum(entry.count for entry in excess)
            log.warning("%d ranges of lost records are too many to be declared, and only counted", len(excess))
        for portion in cut(declared[:fitting], self._limits.segment_bytes):
            self._append(portion, now_s)
        self._note_lost(known, lost)
        self._stop_reading(known)
        self._forget(known)

    def _note_lost(self, known: Segment, lost: Iterable[Entry]) -> None:
        for entry in lost:
            count = known.settle((entry.plugin, entry.epoch), entry.seq, entry.last)
            self.pending[entry.plugin] -= count
            self.dropped[entry.plugin, entry.reason] += count

    def _settle(self, known: Segment, entries: Iterable[Entry]) -> None:
        for stream, first, last in segment.runs(entries):
            self.pending[stream[0]] -= known.settle(stream, first, last)

    def _stop_reading(self, known: Segment) -> None:
        if self._reader.segment is known:
            self._reader.reset()

    def _forget(self, known: Segment) -> None:
        del self._segments[known.number]
        self._unsafe.discard(known.number)
        if known.disk_bytes or known.size:
            self._remove(segment.name_of(known.number), known.disk_bytes)

    def _remove(self, name: str, disk_bytes: int) -> None:
        try:
            self._disk.unlink(name)
        except FileNotFoundError:
            self._litter.pop(name, None)
        except OSError as err:
            if name not in self._litter:
                log.error("the spool's file %s cannot be removed: %s", name, _in_words(err))
            self._litter[name] = disk_bytes
        else:
            self._litter.pop(name, None)

    def _sweep(self) -> None:
        """Try again to remove what could not be removed."""
        for name, disk_bytes in list(self._litter.items()):
            self._remove(name, disk_bytes)

    # Reading.

    def is_empty(self) -> bool:
        """Whether there is nothing to deliver, nor in flight."""
        return not self._segments and self._writer.segment is None

    def read(self, max_records: int, max_bytes: int) -> Chunk | None:
        """Return the next entries, from the oldest on; None where everything has been read.

        Args:
            max_records, max_bytes: bounds of the chunk; both at least 1. Its last record may exceed the second.

        Raises:
            SpoolError: the disk does not give them back.
        """
        known = self._next_to_read()
        if known is None:
            return None
        if self._reader.segment is not known:
            self._load(known)
        chunk = self._reader.take(max_records, max_bytes)
        if chunk.is_last:
            self._read_up_to = known.number
        self._in_flight.append(chunk)
        return chunk

    def _next_to_read(self) -> Segment | None:
        current = self._reader.segment
        if current is not None and current.number > self._read_up_to:
            return current
        for number, known in self._segments.items():
            if number > self._read_up_to:
                return known
        if self._writer.segment is None:
            return None
        self._roll()
        return self._next_to_read()

    def _load(self, known: Segment) -> None:
        was_unknown = known.contents is None
        self._reader.load(known)
        if was_unknown and known.contents is not None:
            self.pending += known.contents.counts()

    def acknowledge(self, chunk: Chunk) -> None:
        """The server has everything in `chunk`, and in the chunks read before it."""
        with contextlib.suppress(ValueError):
            self._in_flight.remove(chunk)
        known = self._segments.get(chunk.number)
        if known is None:
            return
        self._settle(known, chunk.entries)
        self._note_lost(known, chunk.lost)
        known.acked_offset = max(known.acked_offset, min(chunk.end, known.size))
        if chunk.is_last:
            self._stop_reading(known)
            self._forget(known)

    def rewind(self, unacknowledged: Iterable[Chunk]) -> None:
        """Forget what was read and not acknowledged: it will be read again."""
        del unacknowledged  # what is in flight is known here
        self._in_flight.clear()
        self._reader.reset()
        self._read_up_to = 0

    def highest(self) -> dict[Stream, int]:
        """Return the highest sequence number of each stream that is durable."""
        found: dict[Stream, int] = {}
        active = (self._writer.segment,) if self._writer.segment else ()
        for known in (*self._segments.values(), *active):
            if known.contents is None or known.number in self._unsafe:
                continue
            for stream, ranges in known.contents.records.items():
                found[stream] = max(found.get(stream, -1), ranges.highest)
        return found

    def segment_count(self) -> int:
        """Return how many files there are."""
        return sum(known.disk_bytes > 0 for known in self._segments.values()) + (self._writer.segment is not None)

    def oldest_s(self) -> float | None:
        """Return when the oldest segment was last written, wall time in seconds; None where there is none."""
        written = (known.written_s for known in self._segments.values() if known.disk_bytes)
        active = self._writer.segment.written_s if self._writer.segment else None
        return next(written, active)


def _in_words(err: OSError) -> str:
    if err.errno == errno.ENOSPC and "cache.min_free" in str(err):
        return f"{err.args[1]}; free some space"
    advice = {
        errno.ENOSPC: "; free some space, or lower cache.max_size",
        errno.EROFS: "; it may have been remounted after an error, see the kernel's log",
        errno.EIO: "; the disk may be failing, see the kernel's log",
    }
    return f"{err.strerror or type(err).__name__}{advice.get(err.errno or 0, '')}"
