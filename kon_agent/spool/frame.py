"""Frames: how entries stand in a segment file. Pure.

    head crc u32 | body crc u32 |
    magic u16 | kind u8 | plugin length u8 | payload length u16 | reason u16 | ordinal u32 | count u64 | epoch u64 |
    seq u64 | plugin | payload | padding to 8

All little-endian, every frame at a multiple of 8. The head CRC covers everything from the magic to the plugin, the body
CRC the payload, and starts from the head CRC so that no head can adopt another frame's payload. `ordinal` numbers the
frames of a segment from zero.

    HEADER   first frame of a segment: seq = its number; epoch and payload = number and summary of the segment before it
    RECORD   one encoded record; count = 1
    LOSS     sequence numbers seq … seq + count − 1 are lost, for `reason`; no payload
    SUMMARY  last frame of a finished segment: epoch = its number, seq = CRC of all before it, payload = what it holds

Invariants:
* A damaged payload costs its own record, for the head still says whose it was and where the next one begins.
* A damaged head costs its own frame: the next one is found by its magic and its CRC.
* Damage is never delivered, and never stops the reading.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator

import msgspec

MAGIC = 0x4B53
MAX_PLUGIN_BYTES = 0xFF
MAX_PAYLOAD_BYTES = 0xFFFF
ALIGN = 8
_CRCS = struct.Struct("<II")
_REST = struct.Struct("<HBBHHIQQQ")
HEAD_BYTES = _CRCS.size + _REST.size
_MAGIC_BYTES = MAGIC.to_bytes(2, "little")
_PADDING = tuple(bytes(-length % ALIGN) for length in range(ALIGN))


class Kind(enum.IntEnum):
    """What a frame is."""

    HEADER = 1
    RECORD = 2
    LOSS = 3
    SUMMARY = 4


_KINDS = (None, *Kind)


class Entry(msgspec.Struct, frozen=True, gc=False):
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

    @property
    def last(self) -> int:
        """The last sequence number it stands for."""
        return self.seq + self.count - 1


class Frame(msgspec.Struct, frozen=True, gc=False):
    """One frame as read.

    Attributes:
        kind, ordinal, entry: its content; the entry's payload is empty where `is_damaged`.
        start, end: offsets of its first byte and of the byte behind it.
        is_damaged: its head is whole, its payload is not.
    """

    kind: Kind
    ordinal: int
    entry: Entry
    start: int
    end: int
    is_damaged: bool = False

    @property
    def is_entry(self) -> bool:
        """Whether it holds, whole, what somebody stored."""
        return self.kind in (Kind.RECORD, Kind.LOSS) and not self.is_damaged


def encode(kind: Kind, ordinal: int, entry: Entry) -> bytes:
    """Return the frame of `entry`.

    Raises:
        struct.error: a field is out of its range.
    """
    plugin, epoch, seq, payload, count, reason = msgspec.structs.astuple(entry)
    name = plugin.encode()
    rest = _REST.pack(MAGIC, kind, len(name), len(payload), reason, ordinal, count, epoch, seq) + name
    head_crc = zlib.crc32(rest)
    padding = _PADDING[(_CRCS.size + len(rest) + len(payload)) % ALIGN]
    return b"".join((_CRCS.pack(head_crc, zlib.crc32(payload, head_crc)), rest, payload, padding))


def decode(data: bytes, offset: int) -> Frame | None:
    """Return the frame at `offset`; None where no head is whole there, or the data ends before it does."""
    if offset + HEAD_BYTES > len(data):
        return None
    head_crc, body_crc = _CRCS.unpack_from(data, offset)
    magic, kind, name_len, length, reason, ordinal, count, epoch, seq = _REST.unpack_from(data, offset + _CRCS.size)
    if magic != MAGIC or not Kind.HEADER <= kind <= Kind.SUMMARY:
        return None
    name_at = offset + HEAD_BYTES
    body_at = name_at + name_len
    body_end = body_at + length
    if body_end > len(data) or head_crc != zlib.crc32(data[offset + _CRCS.size : body_at]):
        return None
    payload = data[body_at:body_end]
    is_damaged = length > 0 and body_crc != zlib.crc32(payload, head_crc)
    name = data[name_at:body_at].decode("utf-8", "replace")
    entry = Entry(name, epoch, seq, b"" if is_damaged else payload, count, reason)
    return Frame(_KINDS[kind] or Kind.HEADER, ordinal, entry, offset, body_end + -body_end % ALIGN, is_damaged)


def scan(data: bytes, offset: int = 0) -> Iterator[Frame]:
    """Return every frame from `offset` on, in order, over whatever damage lies between them."""
    while offset + HEAD_BYTES <= len(data):
        frame = decode(data, offset)
        if frame is not None:
            yield frame
            offset = frame.end
        else:
            offset = _next_magic(data, offset + ALIGN)


def _next_magic(data: bytes, offset: int) -> int:
    """Return where, from `offset` on, the next frame may begin."""
    at = offset + _CRCS.size
    while True:
        at = data.find(_MAGIC_BYTES, at)
        if at < 0:
            return len(data)
        if at % ALIGN == 0:
            return at - _CRCS.size
        at += 1
