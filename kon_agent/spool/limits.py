"""What the spool may take. Data only, so that the supervisor can hand it over without knowing the spool."""

from __future__ import annotations

from dataclasses import dataclass

SEGMENT_BYTES = 1024 * 1024  # lost at most per eviction, held in memory while it is read
MIN_SEGMENT_BYTES = 64 * 1024  # less, and headers and summaries are a large part of it
MIN_SEGMENTS = 8  # of a small quota: evicting one must not empty it
MIN_BYTES = MIN_SEGMENTS * MIN_SEGMENT_BYTES


@dataclass(frozen=True, slots=True)
class Limits:
    """What the spool may take.

    Attributes:
        max_bytes: on disk, all files together; nothing is stored where that is less than MIN_BYTES.
        max_age_s: how long a record may wait.
        min_free_bytes: what must stay free on the file system.
    """

    max_bytes: int
    max_age_s: float
    min_free_bytes: int

    @property
    def segment_bytes(self) -> int:
        """How long a segment becomes."""
        return max(MIN_SEGMENT_BYTES, min(SEGMENT_BYTES, self.max_bytes // MIN_SEGMENTS))
