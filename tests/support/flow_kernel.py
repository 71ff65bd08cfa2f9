"""A model of ebpf/kon_flows_count.h: counts packets to interfaces and flows, one store at a time, on several CPUs."""

from __future__ import annotations

import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator

from kon_agent.bpf.flows import ENTRY_BYTES, KEY, WAYS

_WORD = struct.Struct("=Q")
_BYTES, _PACKETS, _GENERATION = 40, 48, 56  # offsets in an entry


def key(flow: int, first_row: int = 0, direction: int = 0, protocol: int = 17) -> bytes:
    """Return the key of flow number `flow`: 10.x.y.z, port 1000, to 192.0.2.1, port 53."""
    source = bytes(10) + b"\xff\xff\x0a" + flow.to_bytes(3, "big")
    destination = bytes(10) + b"\xff\xff\xc0\x00\x02\x01"
    return KEY.pack(source, destination, b"\x03\xe8", b"\x00\x35", protocol, direction, first_row)


class FlowKernel:
    """What the programs write.

    Attributes:
        memory: the map `flows`.
        totals: first row and direction to bytes and packets, as the rows have them.
        counted: key to bytes, whoever may have seen them.
    """

    def __init__(self, cpus: int, buckets: int) -> None:
        self.memory = bytearray(cpus * buckets * WAYS * ENTRY_BYTES)
        self.totals: defaultdict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
        self.counted: Counter[bytes] = Counter()
        self._buckets = buckets
        self._seen: dict[int, int] = {}
        self._clock = 0

    def count(self, cpu: int, flow: bytes, size: int, packets: int = 1) -> None:
        """Count a packet, all at once."""
        for _ in self.stores(cpu, flow, size, packets):
            continue

    def stores(self, cpu: int, flow: bytes, size: int, packets: int = 1) -> Iterator[None]:
        """Count a packet, stopping after each store: where another CPU may read."""
        *_, direction, first_row = KEY.unpack(flow)
        total = self.totals[first_row, direction]
        total[1] += packets
        yield
        total[0] += size
        self.counted[flow] += size
        yield
        self._clock += 1
        entry = self._find(cpu, flow)
        if entry is None:
            entry = self._oldest(cpu, flow)
            self._seen[entry] = 0  # the next to lose its place, until the second packet
            yield from self._replace(entry, flow)
        else:
            self._seen[entry] = self._clock
        self._add(entry, _PACKETS, packets)
        yield
        self._add(entry, _BYTES, size)
        yield

    def _entries(self, cpu: int, flow: bytes) -> range:
        first = (cpu * self._buckets + zlib.crc32(flow) % self._buckets) * WAYS
        return range(first * ENTRY_BYTES, (first + WAYS) * ENTRY_BYTES, ENTRY_BYTES)

    def _find(self, cpu: int, flow: bytes) -> int | None:
        return next((at for at in self._entries(cpu, flow) if self.memory[at : at + KEY.size] == flow), None)

    def _oldest(self, cpu: int, flow: bytes) -> int:
        return min(self._entries(cpu, flow), key=lambda at: self._seen.get(at, -1))

    def _replace(self, at: int, flow: bytes) -> Iterator[None]:
        self._add(at, _GENERATION, 1)
        yield
        for word in range(0, KEY.size, 8):
            self.memory[at + word : at + word + 8] = flow[word : word + 8]
            yield
        _WORD.pack_into(self.memory, at + _BYTES, 0)
        yield
        _WORD.pack_into(self.memory, at + _PACKETS, 0)
        yield
        self._add(at, _GENERATION, 1)
        yield

    def _add(self, at: int, offset: int, amount: int) -> None:
        _WORD.pack_into(self.memory, at + offset, _WORD.unpack_from(self.memory, at + offset)[0] + amount)
