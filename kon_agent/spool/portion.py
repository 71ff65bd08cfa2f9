"""Portions: what is stored at once, cut so that each part fits a segment. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kon_agent.errors import SpoolError
from kon_agent.spool.frame import ALIGN, HEAD_BYTES, MAX_PAYLOAD_BYTES, MAX_PLUGIN_BYTES, Entry
from kon_agent.spool.segment import MAX_INDEX_BYTES, Stream, loss_bytes

_MAX_NUMBER = 2**64 - 1


class Portion(NamedTuple):
    """Entries that go to one segment by one write.

    Attributes:
        entries: the entries.
        size: how long their frames are, at most.
        index_bytes: what they add to the segment's index, at most.
    """

    entries: Sequence[Entry]
    size: int
    index_bytes: int


def cut(entries: Sequence[Entry], segment_bytes: int) -> list[Portion]:
    """Return `entries` as portions of which each fits an empty segment.

    Raises:
        SpoolError: an entry is none a frame can hold.
    """
    limit = segment_bytes - 2 * (HEAD_BYTES + MAX_INDEX_BYTES)
    portions: list[Portion] = []
    begin = size = index = 0
    following: dict[Stream, int] = {}
    for at, entry in enumerate(entries):
        plugin, seq, payload_bytes = entry.plugin, entry.seq, len(entry.payload)
        stream = (plugin, entry.epoch)
        is_next = following.get(stream) == seq and not entry.reason and payload_bytes <= MAX_PAYLOAD_BYTES
        name_bytes = len(plugin) if plugin.isascii() else len(plugin.encode())
        length = HEAD_BYTES + name_bytes + payload_bytes + ALIGN
        cost = 0 if is_next else _checked(entry)
        if at > begin and (size + length > limit or index + cost > MAX_INDEX_BYTES):
            portions.append(Portion(entries[begin:at], size, index))
            begin, size, index = at, 0, 0
            following.clear()
            cost = loss_bytes(plugin)
        size += length
        index += cost
        if not entry.reason:
            following[stream] = seq + 1
    if begin < len(entries):
        portions.append(Portion(entries[begin:], size, index))
    return portions


def _checked(entry: Entry) -> int:
    """Return what the entry adds to an index; it may well be a frame."""
    numbers = (entry.epoch, entry.seq, entry.last)
    if (
        (entry.payload if entry.reason else entry.count != 1)
        or len(entry.plugin.encode()) > MAX_PLUGIN_BYTES
        or len(entry.payload) > MAX_PAYLOAD_BYTES
        or not all(0 <= number <= _MAX_NUMBER for number in numbers)
    ):
        size = len(entry.payload)
        raise SpoolError(f"record {entry.seq} of {entry.plugin[:40]!r} with {size} bytes cannot be spooled")
    return loss_bytes(entry.plugin)
