"""What the sender tells the supervisor, and its own successor, about the spool: one fixed-size report in a page.

    mode u8 | pad 3 | segments u32 | bytes u64 | oldest_s f64 | position: segment u64, offset u64 | detail 256 bytes
    64 slots: pending u64 | acked u64 | evicted u64 | corrupt u64 | expired u64 | rejected u64

A slot belongs to a plugin's name for as long as the supervisor lives, whether or not the plugin is there (`Slots`); the
last one to all names that have none. Tallies count since the supervisor started; a successor goes on from them and from
the position, so that a sender killed at any instant counts nothing twice.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

SLOTS = 64
OTHER = SLOTS - 1
_HEAD = struct.Struct("=B3xIQdQQ256s")
_SLOT = struct.Struct("=6Q")
REPORT_BYTES = _HEAD.size + SLOTS * _SLOT.size
_PLAUSIBLE_MAX = 1 << 53


class SpoolMode(enum.IntEnum):
    """What the spool is doing."""

    IDLE = 0  # nothing in it
    SPOOLING = 1  # records go to disk: nobody can be reached
    DRAINING = 2  # what it holds is being delivered
    MEMORY = 3  # the disk cannot be used: records stay in the rings
    WAITING = 4  # it holds records, nobody can be reached, nothing new


@dataclass(slots=True)
class PluginTally:
    """One plugin's records in the spool, and what became of those that were."""

    pending: int = 0
    acked: int = 0
    evicted: int = 0
    corrupt: int = 0
    expired: int = 0
    rejected: int = 0

    def drops(self) -> dict[str, int]:
        """Return the losses by reason."""
        return {
            "spool_evicted": self.evicted,
            "spool_corrupt": self.corrupt,
            "expired": self.expired,
            "rejected": self.rejected,
        }


@dataclass(slots=True)
class SpoolReport:
    """The spool at one moment.

    Attributes:
        mode: what it is doing.
        segments, disk_bytes: files, and what they take on disk.
        oldest_s: wall time of the oldest segment, seconds; 0: there is none.
        position: segment and offset up to which everything is acknowledged.
        detail: why the disk cannot be used; empty where it can.
        plugins: tallies by slot.
    """

    mode: SpoolMode = SpoolMode.IDLE
    segments: int = 0
    disk_bytes: int = 0
    oldest_s: float = 0.0
    position: tuple[int, int] = (0, 0)
    detail: str = ""
    plugins: list[PluginTally] = field(default_factory=lambda: [PluginTally() for _ in range(SLOTS)])

    @property
    def records(self) -> int:
        """How many records it holds."""
        return sum(tally.pending for tally in self.plugins)

    def encode(self) -> bytes:
        """Return the report's bytes."""
        head = _HEAD.pack(
            self.mode, self.segments, self.disk_bytes, self.oldest_s, *self.position, self.detail.encode()[:256]
        )
        return head + b"".join(
            _SLOT.pack(t.pending, t.acked, t.evicted, t.corrupt, t.expired, t.rejected) for t in self.plugins
        )

    @classmethod
    def decode(cls, data: bytes) -> SpoolReport:
        """Return the report in `data`; an empty one where it cannot be one."""
        if len(data) != REPORT_BYTES:
            return cls()
        mode, segments, size, oldest_s, number, offset, detail = _HEAD.unpack_from(data)
        if mode > max(SpoolMode):
            return cls()
        plugins = [PluginTally(*map(_bounded, words)) for words in _SLOT.iter_unpack(data[_HEAD.size :])]
        text = "".join(c if c.isprintable() else " " for c in detail.rstrip(b"\0").decode("utf-8", "replace"))
        return cls(SpoolMode(mode), segments, _bounded(size), oldest_s, (number, offset), text, plugins)


class Slots:
    """Which slot is whose. The supervisor gives them out, a sender learns them.

    Args:
        names: those that have one, in order.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._numbers: dict[str, int] = {}
        for name in names:
            self.give(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that have a slot, in order."""
        return tuple(self._numbers)

    @property
    def is_full(self) -> bool:
        """Whether no further name can have one."""
        return len(self._numbers) >= OTHER

    def give(self, name: str) -> None:
        """Give `name` the next slot if it has none; there may be none left."""
        if not self.is_full:
            self._numbers.setdefault(name, len(self._numbers))

    def of(self, name: str) -> int:
        """Return the slot of `name`."""
        return self._numbers.get(name, OTHER)


def _bounded(word: int) -> int:
    return min(int(word), _PLAUSIBLE_MAX)
