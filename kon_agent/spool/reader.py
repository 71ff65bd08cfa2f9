"""The reader: one segment in memory, and how far it has been read.

Invariants:
* Only what was stored and is whole is delivered; what should be there and is not becomes a loss, told at the end.
* A position is the offset of the next frame; the file's size and behind it, that plus how many of the losses at its end
  have been told, so that a successor can go on from it. Behind the size of a condemned segment, all has been told.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from kon_agent.errors import SpoolError
from kon_agent.spool import segment
from kon_agent.spool.disk import BLOCK_BYTES, Disk
from kon_agent.spool.frame import Entry, scan
from kon_agent.spool.segment import Segment, Stream

log = logging.getLogger(__name__)

MAX_LOSSES = 500  # in one chunk: half of what a batch may declare
MAX_RUNS = 500  # of consecutive records in one chunk: half of what a batch may hold
PATIENCE = 3  # failed attempts to read a file before what it does not give back counts as damaged
# Want of something on our side: says nothing about the file, however often it happens.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """What was read at once, to be acknowledged at once and in order.

    Attributes:
        entries: records and losses, at most MAX_LOSSES losses and MAX_RUNS runs of records; may be empty.
        number, end: the segment they came from, and the position behind them.
        is_last: whether that is the segment's end.
        lost: those of the losses that are records of the segment itself.
    """

    entries: list[Entry]
    number: int
    end: int
    is_last: bool
    lost: list[Entry]


class Reader:
    """Reads one segment after the other.

    Args:
        disk: the folder.
    """

    def __init__(self, disk: Disk) -> None:
        self.segment: Segment | None = None
        self._disk = disk
        self._entries: Iterator[tuple[Entry, int]] = iter(())
        self._ahead: tuple[Entry, int] | None = None
        self._offset = 0
        self._told = 0
        self._lost: list[Entry] = []
        self._carried: list[Entry] = []
        self._failures: tuple[int, int] = (0, 0)  # segment, and how often in a row it could not be read

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to take of this segment."""
        return self._ahead is None and not self._lost and not self._carried

    def reset(self) -> None:
        """Forget the segment."""
        self.segment, self._entries, self._ahead, self._lost, self._carried = None, iter(()), None, [], []

    def load(self, known: Segment) -> None:
        """Read `known`, from where it is acknowledged on; note its damage in it.

        Raises:
            SpoolError: the disk does not give it back; try again.
        """
        self.reset()
        if known.fate is not None:
            self._carried = list(known.contents.losses) if known.contents else []
            self._lost = known.as_losses(known.fate)
        else:
            self._load(known)
        self.segment, self._offset, self._told = known, known.acked_offset, 0

    def _load(self, known: Segment) -> None:
        data = self._read(known)
        if known.is_untouched(data):
            self._entries = _entries(data, known, is_sifted=False)
        else:
            if known.contents is None:
                known.contents = segment.scanned(scan(data))
            known.damaged, self._carried = segment.damage(known.contents, scan(data))
            self._lost = known.undeclared()
            self._entries = _entries(data, known, is_sifted=True)
            if self._lost:
                count = sum(entry.count for entry in self._lost)
                log.error("segment %d is damaged: %d records are lost and declared so", known.number, count)
        self._ahead = next(self._entries, None)

    def _read(self, known: Segment) -> bytes:
        """Return the file's bytes; zeros for those that the disk does not give back, time and again."""
        name = segment.name_of(known.number)
        try:
            return self._disk.read(name, 0, known.size)
        except FileNotFoundError:
            return b""  # somebody removed it: all it held is damage
        except OSError as err:
            number, count = self._failures
            self._failures = known.number, (count if number == known.number else 0) + 1
            if err.errno in _PASSING or self._failures[1] < PATIENCE:
                why = err.strerror or type(err).__name__
                raise SpoolError(f"spool segment {name} cannot be read: {why}; see the kernel's log") from err
        return b"".join(self._read_block(name, at, known.size) for at in range(0, known.size, BLOCK_BYTES))

    def _read_block(self, name: str, at: int, size: int) -> bytes:
        length = min(BLOCK_BYTES, size - at)
        try:
            return self._disk.read(name, at, length).ljust(length, b"\0")
        except OSError:
            return bytes(length)

    def take(self, max_records: int, max_bytes: int) -> Chunk:
        """Return the next entries of the segment; with none where nothing but its end is left."""
        known = self.segment
        assert known is not None
        entries: list[Entry] = []
        following: dict[Stream, int] = {}
        losses = runs = size = 0
        while self._ahead is not None and len(entries) < max_records and size < max_bytes:
            if losses >= MAX_LOSSES or runs >= MAX_RUNS:
                break
            entry, self._offset = self._ahead
            entries.append(entry)
            size += len(entry.payload)
            if entry.reason:
                losses += 1
            else:
                stream = (entry.plugin, entry.epoch)
                runs += following.get(stream) != entry.seq
                following[stream] = entry.seq + 1
            self._ahead = next(self._entries, None)
        lost: list[Entry] = []
        if self._ahead is None:
            room = max(0, min(MAX_LOSSES - losses, max_records - len(entries)))
            carried, self._carried = self._carried[:room], self._carried[room:]
            lost, self._lost = self._lost[: room - len(carried)], self._lost[room - len(carried) :]
            entries += carried + lost
            self._told += len(carried) + len(lost)
        return Chunk(entries, known.number, self._position(known), self.is_done, lost)

    def _position(self, known: Segment) -> int:
        if known.fate is not None:
            return known.size + 1 if self.is_done else self._offset
        return self._offset if self._ahead is not None else known.size + self._told

    def losses(self) -> tuple[list[Entry], list[Entry]]:
        """Return what is to be told at the segment's end: losses it carried, and its own damaged records."""
        return self._carried, self._lost


def records_before(data: bytes, known: Segment) -> list[Entry]:
    """Return the records of a segment that `data`, its beginning, delivers."""
    return [entry for entry, _ in _entries(data, known, is_sifted=True) if not entry.is_loss]


def _entries(data: bytes, known: Segment, is_sifted: bool) -> Iterator[tuple[Entry, int]]:
    """Return what is to be delivered and the offset behind each; sifted, nothing but what should be there."""
    contents = known.contents
    for frame in scan(data, known.acked_offset):
        if frame.is_entry and (not is_sifted or contents is None or contents.has(frame.entry)):
            yield frame.entry, frame.end
