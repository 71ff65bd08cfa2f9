"""The inventory: the segments there are, oldest first, and the count of every record in them.

Invariants:
* A record is pending until it is acknowledged or its loss is noted; each happens to it once.
* What a file takes on disk counts until the file is gone, also where removing it fails.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator

from kon_agent.spool import segment
from kon_agent.spool.disk import Disk, in_words
from kon_agent.spool.frame import Entry
from kon_agent.spool.segment import Contents, Segment, Stream

log = logging.getLogger(__name__)


class Inventory:
    """The finished segments of one spool.

    Args:
        disk: the folder.

    Attributes:
        pending: records held by plugin, those of the segment being written included.
        dropped: records declared lost by plugin and `Reason`, since this object was made.
    """

    def __init__(self, disk: Disk) -> None:
        self.pending: Counter[str] = Counter()
        self.dropped: Counter[tuple[str, int]] = Counter()
        self._disk = disk
        self._segments: dict[int, Segment] = {}  # in order
        self._litter: dict[str, int] = {}  # files that could not be removed, and what they take on disk

    def __iter__(self) -> Iterator[Segment]:
        return iter(list(self._segments.values()))

    def __bool__(self) -> bool:
        return bool(self._segments)

    def get(self, number: int) -> Segment | None:
        """Return a segment by its number."""
        return self._segments.get(number)

    def first_after(self, number: int) -> Segment | None:
        """Return the oldest segment above `number`."""
        return next((known for known in self._segments.values() if known.number > number), None)

    def newest(self) -> Segment | None:
        """Return the newest segment."""
        return next(reversed(self._segments.values()), None)

    def add(self, known: Segment) -> None:
        """Enter a segment, younger than all others; its records are counted already."""
        self._segments[known.number] = known

    # What becomes of records.

    def count(self, contents: Contents | None) -> None:
        """Count what has been found or stored."""
        if contents is not None:
            self.pending.update(contents.counts())

    def uncount(self, contents: Contents | None) -> None:
        """Take back what `count` has counted."""
        if contents is not None:
            self.pending.subtract(contents.counts())

    def acknowledge(self, known: Segment, entries: Iterable[Entry]) -> None:
        """Note that the server has the records among `entries`."""
        for stream, first, last in segment.runs(entries):
            self.pending[stream[0]] -= known.settle(stream, first, last)

    def lose(self, known: Segment, lost: Iterable[Entry]) -> None:
        """Note that records are lost, and declared so."""
        for entry in lost:
            count = known.settle((entry.plugin, entry.epoch), entry.seq, entry.last)
            self.pending[entry.plugin] -= count
            self.dropped[entry.plugin, entry.reason] += count

    def settle_all(self, known: Segment, but: Iterable[Entry] = ()) -> None:
        """Note that all records of a segment are settled, as a predecessor has counted, `but` these losses."""
        rest = known.remaining()
        for entry in but:
            rest[entry.plugin, entry.epoch].remove(entry.seq, entry.last)
        for stream, ranges in rest.items():
            for first, last in ranges:
                self.pending[stream[0]] -= known.settle(stream, first, last)

    # What becomes of files.

    def forget(self, known: Segment) -> None:
        """Remove a segment and its file."""
        del self._segments[known.number]
        self.remove(segment.name_of(known.number), known.disk_bytes)

    def remove(self, name: str, disk_bytes: int) -> None:
        """Remove a file; if that fails it is tried again by `sweep`."""
        try:
            self._disk.unlink(name)
        except FileNotFoundError:
            self._litter.pop(name, None)
        except OSError as err:
            if name not in self._litter:
                log.error("the spool's file %s cannot be removed: %s", name, in_words(err))
            self._litter[name] = disk_bytes
        else:
            self._litter.pop(name, None)

    def sweep(self) -> None:
        """Try again to remove what could not be removed."""
        for name, disk_bytes in list(self._litter.items()):
            self.remove(name, disk_bytes)

    def disk_bytes(self) -> int:
        """Return what the files take on disk, at most."""
        return sum(known.disk_bytes for known in self._segments.values()) + sum(self._litter.values())

    def file_count(self) -> int:
        """Return how many files of segments there are."""
        return sum(known.disk_bytes > 0 for known in self._segments.values())

    def name_count(self) -> int:
        """Return how many names they take in the folder, at most."""
        return len(self._segments) + len(self._litter)

    def oldest_s(self) -> float | None:
        """Return when the oldest file was last written, wall time in seconds."""
        return next((known.written_s for known in self._segments.values() if known.disk_bytes), None)

    def highest(self) -> dict[Stream, int]:
        """Return the highest sequence number of each stream that is durable."""
        found: dict[Stream, int] = {}
        for known in self._segments.values():
            if known.is_durable and known.contents is not None:
                raise_to(found, known.contents)
        return found


def raise_to(highest: dict[Stream, int], contents: Contents) -> None:
    """Raise each stream's highest sequence number to that in `contents`."""
    for stream, ranges in contents.records.items():
        highest[stream] = max(highest.get(stream, -1), ranges.highest)
