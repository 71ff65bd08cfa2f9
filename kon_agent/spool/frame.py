"""Frames: how entries stand in a segment file. Pure.

    magic u16 | kind u8 | plugin length u8 | payload length u16 | reason u16 | head crc u32 | body crc u32 |
    ordinal u32 | count u32 | epoch u64 | seq u64 | plugin | payload | padding to 8

All little-endian, every frame at a multiple of 8. The head CRC covers the header (with both CRCs zero) and the plugin,
the body CRC the payload. `ordinal` numbers the frames of a segment from zero.

    HEADER   first frame of a segment: seq = its number, epoch = number of frames in the segment before it
    RECORD   one encoded record; count = 1
    LOSS     sequence numbers seq … seq + count − 1 are lost, for `reason`
    SUMMARY  last frame of a finished segment: payload = what the segment holds, see `segment`

Invariants:
* A damaged payload costs its own record, for the head still says whose it was and where the next one begins.
* A damaged head costs its own frame: the next one is found by its magic and both its CRCs, and its ordinal says how
  many are gone.
* Damage is never delivered, and never stops the reading.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = 0x4B53
MAX_PAYLOAD_BYTES = 0xFFFF
_HEAD = struct.Struct("<HBBHHIIIIQQ")
HEAD_BYTES = _HEAD.size
_ALIGN = 8
_MAGIC_BYTES = MAGIC.to_bytes(2, "little")


class Kind(enum.IntEnum):
    """What a frame is."""

    HEADER = 1
    RECORD = 2
    LOSS = 3
    SUMMARY = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """What the spool is asked to keep: a record, or a known loss.

    Attributes:
        plugin, epoch, seq: the identity; of a loss, of its first sequence number.
        payload: the encoded record; empty for a loss.
        count: how many sequence numbers; 1 for a record.
        reason: the wire's `LossReason`; 0 for a record.
    """

    plugin: str
    epoch: int
    seq: int
    payload: bytes = b""
    count: int = 1
    reason: int = 0

    @property
    def is_loss(self) -> bool:
        """Whether this stands for lost records."""
        return self.reason != 0


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as read.

    Attributes:
        kind, ordinal, entry: its content; the entry's payload is empty where `is_damaged`.
        end: offset of the byte behind it.
        is_damaged: its head is whole, its payload is not.
    """

    kind: Kind
    ordinal: int
    entry: Entry
    end: int
    is_damaged: bool = False


def encode(kind: Kind, ordinal: int, entry: Entry) -> bytes:
    """Return the frame of `entry`."""
    plugin = entry.plugin.encode()
    fields = (MAGIC, kind, len(plugin), len(entry.payload), entry.reason)
    tail = (ordinal, entry.count, entry.epoch, entry.seq)
    head_crc = zlib.crc32(plugin, zlib.crc32(_HEAD.pack(*fields, 0, 0, *tail)))
    body_crc = zlib.crc32(entry.payload, head_crc)  # chained, so that a head cannot adopt another frame's payload
    frame = _HEAD.pack(*fields, head_crc, body_crc, *tail) + plugin + entry.payload
    return frame + bytes(-len(frame) % _ALIGN)


def frame_bytes(entry: Entry) -> int:
    """Return how long the frame of `entry` is."""
    return -(-(HEAD_BYTES + len(entry.plugin.encode()) + len(entry.payload)) // _ALIGN) * _ALIGN


def decode(data: bytes | memoryview, offset: int) -> Frame | None:
    """Return the frame at `offset`; None where no head is whole there, or the data ends before it does."""
    if offset + HEAD_BYTES > len(data):
        return None
    magic, kind, plugin_len, length, reason, head_crc, body_crc, *tail = _HEAD.unpack_from(data, offset)
    if magic != MAGIC or not Kind.HEADER <= kind <= Kind.SUMMARY:
        return None
    start = offset + HEAD_BYTES
    plugin = bytes(data[start : start + plugin_len])
    fields = (magic, kind, plugin_len, length, reason)
    if head_crc != zlib.crc32(plugin, zlib.crc32(_HEAD.pack(*fields, 0, 0, *tail))):
        return None
    end = start + plugin_len + length
    end += -end % _ALIGN
    if end > len(data):
        return None
    ordinal, count, epoch, seq = tail
    payload = bytes(data[start + plugin_len : start + plugin_len + length])
    is_damaged = body_crc != zlib.crc32(payload, head_crc)
    entry = Entry(plugin.decode("utf-8", "replace"), epoch, seq, b"" if is_damaged else payload, count, reason)
    return Frame(Kind(kind), ordinal, entry, end, is_damaged)


def scan(data: bytes | memoryview, offset: int = 0) -> Iterator[Frame]:
    """Return every frame from `offset` on, in order, over whatever damage lies between them."""
    view = bytes(data)
    while offset + HEAD_BYTES <= len(view):
        frame = decode(view, offset)
        if frame is not None:
            yield frame
            offset = frame.end
            continue
        offset = _next_magic(view, offset + _ALIGN)


def _next_magic(data: bytes, offset: int) -> int:
    while True:
        offset = data.find(_MAGIC_BYTES, offset)
        if offset < 0:
            return len(data)
        if offset % _ALIGN == 0:
            return offset
        offset += 1
