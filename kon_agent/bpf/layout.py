"""What kernel and user space share: the layout of ebpf/kon_net.h, said again, and the table of interfaces.

Counters are rows of ROW_BYTES, one per possible CPU and slot, side by side:

    row = slot * cpus + cpu
    row: packets, bytes as u64   for each of PROTOCOL_COLUMNS   for each of DIRECTIONS

The kernel alone writes them; a worker maps them read-only and adds up a slot's rows. The table of
interfaces is JSON on a page (`kon_agent.page`) the supervisor publishes: it gives the slots their names,
and the number of CPUs.

A slot passes to another interface once no fresh one is left. The kernel's numbers go on from where they were
(nobody can zero a frozen map), so the table carries the slot's `base`: what it counted for its former owners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from kon_agent.errors import BpfError

# As in ebpf/kon_net.h.
ROWS = 4096
ROW_BYTES = 256
BUCKETS = 128
BUCKET_ENTRIES = 8
BUCKET_BYTES = 64
IS_RAW_IP = 1
DIRECTIONS = ("ingress", "egress")
PROTOCOLS = ("tcp", "udp", "icmp", "icmpv6", "ip", "arp", "other")
PROTOCOL_COLUMNS = 8  # the header's KON_PROTOCOLS; the last column is not in use

COUNTERS_BYTES = ROWS * ROW_BYTES
MAX_SLOTS = 256  # a fifth of the interface table's entries: its buckets practically never overflow
MAX_LISTED = 256  # interfaces in one table; its size must have a bound, and every listed one costs series
TABLE_BYTES = 320 * 1024  # MAX_LISTED entries of 1.2 KiB at most: name, reasons, 32 numbers of 20 digits
MAX_REASON_CHARS = 120  # a reason is a label: enough for an errno and its text

_ROW_WORDS = ROW_BYTES // 8
_DIRECTION_WORDS = PROTOCOL_COLUMNS * 2
BASE_WORDS = _ROW_WORDS

IngressMode = Literal["native", "generic", "none"]
EgressMode = Literal["tcx", "none"]
Counts = dict[tuple[str, str], tuple[int, int]]
"""(direction, protocol) to (packets, bytes)."""


class Interface(msgspec.Struct, frozen=True):
    """One watched interface.

    Attributes:
        slot: its counters, or -1 where neither direction is attached.
        ifindex: the kernel's number of the interface.
        name: its name when it was attached.
        ingress_mode, egress_mode: how each direction is counted; "none": it is not.
        ingress_reason, egress_reason: why a direction is not counted the best way; empty where it is.
        base: the slot's BASE_WORDS sums when this interface got it, to be subtracted; empty: all zero.
    """

    slot: int
    ifindex: int
    name: str
    ingress_mode: IngressMode
    ingress_reason: str
    egress_mode: EgressMode
    egress_reason: str
    base: list[int] = []


class Table(msgspec.Struct, frozen=True):
    """All watched interfaces.

    Attributes:
        cpus: rows per slot, the number of possible CPUs.
        interfaces: at most MAX_LISTED.
        omitted: how many more interfaces there are than the table lists.
    """

    cpus: int
    interfaces: list[Interface]
    omitted: int = 0


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Table)


def slots_for(cpus: int) -> int:
    """Return how many interfaces the counters hold on a machine of `cpus` possible CPUs; may be 0."""
    return min(MAX_SLOTS, ROWS // cpus)


def make_table(cpus: int, interfaces: Sequence[Interface]) -> Table:
    """Return a table of the first MAX_LISTED `interfaces`, counted ones before all others."""
    ordered = sorted(interfaces, key=lambda interface: interface.slot < 0)
    return Table(cpus, ordered[:MAX_LISTED], max(0, len(ordered) - MAX_LISTED))


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
        counters: the mapped counters, COUNTERS_BYTES long.
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


def read_slot(counters: memoryview, slot: int, cpus: int, base: Sequence[int] = ()) -> Counts:
    """Return a slot's packets and bytes by direction and protocol, summed over CPUs, less `base`.

    Args:
        counters: the mapped counters, COUNTERS_BYTES long.
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
    counts: Counts = {}
    for d, direction in enumerate(DIRECTIONS):
        for p, protocol in enumerate(PROTOCOLS):
            word = d * _DIRECTION_WORDS + p * 2
            counts[direction, protocol] = (sums[word], sums[word + 1])
    return counts
