"""The inspection: what a spool holds and how much of it is whole, for people. It reads, and neither changes nor locks.

So it works on the spool of a running agent as well: a segment that vanishes meanwhile has been delivered, and one that
is being written ends wherever it ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

import msgspec

from kon_agent.errors import SpoolError
from kon_agent.spool import lock, place, segment
from kon_agent.spool.disk import Disk, Folder
from kon_agent.spool.frame import Frame, scan
from kon_agent.spool.segment import Contents, Segment
from kon_agent.spool.survey import survey

State = Literal["open", "finished", "damaged"]


class Damage(msgspec.Struct, frozen=True):
    """A part of a file that is not as it was written: `size` bytes from `offset` on."""

    offset: int
    size: int


class SegmentReport(msgspec.Struct, frozen=True):
    """One segment.

    Attributes:
        number, name, bytes: the file; no bytes where it has vanished.
        records, losses: records it should hold, and records it declares lost.
        age_s: since it was last written.
        state: `open`: it has no summary, for it is being written, or its writer was killed.
        unreadable: how many of its records are lost.
        damage: where; what a killed writer left at the end of an open segment is none.
        error: why it could not be read at all.
    """

    number: int
    name: str
    bytes: int
    records: int
    losses: int
    age_s: float
    state: State
    unreadable: int = 0
    damage: list[Damage] = []
    error: str = ""


class Inspection(msgspec.Struct, frozen=True):
    """One spool.

    Attributes:
        path: its folder.
        pid: who uses it; None: nobody, 0: somebody.
        segments: the oldest first.
    """

    path: str
    pid: int | None
    segments: list[SegmentReport]

    @property
    def is_damaged(self) -> bool:
        """Whether anything is."""
        return any(each.state == "damaged" for each in self.segments)


def inspect(path: str, now_s: float, is_thorough: bool) -> Inspection:
    """Return what is in the spool that `cache.path` names.

    Args:
        is_thorough: read every frame, also of a file whose checksum is right.

    Raises:
        SpoolError: there is none, or it cannot be read; what to do.
    """
    folder = place.folder_path(path)
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as err:
        raise SpoolError(f"there is no spool at {folder}; see cache.path of the configuration, or --path") from err
    except OSError as err:
        raise SpoolError(f"the spool at {folder} cannot be read: {err.strerror}; use sudo, or see --path") from err
    disk = Folder(fd)
    try:
        return Inspection(folder, lock.holder(fd), list(reports(disk, now_s, is_thorough)))
    except OSError as err:
        raise SpoolError(f"the spool at {folder} cannot be read: {err.strerror}") from err
    finally:
        disk.release()


def reports(disk: Disk, now_s: float, is_thorough: bool) -> Iterator[SegmentReport]:
    """Read every segment and report on it.

    Raises:
        OSError: the folder cannot be read.
    """
    for known in survey(disk).segments:
        if known.fate is not None:
            yield _report(known, now_s, "damaged", error="it has vanished")
            continue
        with contextlib.suppress(FileNotFoundError):
            yield _examine(disk, known, now_s, is_thorough)


def _examine(disk: Disk, known: Segment, now_s: float, is_thorough: bool) -> SegmentReport:
    try:
        data = disk.read(segment.name_of(known.number), 0, known.size)
    except FileNotFoundError:
        raise
    except OSError as err:
        return _report(known, now_s, "damaged", error=err.strerror or type(err).__name__)
    is_untouched = known.is_untouched(data)
    if is_untouched and not is_thorough:
        return _report(known, now_s, "finished", unreadable=0)
    frames = list(scan(data))
    contents = known.contents or segment.scanned(frames)
    unreadable = sum(entry.count for entry in segment.damage(contents, frames)[0])
    damage = list(_gaps(frames, known.size))
    if known.checksum is None and damage and damage[-1].offset + damage[-1].size == known.size and not unreadable:
        damage.pop()  # a torn end, never confirmed
    if known.checksum is not None and not damage and not is_untouched:
        damage.append(Damage(0, known.body_size))  # in the padding between frames
    state: State = "damaged" if damage or unreadable else "finished" if known.is_exact else "open"
    return _report(known, now_s, state, contents, unreadable, damage)


def _report(
    known: Segment,
    now_s: float,
    state: State,
    contents: Contents | None = None,
    unreadable: int | None = None,
    damage: list[Damage] | None = None,
    error: str = "",
) -> SegmentReport:
    contents = contents or known.contents or Contents()
    records = contents.counts().total()
    return SegmentReport(
        number=known.number,
        name=segment.name_of(known.number),
        bytes=known.size,
        records=records,
        losses=sum(entry.count for entry in contents.losses),
        age_s=max(0.0, now_s - known.written_s) if known.written_s else 0.0,
        state=state,
        unreadable=records if unreadable is None else unreadable,
        damage=damage or [],
        error=error,
    )


def _gaps(frames: list[Frame], size: int) -> Iterator[Damage]:
    """Return what of a file of `size` bytes is in no whole frame."""
    offset = 0
    for frame in frames:
        if frame.start > offset:
            yield Damage(offset, frame.start - offset)
        if frame.is_damaged:
            yield Damage(frame.start, frame.end - frame.start)
        offset = frame.end
    if offset < size:
        yield Damage(offset, size - offset)
