"""What is known of one segment file without reading it: which records it holds, which losses, and what became of them.

Pure. A finished segment carries its own summary in its last frame, so that a start reads a little of each file instead
of all of them; the header of the next segment repeats it, so that a file cut short is still known.

Invariant: a segment's index (its ranges and losses) is bounded, so its summary always fits a frame, and so do the
losses that remain of it fit another segment.
"""

from __future__ import annotations

import enum
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from kon_agent.ranges import RangeSet, count_of
from kon_agent.spool.frame import ALIGN, HEAD_BYTES, Entry, Frame, Kind

MAX_INDEX_BYTES = 16 * 1024  # some 300 ranges and losses; without loss, a segment has one range for each plugin
_NAME_DIGITS = 12
_SUFFIX = ".seg"
_SUMMARY_BYTES = 16  # a summary of nothing, and then some

Stream = tuple[str, int]
"""A plugin and an epoch."""


class Reason(enum.IntEnum):
    """Why the spool loses records; the wire's `LossReason` numbers."""

    EVICTED = 2
    CORRUPT = 3
    EXPIRED = 6


class _Ranges(msgspec.Struct, frozen=True, array_like=True):
    plugin: str
    epoch: int
    ranges: list[tuple[int, int]]


class _Loss(msgspec.Struct, frozen=True, array_like=True):
    plugin: str
    epoch: int
    seq: int
    count: int
    reason: int


class _Summary(msgspec.Struct, frozen=True, array_like=True):
    records: list[_Ranges]
    losses: list[_Loss]


@dataclass(slots=True, eq=False)
class Contents:
    """The records and losses of one segment.

    Attributes:
        records: by stream, which sequence numbers.
        losses: known losses it carries.
    """

    records: dict[Stream, RangeSet] = field(default_factory=dict)
    losses: list[Entry] = field(default_factory=list)

    def add(self, entries: Iterable[Entry]) -> Counter[str]:
        """Note `entries` and return how many records of each plugin that makes more."""
        entries = list(entries)
        added: Counter[str] = Counter()
        self.losses += [entry for entry in entries if entry.is_loss]
        for (plugin, epoch), first, last in runs(entries):
            ranges = self.records.setdefault((plugin, epoch), RangeSet())
            added[plugin] += count_of(ranges.add(first, last))
        return added

    def counts(self) -> Counter[str]:
        """Return how many records of each plugin are here."""
        counts: Counter[str] = Counter()
        for (plugin, _), ranges in self.records.items():
            counts[plugin] += ranges.count
        return counts

    def has(self, entry: Entry) -> bool:
        """Whether `entry` is among them."""
        if entry.is_loss:
            return entry in self.losses
        return entry.seq in self.records.get((entry.plugin, entry.epoch), ())

    def is_same(self, other: Contents) -> bool:
        """Whether both hold the same."""
        ours, theirs = (
            {stream: list(ranges) for stream, ranges in contents.records.items()} for contents in (self, other)
        )
        return ours == theirs and self.losses == other.losses

    def copy(self) -> Contents:
        """Return the same contents, to be changed apart from these."""
        return Contents({stream: RangeSet(ranges) for stream, ranges in self.records.items()}, list(self.losses))

    def without(self, gone: Mapping[Stream, RangeSet]) -> Contents:
        """Return the contents but for `gone`."""
        rest = self.copy()
        for stream, ranges in gone.items():
            for first, last in ranges if stream in rest.records else ():
                rest.records[stream].remove(first, last)
        rest.records = {stream: ranges for stream, ranges in rest.records.items() if ranges.count}
        nothing = RangeSet()
        rest.losses = [
            entry
            for entry in rest.losses
            if gone.get((entry.plugin, entry.epoch), nothing).absent(entry.seq, entry.last)
        ]
        return rest

    @property
    def index_bytes(self) -> int:
        """How long the summary is at most, and the frames of what remains of this if all of it is lost."""
        ranges = sum(loss_bytes(plugin) * len(list(ranges)) for (plugin, _), ranges in self.records.items())
        return _SUMMARY_BYTES + ranges + sum(loss_bytes(loss.plugin) for loss in self.losses)


