"""The kernel's table of flows, as ebpf/kon_flows.h lays it out: how large it is, and how it is read.

A part for each possible CPU, one after the other, each of as many buckets of WAYS entries:

    entry: source, destination  ports  protocol, direction, first row | bytes u64 | packets u64 | generation u64
           16 bytes each        2 u16  u8        u8         u16

The kernel alone writes it, while it is read. `generation` grows by two whenever an entry passes to another flow, and is
odd meanwhile, so:

* Generations are read first, then what was counted, then the keys, then the generations of these entries once more.
  Where both readings are the same, even number, everything between belongs to one flow.
* What has been counted since the last reading is the difference where the generation is the same, else all there is.
* The readings of one entry lie a whole column apart, thousands of loads: what a weakly ordered processor may reorder
  is far less, so no barrier is needed on either side.

A flow that has lost its place is forgotten here, too: what it counted after the last reading belongs to nobody.
"""

from __future__ import annotations

import mmap
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from operator import sub
from typing import NamedTuple

from kon_agent.errors import BpfError

# As in ebpf/kon_flows.h.
WAYS = 8
KEY = struct.Struct("=16s16s2s2sBBH")
ENTRY = struct.Struct("=40sQQQ")
ENTRY_BYTES = 64
BUCKET_BYTES = 64
SETTINGS = struct.Struct("=II5Q")

_MAPS_OVERHEAD = 4 * mmap.PAGESIZE  # of two maps: each has a page of its own before its values, and ends on a page
_SHORTLIST = 2  # so many times `top` flows, by their largest part, are looked for on all CPUs

_KEY_BYTES = KEY.size
_ENTRY_WORDS = ENTRY_BYTES // 8
_BYTES, _PACKETS, _GENERATION = 5, 6, 7  # words of an entry
_BUCKET_OF_ENTRIES_BYTES = WAYS * ENTRY_BYTES
_WORD = struct.Struct("=Q")
_IPV4_MAPPED = bytes(10) + b"\xff\xff"

WITH_PORTS = frozenset({6, 17, 33, 132, 136})  # has_ports() of ebpf/kon_flows_count.h
PROTOCOLS = {
    1: "icmp",
    2: "igmp",
    4: "ipip",
    6: "tcp",
    17: "udp",
    33: "dccp",
    41: "sit",
    47: "gre",
    50: "esp",
    51: "ah",
    58: "icmpv6",
    89: "ospf",
    103: "pim",
    112: "vrrp",
    132: "sctp",
    136: "udplite",
}
"""IP's protocols by number (IANA, "Protocol Numbers"), as the kernel's own tools call them."""


class Amount(NamedTuple):
    """What has been counted."""

    bytes: int
    packets: int


class Flow(NamedTuple):
    """Whose packets they are.

    Attributes:
        first_row: of the interface, in the counters.
        direction: 0 ingress, 1 egress.
        protocol: its name, or its number.
        source, destination: addresses as text.
        source_port, destination_port: 0 where the protocol has none, or a fragment does not show them.
        has_ports: whether the protocol has ports.
    """

    first_row: int
    direction: int
    protocol: str
    source: str
    source_port: int
    destination: str
    destination_port: int
    has_ports: bool


class Sizes(NamedTuple):
    """How large the maps are: the number of buckets for each CPU, and the entries of both maps."""

    buckets: int
    flows: int
    flow_buckets: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What the table says.

    Attributes:
        grown: key to what the flow has counted since the last reading: those that grew most; none at the first.
        entries: places that are taken.
        inserts: flows that were ever given a place.
        evictions: flows that lost it to another one.
    """

    grown: dict[bytes, Amount]
    entries: int
    inserts: int
    evictions: int


@dataclass(frozen=True, slots=True)
class _Columns:
    """One CPU's part of the table at one reading, entry by entry, u64 each; read in this order."""

    generations: bytes
    sizes: bytes
    packets: bytes


