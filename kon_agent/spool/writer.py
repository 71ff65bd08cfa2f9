"""The writer: the segment that is being written.

Invariants:
* `append` returns only when everything is durable; only then does the segment hold it.
* A file is written by one run of one process and never opened for writing again.
* After any error the file is cut back to what was confirmed and left: a failed sync is never retried on its file, for
  the kernel may have dropped the pages and forgotten the error (fsync(2), ERRORS).
* `segment.disk_bytes` is never less than what the file takes, its summary yet to come included.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Sequence

from kon_agent.spool import segment
from kon_agent.spool.disk import Disk, on_disk
from kon_agent.spool.frame import HEAD_BYTES, Entry, Kind, encode
from kon_agent.spool.portion import Portion
from kon_agent.spool.segment import MAX_INDEX_BYTES, Contents, Segment

log = logging.getLogger(__name__)


class Writer:
    """Writes one segment after the other.

    Args:
        disk: the folder.
    """

    def __init__(self, disk: Disk) -> None:
        self.segment: Segment | None = None
        self._disk = disk
        self._fd = -1
        self._length = 0  # of the file; more than the segment's size while something is unconfirmed
        self._frames = 0
        self._crc = 0

    def fits(self, portion: Portion, limit: int) -> bool:
        """Return whether there is a segment that takes `portion` without exceeding `limit` bytes."""
        held = self.segment
        if held is None or held.contents is None or held.size + portion.size > limit:
            return False
        return held.contents.index_bytes + portion.index_bytes <= MAX_INDEX_BYTES

    def begin(self, number: int, previous: Segment | None, now_s: float) -> Segment:
        """Create segment `number`; `previous` is the one before it.

        Raises:
            OSError: it cannot be; `abandon` it.
        """
        assert self.segment is None
        self._fd = self._disk.create(segment.name_of(number))
        self.segment = Segment(number, 0, 0, now_s, Contents())
        self._length = self._frames = self._crc = 0
        summary = segment.summarize(previous.contents) if previous and previous.contents else b""
        self._put(encode(Kind.HEADER, 0, Entry("", previous.number if previous else 0, number, summary)), 1)
        return self.segment

    def append(self, entries: Sequence[Entry], now_s: float) -> Counter[str]:
        """Write `entries`, make them durable, and return how many records of each plugin that makes more.

        Raises:
            OSError: they are not; `abandon` the segment.
        """
        held = self.segment
        assert held is not None and held.contents is not None
        loss, record = Kind.LOSS, Kind.RECORD
        frames = [encode(loss if e.reason else record, n, e) for n, e in enumerate(entries, self._frames)]
        self._put(b"".join(frames), len(frames))
        self._disk.sync(self._fd)
        held.size, held.written_s = self._length, now_s
        added = held.contents.add(entries)
        held.disk_bytes = self._footprint(held.size)
        return added

    def _put(self, data: bytes, frames: int) -> None:
        assert self.segment is not None
        self.segment.disk_bytes = self._footprint(self._length + len(data))  # whatever of it gets there
        self._disk.write(self._fd, data)
        self._length += len(data)
        self._frames += frames
        self._crc = zlib.crc32(data, self._crc)

    def _footprint(self, length: int) -> int:
        contents = self.segment.contents if self.segment else None
        return on_disk(length + HEAD_BYTES + (contents.index_bytes if contents else 0))

    def finish(self) -> Segment | None:
        """End the segment with its summary and return it; None where it holds nothing, and its file may go.

        Without a summary nothing is lost: a later start has to read the whole file, that is all.
        """
        held = self.segment
        assert held is not None and held.contents is not None
        if held.size == 0:
            return self.abandon()
        summary = encode(
            Kind.SUMMARY, self._frames, Entry("", held.number, self._crc, segment.summarize(held.contents))
        )
        try:
            self._disk.write(self._fd, summary)
            self._length += len(summary)
            self._disk.sync(self._fd)
        except OSError as err:
            log.debug("segment %d has no summary: %s", held.number, err)
            return self.abandon()
        held.checksum, held.body_size = self._crc, held.size
        held.size, held.disk_bytes = self._length, on_disk(self._length)
        self._close()
        return held

    def abandon(self) -> Segment | None:
        """Leave the segment as it was after its last sync and return it; None where that is empty."""
        held = self.segment
        if held is None:
            return None
        try:
            self._disk.truncate(self._fd, held.size)
            held.disk_bytes = on_disk(held.size)
        except OSError as err:  # what stands behind `size` is not read by us, and may be a duplicate for a successor
            log.debug("segment %d cannot be cut back: %s", held.number, err)
        self._close()
        return held if held.size else None

    def _close(self) -> None:
        assert self.segment is not None
        try:
            self._disk.close(self._fd)
        except OSError as err:
            log.debug("segment %d: %s", self.segment.number, err)
        self.segment, self._fd = None, -1