@dataclass(slots=True, eq=False)
class Segment:
    """One segment.

    Attributes:
        number: names its file; never reused.
        size: how much of the file counts; what stands behind that was never confirmed to anybody.
        disk_bytes: what the file takes on disk at most; 0: there is no file any more.
        written_s: when it was last written, wall time in seconds.
        contents: what it should hold; None where that could not be read.
        is_exact: whether `contents` comes from who wrote it, not from what could be found in the file.
        is_durable: whether it is certain that the file is on disk, not in memory alone.
        checksum: CRC of the first `body_size` bytes, all before the summary; None where there is no summary.
        fate: why it will not be delivered; None: it will be.
        damaged: records that turned out not to be readable, as losses.
        acked: what has been acknowledged or declared lost.
        acked_offset: up to where.
    """

    number: int
    size: int
    disk_bytes: int
    written_s: float
    contents: Contents | None
    is_exact: bool = True
    is_durable: bool = True
    checksum: int | None = None
    body_size: int = 0
    fate: Reason | None = None
    damaged: list[Entry] = field(default_factory=list)
    acked: dict[Stream, RangeSet] = field(default_factory=dict)
    acked_offset: int = 0

    def is_untouched(self, data: bytes) -> bool:
        """Whether `data` is the file as it was written, but for its summary, which is not covered by the checksum."""
        if self.checksum is None or len(data) != self.size:
            return False
        return zlib.crc32(memoryview(data)[: self.body_size]) == self.checksum

    def settle(self, stream: Stream, first: int, last: int) -> int:
        """Note that nothing is owed any more of these records; return of how many that is news."""
        return count_of(self.acked.setdefault(stream, RangeSet()).add(first, last))

    def remaining(self) -> dict[Stream, RangeSet]:
        """Return the records neither acknowledged nor declared lost yet."""
        rest: dict[Stream, RangeSet] = {}
        for stream, ranges in self.contents.records.items() if self.contents else ():
            rest[stream] = RangeSet(ranges)
            for first, last in self.acked.get(stream, ()):
                rest[stream].remove(first, last)
        return rest

    def undeclared(self) -> list[Entry]:
        """Return the damaged records not declared lost yet, as losses."""
        lost = []
        for entry in self.damaged:
            acked = self.acked.get((entry.plugin, entry.epoch), RangeSet())
            for first, last in acked.absent(entry.seq, entry.last):
                lost.append(loss(entry.plugin, entry.epoch, first, last, entry.reason))
        return lost

    def as_losses(self, reason: Reason) -> list[Entry]:
        """Return what remains as losses: the damaged records as what they are, all others for `reason`."""
        lost = self.undeclared()
        rest = self.remaining()
        for entry in lost:
            rest[entry.plugin, entry.epoch].remove(entry.seq, entry.last)
        for (plugin, epoch), ranges in rest.items():
            lost += [loss(plugin, epoch, first, last, reason) for first, last in ranges]
        return lost


def loss(plugin: str, epoch: int, first: int, last: int, reason: int) -> Entry:
    """Return the loss of `first..last`."""
    return Entry(plugin, epoch, first, b"", last - first + 1, reason)


def loss_bytes(plugin: str) -> int:
    """Return how long the frame of a loss is, at most; a range takes less than that in a summary."""
    return HEAD_BYTES + len(plugin.encode()) + ALIGN


def runs(entries: Iterable[Entry]) -> Iterator[tuple[Stream, int, int]]:
    """Return the records among `entries` as runs: stream, first and last sequence number."""
    stream: Stream = ("", 0)
    first, following = 0, -1
    for entry in entries:
        if entry.reason:
            continue
        if entry.seq == following and entry.epoch == stream[1] and entry.plugin == stream[0]:
            following += 1
            continue
        if following >= 0:
            yield stream, first, following - 1
        stream, first, following = (entry.plugin, entry.epoch), entry.seq, entry.seq + 1
    if following >= 0:
        yield stream, first, following - 1