class _Place(NamedTuple):
    key: bytes
    cpu: int
    entry: int


def flow_entries(memory_bytes: int, cpus: int) -> Sizes:
    """Return how large a table of at most `memory_bytes` of kernel memory is on a machine of `cpus` possible CPUs.

    Raises:
        BpfError: the memory is too little for these CPUs.
    """
    per_bucket = BUCKET_BYTES + _BUCKET_OF_ENTRIES_BYTES
    buckets = (memory_bytes - _MAPS_OVERHEAD) // (per_bucket * cpus)
    if buckets < 1:
        needed = per_bucket * cpus + _MAPS_OVERHEAD
        raise BpfError(f"plugins.flows.memory of {memory_bytes} bytes is too little for {cpus} CPUs; set {needed}")
    return Sizes(buckets, buckets * cpus * WAYS, buckets * cpus)


def encode_settings(buckets: int, random: bytes) -> bytes:
    """Return the value of the map `flow_settings`.

    Args:
        buckets: for each CPU.
        random: 40 bytes that nobody can guess, for the hash: who knew it could aim at a bucket.
    """
    return SETTINGS.pack(buckets, 0, *(number | 1 for number in struct.unpack("=5Q", random)))


def decode_key(key: bytes) -> Flow:
    """Return whose key it is."""
    source, destination, source_port, destination_port, protocol, direction, first_row = KEY.unpack(key)
    return Flow(
        first_row,
        direction,
        PROTOCOLS.get(protocol, str(protocol)),
        _address(source),
        int.from_bytes(source_port, "big"),
        _address(destination),
        int.from_bytes(destination_port, "big"),
        protocol in WITH_PORTS,
    )


def _address(packed: bytes) -> str:
    if packed.startswith(_IPV4_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[-4:])
    return socket.inet_ntop(socket.AF_INET6, packed)


