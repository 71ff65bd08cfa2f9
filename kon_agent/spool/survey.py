"""The survey: what a spool's folder holds, learnt from a little of each file. It changes nothing.

A segment's contents are told, in this order of belief, by the header of the next segment or the state file (written
later, by who knew what had been confirmed), by its own summary, by a scan of all of it (its writer was killed and
nothing came after). Foreign files are passed over, and nothing a file holds or refuses makes the survey fail.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

from kon_agent.ranges import RangeSet
from kon_agent.spool import segment
from kon_agent.spool.disk import Disk, Facts
from kon_agent.spool.frame import ALIGN, HEAD_BYTES, Entry, Frame, Kind, decode, encode, scan
from kon_agent.spool.segment import MAX_INDEX_BYTES, Contents, Reason, Segment, Stream

log = logging.getLogger(__name__)

STATE = "state"  # what the last segment held, written when the spool is closed in order
PROBE = "probe"  # a byte, to see whether the disk takes one; never there for long
END_BYTES = MAX_INDEX_BYTES + 2 * HEAD_BYTES  # enough for a header or summary frame


@dataclass(slots=True)
class Survey:
    """What there is.

    Attributes:
        segments: in order; of one that has vanished only its contents, to be declared lost.
        empty: names of files that were created and never written.
        taken: the highest number in use, by whatever.
        state_bytes: what the state file takes on disk.
    """

    segments: list[Segment] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    taken: int = 0
    state_bytes: int = 0


def survey(disk: Disk) -> Survey:
    """Return what the folder holds.

    Raises:
        OSError: the folder cannot be read.
    """
    names = disk.names()
    found = Survey(taken=max((n for name in names if (n := segment.number_of(name)) is not None), default=0))
    told: dict[int, Contents] = {}
    if STATE in names:
        _read_state(disk, found, told)
    for name in sorted(names):
        number = segment.number_of(name)
        facts = _facts(disk, name) if number is not None else None
        if number is not None and facts is not None:
            found.segments.append(_learn(disk, number, facts, told))
    found.taken = max([found.taken, *told])
    for known in found.segments:
        _believe(disk, known, told.get(known.number))
    found.empty = [segment.name_of(known.number) for known in found.segments if _was_never_written(known)]
    found.segments = [known for known in found.segments if not _was_never_written(known)]
    found.segments += _vanished(found.segments, told)
    found.segments.sort(key=lambda known: known.number)
    return found


def state_frame(last: Segment) -> bytes:
    """Return what the state file says where `last` is the last segment."""
    summary = segment.summarize(last.contents) if last.contents else b""
    return encode(Kind.HEADER, 0, Entry("", last.number, 0, summary))


def _read_state(disk: Disk, found: Survey, told: dict[int, Contents]) -> None:
    facts = _facts(disk, STATE)
    if facts is not None:
        found.state_bytes = facts.disk_bytes
        _note_previous(_read(disk, STATE, 0, END_BYTES), told)


def _facts(disk: Disk, name: str) -> Facts | None:
    try:
        return disk.facts(name)
    except FileNotFoundError:  # acknowledged or evicted meanwhile, where this is not our own spool
        return None
    except OSError as err:
        log.error("spool: %s cannot be examined and is left alone: %s", name, err.strerror)
        return None


def _read(disk: Disk, name: str, offset: int, length: int) -> bytes | None:
    try:
        return disk.read(name, offset, length)
    except FileNotFoundError:
        return None
    except OSError as err:
        log.error("spool: %s cannot be read: %s", name, err.strerror)
        return None


def _note_previous(data: bytes | None, told: dict[int, Contents]) -> None:
    """Take what the frame at the beginning of `data` tells of the segment before it."""
    head = decode(data, 0) if data else None
    if head is not None and head.kind is Kind.HEADER and head.entry.payload:
        contents = segment.parse_summary(head.entry.payload)
        if contents is not None:
            told[head.entry.epoch] = contents


def _learn(disk: Disk, number: int, facts: Facts, told: dict[int, Contents]) -> Segment:
    """Read the two ends of a file."""
    name = segment.name_of(number)
    known = Segment(number, facts.size, facts.disk_bytes, facts.modified_s, None, is_exact=False)
    _note_previous(_read(disk, name, 0, END_BYTES), told)
    start = max(0, facts.size - END_BYTES) // ALIGN * ALIGN
    summary = _summary_in(_read(disk, name, start, facts.size - start) or b"", number)
    if summary is not None:
        known.contents = segment.parse_summary(summary.entry.payload)
        known.is_exact = known.contents is not None
        known.checksum, known.body_size = summary.entry.seq, start + summary.start
    return known


def _summary_in(data: bytes, number: int) -> Frame | None:
    """Return the SUMMARY frame at the very end of `data`."""
    last = next(iter(deque(scan(data), maxlen=1)), None)
    if last is None or last.kind is not Kind.SUMMARY or last.is_damaged:
        return None
    return last if last.end == len(data) and last.entry.epoch == number else None


def _believe(disk: Disk, known: Segment, told: Contents | None) -> None:
    """Settle what a segment should hold."""
    if told is not None:
        if known.contents is None or not told.is_same(known.contents):
            known.checksum = None  # its own summary tells of records that were never confirmed, or is not there
        known.contents, known.is_exact = told, True
    elif known.contents is None:
        data = _read(disk, segment.name_of(known.number), 0, known.size)
        known.contents = segment.scanned(scan(data)) if data is not None else None


def _was_never_written(known: Segment) -> bool:
    return known.size == 0 and not known.is_exact


def _vanished(present: list[Segment], told: dict[int, Contents]) -> list[Segment]:
    """Return the segments that should be between others and are not, but for what was given up in order."""
    numbers = {known.number for known in present}
    declared: dict[Stream, RangeSet] = {}
    for entry in (entry for known in present if known.contents for entry in known.contents.losses):
        declared.setdefault((entry.plugin, entry.epoch), RangeSet()).add(entry.seq, entry.last)
    vanished = []
    for number, contents in told.items():
        if not numbers or number in numbers or number < min(numbers):
            continue  # delivered, in all likelihood: what is older than the oldest is
        rest = contents.without(declared)
        if rest.records or rest.losses:
            log.error("spool: segment %d has vanished; its records are declared lost", number)
            vanished.append(Segment(number, 0, 0, 0.0, rest, fate=Reason.CORRUPT))
    return vanished
