"""A published page: one writer's latest value, readable by other processes without a lock.

Owns the layout of a shared memory area that carries one value at a time (the agent's telemetry, the table of watched
interfaces). Two slots take turns; a publication is complete once the selector word names its slot:

    0         8          64                    64 + slot               64 + 2·slot
    | selector | unused   | slot 0              | slot 1                |
                          | length u32 | crc u32 | payload …           |

Invariants:
* The writer never touches the slot the selector names, so a writer killed at any instant leaves the last value whole.
* A reader copies, then checks the CRC: a slot rewritten under its hands is read again, never returned.
"""

from __future__ import annotations

import struct
import zlib

HEADER_BYTES = 64  # one cache line, so that the selector shares it with nothing
_SLOT_HEADER = struct.Struct("=II")
READ_ATTEMPTS = 8  # the writer publishes about once a second: a second collision in a row is already unheard of


def page_size(payload_bytes: int) -> int:
    """Return the size in bytes of a page whose values are at most `payload_bytes` long."""
    return HEADER_BYTES + 2 * _slot_size(payload_bytes)


class PageWriter:
    """The only writer of a page.

    Args:
        memory: the page, writable, zeroed or last written by another `PageWriter` of the same size.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._selector = memory[:8].cast("Q")
        self._slot_bytes = (len(memory) - HEADER_BYTES) // 2

    @property
    def capacity_bytes(self) -> int:
        """The longest payload this page holds."""
        return self._slot_bytes - _SLOT_HEADER.size

    def publish(self, payload: bytes) -> None:
        """Make `payload` the page's value.

        Raises:
            ValueError: the payload is longer than the page's capacity.
        """
        if len(payload) > self.capacity_bytes:
            raise ValueError(f"payload of {len(payload)} bytes exceeds the page's {self.capacity_bytes}")
        # The selector counts publications; its lowest bit names the slot. Zero: nothing published yet.
        count = self._selector[0] + 1
        start = HEADER_BYTES + (count & 1) * self._slot_bytes
        body = _SLOT_HEADER.pack(len(payload), zlib.crc32(payload)) + payload
        self._memory[start : start + len(body)] = body
        self._selector[0] = count


class PageReader:
    """A reader of a page another process writes.

    Args:
        memory: the page; a read-only mapping is enough.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._selector = memory[:8].cast("Q")
        self._slot_bytes = (len(memory) - HEADER_BYTES) // 2

    def read(self) -> bytes | None:
        """Return the latest value, or None where nothing whole has been published yet."""
        for _ in range(READ_ATTEMPTS):
            count = self._selector[0]
            if count == 0:
                return None
            start = HEADER_BYTES + (count & 1) * self._slot_bytes
            length, crc = _SLOT_HEADER.unpack_from(self._memory, start)
            if length > self._slot_bytes - _SLOT_HEADER.size:
                continue
            body = start + _SLOT_HEADER.size
            payload = bytes(self._memory[body : body + length])
            if zlib.crc32(payload) == crc:
                return payload
        return None


def _slot_size(payload_bytes: int) -> int:
    return (_SLOT_HEADER.size + payload_bytes + 7) & ~7