class FlowTable:
    """The reader of the mapped table.

    Args:
        entries: the mapped map `flows`.
        cpus: parts it has.

    Raises:
        BpfError: it has no such parts.
    """

    def __init__(self, entries: memoryview, cpus: int) -> None:
        self._part_bytes, rest = divmod(len(entries), max(cpus, 1))
        if cpus < 1 or rest or not self._part_bytes or self._part_bytes % _BUCKET_OF_ENTRIES_BYTES:
            raise BpfError(f"{len(entries)} bytes are no table of flows for {cpus} CPUs")
        self._memory = entries
        self._words = entries.cast("Q")
        self._cpus = cpus
        self._last: list[_Columns] = []
        self._evictions = 0

    @property
    def size_bytes(self) -> int:
        """The kernel memory of the table: the entries, and the buckets that lead to them."""
        return len(self._memory) + len(self._memory) // _BUCKET_OF_ENTRIES_BYTES * BUCKET_BYTES

    def read(self, top: int) -> Reading:
        """Read the table, and remember what it says for the next reading.

        Args:
            top: how many of the flows that grew most, by bytes, are wanted; more may be returned. A flow that is spread
                over CPUs such that it is not among the first on any of them can be missed.
        """
        now: list[_Columns] = []
        candidates: list[tuple[int, int, int]] = []  # bytes, cpu, entry
        inserts = entries = 0
        for cpu in range(self._cpus):
            columns = self._read_columns(cpu)
            now.append(columns)
            generations = _numbers(columns.generations)
            inserts += (sum(generations) + 1) // 2
            entries += len(generations) - generations.count(0)
            if self._last:
                candidates += ((size, cpu, entry) for entry, size in _grown(columns, self._last[cpu], generations, top))
        grown = self._measure(candidates, now, top)
        self._last = now
        # While an entry changes hands it may be counted as taken before it is as given: never go back for that.
        self._evictions = max(self._evictions, inserts - entries)
        return Reading(grown, entries, inserts, self._evictions)

    def _read_columns(self, cpu: int) -> _Columns:
        part_words = self._part_bytes // 8
        words = self._words[cpu * part_words : (cpu + 1) * part_words]
        generations = words[_GENERATION::_ENTRY_WORDS].tobytes()
        return _Columns(generations, words[_BYTES::_ENTRY_WORDS].tobytes(), words[_PACKETS::_ENTRY_WORDS].tobytes())

    def _measure(
        self, candidates: Iterable[tuple[int, int, int]], now: Sequence[_Columns], top: int
    ) -> dict[bytes, Amount]:
        """Return what the flows in these entries have counted since the last reading, on all CPUs."""
        largest: dict[bytes, int] = {}
        bucket_of: dict[bytes, int] = {}
        for size, cpu, entry in candidates:
            start = cpu * self._part_bytes + entry * ENTRY_BYTES
            key = bytes(self._memory[start : start + _KEY_BYTES])
            largest[key] = largest.get(key, 0) + size
            bucket_of[key] = entry // WAYS
        shortlist = nlargest(_SHORTLIST * top, largest, key=largest.__getitem__)
        places = [place for key in shortlist for place in self._places(key, bucket_of[key])]
        grown: dict[bytes, Amount] = {}
        for place in places:
            part = self._part(place, now[place.cpu])
            if part:
                before = grown.get(place.key, Amount(0, 0))
                grown[place.key] = Amount(before.bytes + part.bytes, before.packets + part.packets)
        return grown

    def _places(self, key: bytes, bucket: int) -> Iterator[_Place]:
        """Yield a flow's entry on each CPU that has one: its bucket has the same number on all of them."""
        for cpu in range(self._cpus):
            start = cpu * self._part_bytes + bucket * _BUCKET_OF_ENTRIES_BYTES
            content = bytes(self._memory[start : start + _BUCKET_OF_ENTRIES_BYTES])
            at = content.find(key)
            while at > 0 and at % ENTRY_BYTES:
                at = content.find(key, at + 1)
            if at >= 0:
                yield _Place(key, cpu, bucket * WAYS + at // ENTRY_BYTES)

    def _part(self, place: _Place, now: _Columns) -> Amount | None:
        """Return what one entry has counted since the last reading; None where it changed hands under our eyes."""
        at = place.entry * 8
        (generation,) = _WORD.unpack_from(now.generations, at)
        last = self._last[place.cpu]
        present = self._words[(place.cpu * self._part_bytes + place.entry * ENTRY_BYTES) // 8 + _GENERATION]
        if generation & 1 or generation != present:
            return None
        (size,), (packets,) = _WORD.unpack_from(now.sizes, at), _WORD.unpack_from(now.packets, at)
        if generation == _WORD.unpack_from(last.generations, at)[0]:
            size -= _WORD.unpack_from(last.sizes, at)[0]
            packets -= _WORD.unpack_from(last.packets, at)[0]
        return Amount(size, packets)


def _numbers(column: bytes) -> list[int]:
    return memoryview(column).cast("Q").tolist()


def _grown(now: _Columns, last: _Columns, generations: list[int], top: int) -> list[tuple[int, int]]:
    """Return entry and bytes of the `top` entries of one CPU that grew most since the last reading."""
    if now.sizes == last.sizes and now.generations == last.generations:
        return []
    sizes = _numbers(now.sizes)
    grown = list(map(sub, sizes, _numbers(last.sizes)))
    if now.generations != last.generations:
        before = _numbers(last.generations)
        for entry, (generation, old) in enumerate(zip(generations, before, strict=True)):
            if generation != old:
                grown[entry] = sizes[entry]
    # The least of the first `top` as a threshold: a heap of numbers is several times as fast as one of pairs.
    threshold = max(1, nlargest(top, grown)[-1])
    return nlargest(top, ((entry, size) for entry, size in enumerate(grown) if size >= threshold), key=_second)


def _second(pair: tuple[int, int]) -> int:
    return pair[1]
