"""What is known of one segment file without reading it: which records it holds, which losses, and since when.

Pure. A finished segment carries its own summary in its last frame, so that a start reads a few hundred bytes of each
file instead of all of them; a segment without one (its writer was killed, or the frame is damaged) is scanned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from kon_agent.spool.frame import MAX_PAYLOAD_BYTES, Entry, Frame, Kind, frame_bytes

SUMMARY_READ_BYTES = MAX_PAYLOAD_BYTES + 4096  # a summary frame and then some, from the end of the file
_NAME_DIGITS = 12
_SUFFIX = ".seg"

Stream = tuple[str, int]
"""A plugin and an epoch."""


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
    frames: int
    records: list[_Ranges]
    losses: list[_Loss]


@dataclass(slots=True)
class Contents:
    """The records and losses of one segment.

    Attributes:
        frames: how many frames it has, HEADER included, SUMMARY not.
        records: by stream, runs of sequence numbers as [first, last], in the order written.
        losses: known losses it carries.
    """

    frames: int = 0
    records: dict[Stream, list[list[int]]] = field(default_factory=dict)
    losses: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Note one more frame."""
        self.frames += 1
        if entry.is_loss:
            self.losses.append(entry)
            return
        ranges = self.records.setdefault((entry.plugin, entry.epoch), [])
        if ranges and ranges[-1][1] + 1 == entry.seq:
            ranges[-1][1] = entry.seq
        else:
            ranges.append([entry.seq, entry.seq])

    def record_count(self) -> int:
        """Return how many records it holds."""
        return sum(last - first + 1 for ranges in self.records.values() for first, last in ranges)

    def counts(self) -> Iterator[tuple[Stream, int]]:
        """Return each stream and how many of its records are here."""
        for stream, ranges in self.records.items():
            yield stream, sum(last - first + 1 for first, last in ranges)

    def as_losses(self, reason: int) -> list[Entry]:
        """Return the losses there are if this segment goes unread: its records, and those it carries already."""
        gone = [
            Entry(plugin, epoch, first, count=last - first + 1, reason=reason)
            for (plugin, epoch), ranges in self.records.items()
            for first, last in ranges
        ]
        return self.losses + gone


def summarize(contents: Contents) -> bytes | None:
    """Return the payload of a SUMMARY frame; None where it would be too long, and the segment is scanned instead."""
    summary = _Summary(
        contents.frames,
        [_Ranges(plugin, epoch, [(a, b) for a, b in ranges]) for (plugin, epoch), ranges in contents.records.items()],
        [_Loss(loss.plugin, loss.epoch, loss.seq, loss.count, loss.reason) for loss in contents.losses],
    )
    payload = msgspec.msgpack.encode(summary)
    return payload if len(payload) <= MAX_PAYLOAD_BYTES else None


def parse_summary(payload: bytes) -> Contents | None:
    """Return the contents a SUMMARY frame tells of; None where it is none."""
    try:
        summary = msgspec.msgpack.decode(payload, type=_Summary)
    except msgspec.MsgspecError:
        return None
    records = {(r.plugin, r.epoch): [[first, last] for first, last in r.ranges] for r in summary.records}
    losses = [Entry(x.plugin, x.epoch, x.seq, count=x.count, reason=x.reason) for x in summary.losses]
    return Contents(summary.frames, records, losses)


def scanned(frames: Iterable[Frame]) -> Contents:
    """Return the contents of a segment as its heads tell; a record whose payload is damaged is among them."""
    contents = Contents()
    highest = -1
    for frame in frames:
        if frame.kind in (Kind.RECORD, Kind.LOSS):
            contents.add(frame.entry)
        if frame.kind is not Kind.SUMMARY:
            highest = max(highest, frame.ordinal)
    contents.frames = highest + 1
    return contents


def name_of(number: int) -> str:
    """Return the file name of segment `number`."""
    return f"{number:0{_NAME_DIGITS}d}{_SUFFIX}"


def number_of(name: str) -> int | None:
    """Return the number of the segment with this file name; None where it is no segment's."""
    stem = name.removesuffix(_SUFFIX)
    return int(stem) if stem != name and len(stem) == _NAME_DIGITS and stem.isascii() and stem.isdigit() else None


def summary_frame_bytes(payload: bytes) -> int:
    """Return how long the frame of a summary is."""
    return frame_bytes(Entry("", 0, 0, payload))
