"""kon_agent.bpf.layout: the same layout on both sides, sums over CPUs, and the table of interfaces."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from kon_agent.bpf import layout
from kon_agent.errors import BpfError

HEADER = (Path(__file__).parents[3] / "ebpf" / "kon_net.h").read_text(encoding="utf-8")


def header_number(name: str) -> int:
    match = re.search(rf"(?:#define {name}|\b{name} =) (\d+)", HEADER)
    assert match, f"{name} is not in kon_net.h"
    return int(match[1])


def rows(*counts: tuple[int, int, int, int, int], **events: int) -> memoryview:
    """Counters with (row, direction, protocol, packets of up to 64 bytes, bytes) set; events in row 0, ingress."""
    memory = bytearray(layout.COUNTERS_BYTES)
    for row, direction, protocol, packets, size in counts:
        at = row * layout.ROW_BYTES + direction * layout.ROW_BYTES // 2 + protocol * layout.LINE_BYTES
        struct.pack_into("=QQ", memory, at, size, packets)
    for name, number in events.items():
        at = len(layout.PROTOCOLS) * layout.LINE_BYTES + layout.EVENTS.index(name) * 8
        struct.pack_into("=Q", memory, at, number)
    return memoryview(memory).toreadonly()


def interface(slot: int, name: str = "eth0", base: list[int] | None = None) -> layout.Interface:
    return layout.Interface(slot, 7, name, "native", "", "tcx", "", base or [])


def test_header_and_python_agree_on_every_number() -> None:
    """A number changed on one side only fails here."""
    assert layout.ROWS == header_number("KON_ROWS")
    assert layout.BUCKETS == header_number("KON_BUCKETS")
    assert layout.BUCKET_ENTRIES == header_number("KON_BUCKET_ENTRIES")
    assert len(layout.PROTOCOLS) == header_number("KON_PROTOCOLS")
    assert len(layout.SIZE_BOUNDS) + 1 == header_number("KON_SIZES")
    assert len(layout.EVENTS) == header_number("KON_EVENTS")
    assert layout.IS_RAW_IP == header_number("KON_IS_RAW_IP")
    assert len(layout.DIRECTIONS) == header_number("KON_DIRECTIONS")
    for number, direction in enumerate(layout.DIRECTIONS):
        assert number == header_number(f"KON_{direction.upper()}")
    for number, protocol in enumerate(layout.PROTOCOLS):
        assert number == header_number(f"KON_{protocol.upper().replace('-', '_')}")
    for number, bound in enumerate(layout.SIZE_BOUNDS):
        assert number == header_number(f"KON_SIZE_{bound}")
    for number, event in enumerate(layout.EVENTS):
        assert number == header_number(f"KON_{event.upper()}")


def test_header_and_python_agree_on_sizes() -> None:
    """The sizes the C side asserts are the ones this side reads by."""
    asserted = dict(re.findall(r"_Static_assert\(sizeof\(struct (\w+)\) == (\d+)", HEADER))
    assert {"kon_line": "64", "kon_events": "64", "kon_row": "1024", "kon_bucket": "64"} == asserted
    assert (layout.LINE_BYTES, layout.ROW_BYTES, layout.BUCKET_BYTES) == (64, 1024, 64)


def test_a_slot_is_the_sum_of_its_cpus_and_of_no_other() -> None:
    """Rows of the slot's CPUs add up; the neighbours' rows stay out."""
    counters = rows((3, 0, 0, 100, 1000), (4, 0, 0, 1, 60), (5, 0, 0, 2, 120), (6, 0, 0, 100, 1000), (5, 1, 6, 3, 9))
    counts = layout.read_slot(counters, slot=2, cpus=2)
    assert (3, 180) == counts["ingress", "tcp"]
    assert (3, 9) == counts["egress", "other"]
    assert {(0, 0)} == {value for key, value in counts.items() if key not in {("ingress", "tcp"), ("egress", "other")}}
    assert len(layout.DIRECTIONS) * len(layout.PROTOCOLS) == len(counts)


def test_traffic_has_sizes_bytes_and_events() -> None:
    """Every column of a direction comes back under its name, and in its sums."""
    counters = rows((0, 0, 4, 3, 180), (0, 0, 6, 2, 100), tcp_syn=7, multicast=9)
    ingress = layout.read_traffic(counters, 0, 1)["ingress"]
    assert ([3, 0, 0, 0, 0, 0, 0], 180, 3) == (
        ingress.sizes["other-ip"],
        ingress.bytes["other-ip"],
        ingress.packets("other-ip"),
    )
    assert [5, 0, 0, 0, 0, 0, 0] == ingress.packets_by_size()
    assert {"tcp_syn": 7, "multicast": 9} == {name: number for name, number in ingress.events.items() if number}


def test_what_former_owners_counted_is_subtracted() -> None:
    """An interface in a used slot starts at zero."""
    before = layout.read_sums(rows((0, 0, 2, 10, 980)), 0, 1)
    counts = layout.read_slot(rows((0, 0, 2, 13, 1274)), 0, 1, before)
    assert (3, 294) == counts["ingress", "icmp"]


@pytest.mark.parametrize(("slot", "cpus"), [(-1, 2), (layout.ROWS, 1), (2048, 2), (0, 0), (0, layout.ROWS + 1)])
def test_a_slot_outside_of_the_counters_is_refused(slot: int, cpus: int) -> None:
    """A damaged table can not make a reader leave the mapping."""
    with pytest.raises(BpfError, match="outside"):
        layout.read_slot(rows(), slot, cpus)


def test_a_base_of_another_length_is_refused() -> None:
    """A damaged table can not shift the columns."""
    with pytest.raises(BpfError, match="base"):
        layout.read_slot(rows(), 0, 1, [1, 2, 3])


@pytest.mark.parametrize(("cpus", "slots"), [(1, 256), (2, 256), (16, 256), (64, 64), (256, 16), (4096, 1), (8192, 0)])
def test_slots_shrink_as_cpus_grow(cpus: int, slots: int) -> None:
    """There is a bound on the rows; the map is as large as slots and CPUs need."""
    assert slots == layout.slots_for(cpus)
    assert slots * cpus * 1024 == layout.counters_bytes(cpus) <= layout.COUNTERS_BYTES


def test_table_survives_its_encoding() -> None:
    """What the supervisor publishes is what the worker reads."""
    table = layout.make_table(4, [interface(0), interface(1, "wlan0", base=[5] * layout.BASE_WORDS)])
    assert table == layout.decode(layout.encode(table))


def test_table_is_bounded_and_counts_what_it_omits() -> None:
    """Counted interfaces come first; the rest beyond the bound is a number; the longest table fits its page."""
    longest = layout.Interface(
        slot=255,
        ifindex=2**31,
        name="\\udcff" * 15,  # no UTF-8, as net.py writes it
        ingress_mode="generic",
        ingress_reason="r" * layout.MAX_REASON_CHARS,
        egress_mode="none",
        egress_reason="r" * layout.MAX_REASON_CHARS,
        base=[2**64 - 1] * layout.BASE_WORDS,
    )
    table = layout.make_table(64, [interface(-1), *[longest] * layout.MAX_LISTED])
    assert 1 == table.omitted
    assert [longest] * layout.MAX_LISTED == table.interfaces
    assert layout.TABLE_BYTES >= len(layout.encode(table))


@pytest.mark.parametrize("payload", [b"", b"{}", b"[]", b'{"cpus":1,"interfaces":[{"slot":"x"}]}', b"\xff"])
def test_a_damaged_table_is_one_error(payload: bytes) -> None:
    """Nonsense on the page is a BpfError, whatever it is."""
    with pytest.raises(BpfError, match="table of interfaces"):
        layout.decode(payload)
