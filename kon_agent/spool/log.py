"""The spool: a log of segments, appended to while nobody can be reached, read from its oldest end when somebody can.

Owns the quota, the age limit and what is in flight. Time is an argument, the disk a `disk.Disk`.

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
from collections import deque
from collections.abc import Iterable, Sequence

from kon_agent.errors import SpoolError
from kon_agent.spool import quota, segment, survey
from kon_agent.spool.disk import BLOCK_BYTES, Disk, in_words, on_disk
from kon_agent.spool.frame import Entry
from kon_agent.spool.inventory import Inventory, raise_to
from kon_agent.spool.limits import MIN_BYTES, Limits
from kon_agent.spool.portion import Portion, cut
from kon_agent.spool.reader import Chunk, Reader
from kon_agent.spool.segment import Contents, Reason, Segment, Stream
from kon_agent.spool.takeover import take_over
from kon_agent.spool.writer import Writer

__all__ = ["Chunk", "Limits", "Reason", "Spool"]

log = logging.getLogger(__name__)

MAX_CARRIED = 64  # losses handed on from segment to segment: they must not fill the spool
MAX_EXPIRED_AT_ONCE = 4  # segments removed for their age by one `store`: each costs a sync
MAX_EVICTED_AT_ONCE = 1024  # by one `store`: a quota of 1 GiB can be halved at a start
CLOCK_SET_S = 1_577_836_800.0  # 2020: a clock that shows less has not been set since the machine was switched on
MAX_FIRST_NUMBER = 10**11  # a tenth of what a file's name can say, and the year 5138
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # another file would fare no better


class Spool:
    """One spool folder.

    Args:
        disk: the folder; nobody else uses it.
        limits: what it may take.

    Attributes:
        pending: records held by plugin, those in flight included.
        dropped: records declared lost by plugin and `Reason`, since this object was made.
        undeclared: losses that could only be counted: there were too many to be declared one by one.
    """

    def __init__(self, disk: Disk, limits: Limits) -> None:
        self._disk = disk
        self._limits = limits
        self._inventory = Inventory(disk)
        self._writer = Writer(disk)
        self._reader = Reader(disk)
        self._in_flight: deque[Chunk] = deque()
        self._read_up_to = 0  # number of the last segment read to its end
        self._next_number = 1
        self._state_bytes = 0
        self.pending = self._inventory.pending
        self.dropped = self._inventory.dropped
        self.undeclared = 0

    # Opening and closing.

    def open(self, now_s: float) -> None:
        """Learn what is there, and make durable what a predecessor may not have. No file can make this fail.

        Raises:
            OSError: the folder cannot be read.
        """
        found = survey.survey(self._disk)
        self._state_bytes = found.state_bytes
        # Not below the clock: a folder once emptied has forgotten its last number, and none may be used twice.
        self._next_number = max(found.taken + 1, min(int(now_s), MAX_FIRST_NUMBER))
        for known in found.segments:
            self._inventory.add(known)
            self._inventory.count(known.contents)
            if not known.is_exact:
                self._harden(known)
        for name in found.empty:
            self._inventory.remove(name, 0)
        self._expire(now_s)
        with contextlib.suppress(OSError, SpoolError):  # the quota may have shrunk; `store` will say what is wrong
            self._make_room(0, now_s)

    def _harden(self, known: Segment) -> None:
        try:
            self._disk.harden(segment.name_of(known.number))
        except OSError as err:
            log.error("segment %d may not be durable: %s", known.number, in_words(err))
            known.is_durable = False

    def resume(self, number: int, position: int) -> None:
        """Go on where a predecessor has come to: segment `number` is acknowledged up to `position`, a chunk's end."""
        self._next_number = max(self._next_number, number + 1)
        take_over(self._disk, self._inventory, number, position)

    def close(self) -> None:
        """Finish the segment being written and note what it holds; losing this costs exactness, not records."""
        self._roll()
        self._inventory.sweep()
        newest = self._inventory.newest()
        if newest is None:
            return
        data = survey.state_frame(newest)
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
            log.warning("the spool could not be closed in order: %s", in_words(err))

    # Writing.

    def store(self, entries: Sequence[Entry], now_s: float) -> None:
        """Make `entries` durable.

        Raises:
            SpoolError: none of them is kept; why, in words for the operator.
        """
        limits = self._limits
        if limits.max_bytes < MIN_BYTES:
            raise SpoolError(f"cache.max_size {limits.max_bytes} is too small; make it {MIN_BYTES} bytes or more")
        portions = cut(entries, limits.segment_bytes)
        self._expire(now_s)
        try:
            self._store(portions, now_s)
        except OSError as first:
            if first.errno in _NO_ROOM:
                raise SpoolError(in_words(first)) from first
            log.error("the spool goes on in a new segment: %s", in_words(first))
            try:
                self._store(portions, now_s)
            except OSError as err:
                raise SpoolError(in_words(err)) from err

    def probe(self) -> None:
        """Find out whether the disk takes data, by giving it a file and taking it back.

        Raises:
            SpoolError: it does not; why, in words for the operator.
        """
        try:
            self._check_free(0)
            if survey.PROBE in self._disk.names():  # a predecessor was killed here
                self._disk.unlink(survey.PROBE)
            if self._room() < BLOCK_BYTES:
                return  # the quota is the limit, not the disk
            fd = self._disk.create(survey.PROBE)
            try:
                self._disk.write(fd, b"\0")
                self._disk.sync(fd)
            finally:
                self._disk.close(fd)
                self._disk.unlink(survey.PROBE)
        except OSError as err:
            raise SpoolError(in_words(err)) from err

    def _check_free(self, need: int) -> None:
        if self._disk.free_bytes() - need < self._limits.min_free_bytes:
            raise SpoolError(f"less than cache.min_free ({self._limits.min_free_bytes} bytes) is left; free some space")

    def _store(self, portions: Sequence[Portion], now_s: float) -> None:
        self._inventory.sweep()
        need = self._cost(portions)
        self._check_free(need)
        self._give_up_condemned(now_s)
        self._make_room(need, now_s)
        before, first_new = self._writer.segment, self._next_number
        held = before.contents.copy() if before and before.contents and len(portions) > 1 else None
        size = before.size if before else 0
        try:
            for portion in portions:
                self._append(portion, now_s)
        except OSError:
            self._undo(before, held, size, first_new)
            raise

    def _append(self, portion: Portion, now_s: float) -> None:
        """Write `portion` to the segment being written, or to a new one where it does not fit."""
        try:
            if not self._writer.fits(portion, self._limits.segment_bytes):
                self._roll()
                number, self._next_number = self._next_number, self._next_number + 1
                self._writer.begin(number, self._inventory.newest(), now_s)
            self.pending.update(self._writer.append(portion.entries, now_s))
        except OSError:
            self._keep(self._writer.segment, self._writer.abandon())
            raise

    def _undo(self, before: Segment | None, held: Contents | None, size: int, first_new: int) -> None:
        """Take back the portions of a `store` that failed at a later one."""
        if before is not None and held is not None:
            self._inventory.uncount(before.contents)
            self._inventory.count(held)
            before.contents, before.size, before.checksum = held, size, None
        for known in self._inventory:
            if known.number >= first_new:
                self._inventory.uncount(known.contents)
                self._inventory.forget(known)

    def _roll(self) -> None:
        """Finish the segment being written, if there is one."""
        if self._writer.segment is not None:
            self._keep(self._writer.segment, self._writer.finish())

    def _keep(self, written: Segment | None, kept: Segment | None) -> None:
        """Enter a segment that is no longer written, or remove its file where nothing of it was confirmed."""
        if kept is not None:
            self._inventory.add(kept)
        elif written is not None:
            self._inventory.remove(segment.name_of(written.number), written.disk_bytes)

    # Making room.

    def bytes_on_disk(self) -> int:
        """Return what the spool's files take on disk at most, as `du` counts them."""
        return self._segment_bytes() + self._state_bytes

    def _segment_bytes(self) -> int:
        active = self._writer.segment.disk_bytes if self._writer.segment else 0
        return self._inventory.disk_bytes() + active

    def _room(self) -> int:
        """Return what segments may still take, the reserve included."""
        return quota.for_segments(self._limits, self._inventory.name_count()) - self._segment_bytes()

    def _cost(self, portions: Sequence[Portion]) -> int:
        return quota.cost(portions, self._writer.segment or self._inventory.newest())

    def _make_room(self, need: int, now_s: float) -> None:
        """Evict the oldest segments until `need` more bytes fit.

        Raises:
            SpoolError: they cannot be made to.
            OSError: the losses cannot be written.
        """
        need += quota.RESERVE_BYTES
        if need > self._room() + self._segment_bytes():
            raise SpoolError(f"cache.max_size {self._limits.max_bytes} has no room for {need} bytes at once; raise it")
        for _ in range(MAX_EVICTED_AT_ONCE):
            if need <= self._room():
                return
            victim = next((known for known in self._inventory if not self._is_in_flight(known)), None)
            if victim is not None:
                self._give_up(victim, victim.fate or Reason.EVICTED, now_s)
            elif self._writer.segment is not None:
                self._roll()
            else:
                break
        raise SpoolError("cache.max_size is reached, and what there is is being sent or cannot be removed; raise it")

    def _expire(self, now_s: float) -> None:
        """Condemn what is too old. A clock set back makes nothing older, and nothing condemned young again."""
        for known in self._inventory:
            if known.written_s < CLOCK_SET_S <= now_s:
                known.written_s = now_s  # its age is not known: it is counted from here
            is_old = now_s - known.written_s > self._limits.max_age_s
            if is_old and known.fate is None and not self._is_in_flight(known):
                known.fate = Reason.EXPIRED
                self._stop_reading(known)

    def _give_up_condemned(self, now_s: float) -> None:
        condemned = [known for known in self._inventory if known.fate and not self._is_in_flight(known)]
        for known in condemned[:MAX_EXPIRED_AT_ONCE]:
            self._give_up(known, known.fate or Reason.EXPIRED, now_s)

    def _is_in_flight(self, known: Segment) -> bool:
        """Whether something of it has been read and not acknowledged: it may be on its way to the store."""
        return bool(self._in_flight) and self._in_flight[0].number <= known.number <= self._in_flight[-1].number

    def _give_up(self, known: Segment, reason: Reason, now_s: float) -> None:
        """Declare lost what remains of a segment, durably; then remove it."""
        lost = known.as_losses(reason)
        carried = segment.merged(known.contents.losses) if known.contents else []
        declared = segment.merged([*carried[:MAX_CARRIED], *lost])
        portions = cut(declared, self._limits.segment_bytes)
        if portions and self._has_room_for(portions[0]):
            self._append(portions[0], now_s)
            portions = portions[1:]
        excess = [*carried[MAX_CARRIED:], *(entry for portion in portions for entry in portion.entries)]
        if excess:
            self.undeclared += sum(entry.count for entry in excess)
            log.warning("%d ranges of lost records are too many to be declared, and only counted", len(excess))
        self._inventory.lose(known, lost)
        self._stop_reading(known)
        self._inventory.forget(known)

    def _has_room_for(self, losses: Portion) -> bool:
        """Whether the reserve takes them; it does unless segments are tiny. Above a quota that shrank, all is room."""
        return self._cost([losses]) <= self._room() or self._room() < 0

    # Reading.

    def is_empty(self) -> bool:
        """Whether there is nothing to deliver, nor in flight."""
        return not self._inventory and self._writer.segment is None

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
            was_unknown = known.contents is None
            self._reader.load(known)
            if was_unknown:
                self._inventory.count(known.contents)
        chunk = self._reader.take(max_records, max_bytes)
        if chunk.is_last:
            self._read_up_to = known.number
        self._in_flight.append(chunk)
        return chunk

    def _next_to_read(self) -> Segment | None:
        current = self._reader.segment
        if current is not None and current.number > self._read_up_to:
            return current
        known = self._inventory.first_after(self._read_up_to)
        if known is None and self._writer.segment is not None:
            self._roll()
            known = self._inventory.first_after(self._read_up_to)
        return known

    def _stop_reading(self, known: Segment) -> None:
        if self._reader.segment is known:
            self._reader.reset()

    def acknowledge(self, chunk: Chunk) -> None:
        """The server has everything in `chunk`, and in the chunks read before it."""
        with contextlib.suppress(ValueError):  # rewound meanwhile
            self._in_flight.remove(chunk)
        known = self._inventory.get(chunk.number)
        if known is None:
            return
        self._inventory.acknowledge(known, chunk.entries)
        self._inventory.lose(known, chunk.lost)
        known.acked_offset = max(known.acked_offset, min(chunk.end, known.size))
        if chunk.is_last:
            self._stop_reading(known)
            self._inventory.forget(known)

    def rewind(self, unacknowledged: Iterable[Chunk] = ()) -> None:
        """Forget what was read and not acknowledged, which is all in flight: it will be read again."""
        self._in_flight.clear()
        self._reader.reset()
        self._read_up_to = 0

    def highest(self) -> dict[Stream, int]:
        """Return the highest sequence number of each stream that is durable."""
        found = self._inventory.highest()
        if self._writer.segment is not None and self._writer.segment.contents is not None:
            raise_to(found, self._writer.segment.contents)
        return found

    def segment_count(self) -> int:
        """Return how many files there are."""
        return self._inventory.file_count() + (self._writer.segment is not None)

    def oldest_s(self) -> float | None:
        """Return when the oldest segment was last written, wall time in seconds; None where there is none."""
        oldest = self._inventory.oldest_s()
        active = self._writer.segment.written_s if self._writer.segment else None
        return active if oldest is None else oldest
