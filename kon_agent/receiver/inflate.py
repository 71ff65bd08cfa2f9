"""Decompression of one stream's frames: one zstd context for all of them, each flushed, none trusted.

    | length u32, big-endian | `length` bytes of the stream's zstd frame, ending at a flush |

Invariant: however small the input, the output held is at most the limit plus what one slice of input can
become.
"""

from __future__ import annotations

import zstandard

from kon_agent.errors import RemoteProtocolError
from kon_agent.wire.frames import MAX_FRAME_BYTES, FrameTooLargeError

MAX_WINDOW_BYTES = 2 * 1024 * 1024  # zstd's window at its default level; also what a stream may cost us in memory
SLICE_BYTES = 64  # the smallest block is 4 bytes and becomes at most 128 KiB (RFC 8878 §3.1.1.2): 2 MiB per slice


class Inflater:
    """Decompress the frame bodies of one stream, in order.

    Args:
        max_bytes: the longest decompressed body accepted.
    """

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()

    def inflate(self, data: bytes) -> bytes:
        """Return what `data` decompresses to.

        Raises:
            FrameTooLargeError: more than the limit.
            RemoteProtocolError: it is not the next part of a zstd frame.
        """
        out = bytearray()
        for start in range(0, len(data), SLICE_BYTES):
            try:
                out += self._context.decompress(data[start : start + SLICE_BYTES])
            except zstandard.ZstdError as err:
                raise RemoteProtocolError(f"frame of {len(data)} compressed bytes: {err}") from err
            if len(out) > self._max_bytes:
                raise FrameTooLargeError(f"frame of {len(data)} bytes decompresses to more than {self._max_bytes}")
        return bytes(out)