def merged(losses: Iterable[Entry]) -> list[Entry]:
    """Return `losses` ordered, those that follow or repeat one another as one."""
    joined: list[Entry] = []
    for entry in sorted(losses, key=lambda entry: (entry.plugin, entry.epoch, entry.reason, entry.seq)):
        last = joined[-1] if joined else None
        is_same = last and (last.plugin, last.epoch, last.reason) == (entry.plugin, entry.epoch, entry.reason)
        if last and is_same and entry.seq <= last.last + 1:
            joined[-1] = loss(last.plugin, last.epoch, last.seq, max(last.last, entry.last), last.reason)
        else:
            joined.append(entry)
    return joined


def summarize(contents: Contents) -> bytes:
    """Return the payload of a SUMMARY frame."""
    records = [_Ranges(plugin, epoch, list(ranges)) for (plugin, epoch), ranges in contents.records.items()]
    losses = [_Loss(entry.plugin, entry.epoch, entry.seq, entry.count, entry.reason) for entry in contents.losses]
    return msgspec.msgpack.encode(_Summary(records, losses))


def parse_summary(payload: bytes) -> Contents | None:
    """Return the contents a SUMMARY frame tells of; None where it is none."""
    try:
        summary = msgspec.msgpack.decode(payload, type=_Summary)
    except msgspec.MsgspecError:
        return None
    records = {(each.plugin, each.epoch): RangeSet(each.ranges) for each in summary.records}
    losses = [Entry(each.plugin, each.epoch, each.seq, b"", each.count, each.reason) for each in summary.losses]
    return Contents(records, losses)


def scanned(frames: Iterable[Frame]) -> Contents:
    """Return the contents of a segment without summary, as its heads tell: damaged records are among them."""
    entries: list[Entry] = []
    before: Frame | None = None
    for frame in frames:
        if frame.kind not in (Kind.RECORD, Kind.LOSS):
            continue
        entry = frame.entry
        if before is not None and before.kind is frame.kind is Kind.RECORD:
            gone = entry.seq - before.entry.seq - 1
            is_same = (before.entry.plugin, before.entry.epoch) == (entry.plugin, entry.epoch)
            room = (frame.start - before.end) // HEAD_BYTES
            # Heads are missing, and these alone can have been theirs.
            if is_same and 0 < gone == frame.ordinal - before.ordinal - 1 and gone <= room:
                entries += [Entry(entry.plugin, entry.epoch, before.entry.seq + n) for n in range(1, gone + 1)]
        entries.append(entry)
        before = frame
    contents = Contents()
    contents.add(entries)
    return contents


def damage(contents: Contents, frames: Iterable[Frame]) -> tuple[list[Entry], list[Entry]]:
    """Return what `contents` has and `frames` do not: records, as losses for CORRUPT, and losses, as they were."""
    whole = Contents()
    whole.add(frame.entry for frame in frames if frame.is_entry)
    records = [
        loss(plugin, epoch, low, high, Reason.CORRUPT)
        for (plugin, epoch), ranges in contents.records.items()
        for first, last in ranges
        for low, high in whole.records.get((plugin, epoch), RangeSet()).absent(first, last)
    ]
    found = set(whole.losses)
    return records, [entry for entry in contents.losses if entry not in found]


def name_of(number: int) -> str:
    """Return the file name of segment `number`."""
    return f"{number:0{_NAME_DIGITS}d}{_SUFFIX}"


def number_of(name: str) -> int | None:
    """Return the number of the segment with this file name; None where it is no segment's."""
    stem = name.removesuffix(_SUFFIX)
    return int(stem) if stem != name and len(stem) == _NAME_DIGITS and stem.isascii() and stem.isdigit() else None
