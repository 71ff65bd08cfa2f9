"""What kernel and user space share: the layout of ebpf/kon_net.h, said again, and the table of interfaces.

Counters are rows of ROW_BYTES, one per possible CPU and slot, side by side; all numbers are u64, a line is 64 bytes:

    row = slot * cpus + cpu
    row       for each of DIRECTIONS: a line for each of PROTOCOLS, a line of events
    line      bytes, then the packets of each size: up to each of SIZE_BOUNDS, and larger
    events    for each of EVENTS, and two spare ones

The kernel alone writes them; a worker maps them read-only and adds up a slot's rows. The table of
interfaces is JSON on a page (`kon_agent.page`) the supervisor publishes: it gives the slots their names,
and the number of CPUs.

A slot passes to another interface once no fresh one is left. The kernel's numbers go on from where they were
(nobody can zero a frozen map), so the table carries the slot's `base`: what it counted for its former owners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from kon_agent.errors import BpfError

# As in ebpf/kon_net.h.
ROWS = 4096
ROW_BYTES = 1024
LINE_BYTES = 64
BUCKETS = 128
BUCKET_ENTRIES = 8
BUCKET_BYTES = 64
IS_RAW_IP = 1
DIRECTIONS = ("ingress", "egress")
PROTOCOLS = ("tcp", "udp", "icmp", "icmpv6", "other-ip", "arp", "other")
SIZE_BOUNDS = (64, 128, 256, 512, 1024, 1518)  # bytes of a frame
EVENTS = ("tcp_fin", "tcp_syn", "tcp_rst", "malformed", "broadcast", "multicast")

COUNTERS_BYTES = ROWS * ROW_BYTES  # at most: see counters_bytes
MAX_SLOTS = 256  # a fifth of the interface table's entries: its buckets practically never overflow
MAX_LISTED = 256  # interfaces in one table; its size must have a bound, and every listed one costs series
TABLE_BYTES = 1024 * 1024  # MAX_LISTED entries of 3.2 KiB at most: name, reasons, 128 numbers of 20 digits
MAX_REASON_CHARS = 120  # a reason is a label: enough for an errno and its text

_ROW_WORDS = ROW_BYTES // 8
_LINE_WORDS = LINE_BYTES // 8
_DIRECTION_WORDS = _ROW_WORDS // len(DIRECTIONS)
BASE_WORDS = _ROW_WORDS

IngressMode = Literal["native", "generic", "none"]
EgressMode = Literal["tcx", "clsact", "none"]
Counts = dict[tuple[str, str], tuple[int, int]]
"""(direction, protocol) to (packets, bytes)."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What an interface has counted in one direction.

    Attributes:
        sizes: by protocol, the packets of each size: up to each of SIZE_BOUNDS, and larger.
        bytes: by protocol, frame lengths.
        events: by name, see EVENTS.
    """

    sizes: dict[str, list[int]]
    bytes: dict[str, int]
    events: dict[str, int]

    def packets(self, protocol: str) -> int:
        """Return the packets of a protocol."""
        return sum(self.sizes[protocol])

    def packets_by_size(self) -> list[int]:
        """Return the packets of each size, of all protocols."""
        return [sum(column) for column in zip(*self.sizes.values(), strict=True)]


class Interface(msgspec.Struct, frozen=True):
    """One watched interface.

    Attributes:
        slot: its counters, or -1 where neither direction is attached.
        ifindex: the kernel's number of the interface.
        name: its name when it was attached.
        ingress_mode, egress_mode: how each direction is counted; "none": it is not.
        ingress_reason, egress_reason: why a direction is not counted the best way; empty where it is.
        base: the slot's BASE_WORDS sums when this interface got it, to be subtracted; empty: all zero.
        created_ns: wall time when its counters were at zero; 0: nobody knows.
    """

    slot: int
    ifindex: int
    name: str
    ingress_mode: IngressMode
    ingress_reason: str
    egress_mode: EgressMode
    egress_reason: str
    base: list[int] = []
    created_ns: int = 0


class ProgramCost(msgspec.Struct, frozen=True):
    """What a BPF program of ours has cost while statistics were on: processor time and runs."""

    name: str
    run_time_ns: int
    run_cnt: int


class MapCost(msgspec.Struct, frozen=True):
    """The kernel memory of a BPF map of ours."""

    name: str
    bytes: int


class Table(msgspec.Struct, frozen=True):
    """All watched interfaces, and what it costs to watch.

    Attributes:
        cpus: rows per slot, the number of possible CPUs.
        interfaces: at most MAX_LISTED.
        omitted: how many more interfaces there are than the table lists.
        programs: only while statistics are on.
        maps: of whichever plugins have some.
    """

    cpus: int
    interfaces: list[Interface]
    omitted: int = 0
    programs: list[ProgramCost] = []
    maps: list[MapCost] = []


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Table)


def slots_for(cpus: int) -> int:
    """Return how many interfaces the counters hold on a machine of `cpus` possible CPUs; may be 0."""
    return min(MAX_SLOTS, ROWS // cpus)


def counters_bytes(cpus: int) -> int:
    """Return the size of the counters on a machine of `cpus` possible CPUs."""
    return slots_for(cpus) * cpus * ROW_BYTES


def make_table(
    cpus: int, interfaces: Sequence[Interface], programs: Sequence[ProgramCost] = (), maps: Sequence[MapCost] = ()
) -> Table:
    """Return a table of the first MAX_LISTED `interfaces`, counted ones before all others, and of all costs."""
    ordered = sorted(interfaces, key=lambda interface: interface.slot < 0)
    omitted = max(0, len(ordered) - MAX_LISTED)
    return Table(cpus, ordered[:MAX_LISTED], omitted, list(programs), list(maps))


def encode(table: Table) -> bytes:
    """Return the table as JSON of at most TABLE_BYTES."""
    return _encoder.encode(table)


def decode(payload: bytes) -> Table:
    """Return the table that `encode` wrote.

    Raises:
        BpfError: it is not such a table.
    """
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as err:
        raise BpfError(f"the table of interfaces is not what a supervisor publishes: {err}") from err


def read_sums(counters: memoryview, slot: int, cpus: int) -> list[int]:
    """Return a slot's BASE_WORDS words, each the sum over all CPUs.

    Args:
        counters: the mapped counters.
        slot: which interface's.
        cpus: rows per slot.

    Raises:
        BpfError: the counters have no such slot.
    """
    start, end = slot * cpus * ROW_BYTES, (slot + 1) * cpus * ROW_BYTES
    if slot < 0 or cpus < 1 or end > len(counters):
        raise BpfError(f"slot {slot} of {cpus} CPUs lies outside of counters of {len(counters)} bytes")
    words = counters[start:end].cast("Q").tolist()
    return [sum(words[column::_ROW_WORDS]) for column in range(_ROW_WORDS)]


def read_traffic(counters: memoryview, slot: int, cpus: int, base: Sequence[int] = ()) -> dict[str, Traffic]:
    """Return all that a slot has counted, by direction, summed over CPUs, less `base`.

    Args:
        counters: the mapped counters.
        slot: which interface's.
        cpus: rows per slot.
        base: BASE_WORDS words counted for the slot's former owners; empty: none.

    Raises:
        BpfError: the counters have no such slot, or `base` has another length.
    """
    sums = read_sums(counters, slot, cpus)
    if base:
        if len(base) != BASE_WORDS:
            raise BpfError(f"base of slot {slot} has {len(base)} words instead of {BASE_WORDS}")
        sums = [total - before for total, before in zip(sums, base, strict=True)]
    return {
        direction: _traffic(sums[d * _DIRECTION_WORDS : (d + 1) * _DIRECTION_WORDS])
        for d, direction in enumerate(DIRECTIONS)
    }


def read_slot(counters: memoryview, slot: int, cpus: int, base: Sequence[int] = ()) -> Counts:
    """Return a slot's packets and bytes by direction and protocol; otherwise as `read_traffic`."""
    traffic = read_traffic(counters, slot, cpus, base)
    return {
        (direction, protocol): (each.packets(protocol), each.bytes[protocol])
        for direction, each in traffic.items()
        for protocol in PROTOCOLS
    }


def _traffic(words: Sequence[int]) -> Traffic:
    lines = [words[start : start + _LINE_WORDS] for start in range(0, len(words), _LINE_WORDS)]
    by_protocol = dict(zip(PROTOCOLS, lines, strict=False))
    return Traffic(
        sizes={protocol: list(line[1:]) for protocol, line in by_protocol.items()},
        bytes={protocol: line[0] for protocol, line in by_protocol.items()},
        events=dict(zip(EVENTS, lines[len(PROTOCOLS)], strict=False)),
    )
