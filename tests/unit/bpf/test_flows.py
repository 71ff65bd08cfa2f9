"""kon_agent.bpf.flows: the same layout on both sides, a table within its bound, readings that race with the kernel."""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path

import pytest

from kon_agent.bpf import flows
from kon_agent.bpf.flows import Amount, FlowTable
from kon_agent.errors import BpfError
from tests.support.flow_kernel import FlowKernel, key

EBPF = Path(__file__).parents[3] / "ebpf"
HEADER = (EBPF / "kon_flows.h").read_text(encoding="utf-8")
SOURCE = (EBPF / "kon_flows_count.h").read_text(encoding="utf-8")


def test_header_and_python_agree() -> None:
    """A number changed on one side only fails here."""
    asserted = dict(re.findall(r"_Static_assert\(sizeof\(struct (\w+)\) == (\d+)", HEADER))
    assert {
        "kon_flow_key": str(flows.KEY.size),
        "kon_flow": str(flows.ENTRY_BYTES),
        "kon_flow_bucket": str(flows.BUCKET_BYTES),
        "kon_flow_settings": str(flows.SETTINGS.size),
    } == asserted
    assert flows.ENTRY.size == flows.ENTRY_BYTES
    assert f"#define KON_FLOW_WAYS {flows.WAYS} " in HEADER


def test_the_same_protocols_have_ports_on_both_sides() -> None:
    """The labels name ports where the kernel looks for them."""
    body = SOURCE[SOURCE.index("int has_ports") : SOURCE.index("return 1;")]
    assert set(map(int, re.findall(r"case (\d+):", body))) == flows.WITH_PORTS


@pytest.mark.parametrize("memory_bytes", [128 * 1024, 4 * 1024 * 1024, 64 * 1024 * 1024])
@pytest.mark.parametrize("cpus", [1, 2, 3, 64, 100])
def test_the_table_stays_within_its_memory(memory_bytes: int, cpus: int) -> None:
    """Both maps, as the kernel rounds them, fit; and little is given away."""
    sizes = flows.flow_entries(memory_bytes, cpus)
    assert (sizes.flows, sizes.flow_buckets) == (sizes.buckets * cpus * flows.WAYS, sizes.buckets * cpus)
    used = 0
    for entries in (sizes.flows, sizes.flow_buckets):
        pages = -(-entries * flows.ENTRY_BYTES // mmap.PAGESIZE)
        used += (pages + 1) * mmap.PAGESIZE  # a MMAPABLE array has a page of its own before its values
    assert memory_bytes - 576 * cpus - 4 * mmap.PAGESIZE < used <= memory_bytes


def test_memory_that_cannot_be_is_refused() -> None:
    """Too little, and too little for so many CPUs; the message names the option."""
    for memory_bytes, cpus in ((1024, 1), (128 * 1024, 4096)):
        with pytest.raises(BpfError, match=r"plugins\.flows\.memory"):
            flows.flow_entries(memory_bytes, cpus)


def test_settings_are_odd_multipliers() -> None:
    """An even one would lose bits of the key."""
    buckets, unused, *multipliers = flows.SETTINGS.unpack(flows.encode_settings(7, bytes(range(40))))
    assert (7, 0) == (buckets, unused)
    assert all(multiplier & 1 for multiplier in multipliers)


def test_a_key_is_decoded() -> None:
    """IPv4, IPv6, and a protocol without name or ports."""
    assert flows.Flow(6, 1, "udp", "10.0.0.5", 1000, "192.0.2.1", 53, True) == flows.decode_key(key(5, 6, 1))
    ipv6 = flows.KEY.pack(bytes.fromhex("20010db8" + 24 * "0"), bytes(15) + b"\x01", bytes(2), bytes(2), 253, 0, 0)
    assert flows.Flow(0, 0, "253", "2001:db8::", 0, "::1", 0, False) == flows.decode_key(ipv6)


def table(kernel: FlowKernel, cpus: int = 1) -> FlowTable:
    return FlowTable(memoryview(kernel.memory).toreadonly(), cpus)


def test_the_first_reading_knows_no_interval() -> None:
    """What was counted before is nobody's."""
    kernel = FlowKernel(1, 4)
    kernel.count(0, key(1), 100)
    reading = table(kernel).read(10)
    assert ({}, 1, 1, 0) == (reading.grown, reading.entries, reading.inserts, reading.evictions)


def test_growth_is_since_the_last_reading() -> None:
    """Of flows there before and of new ones; of those at rest nothing."""
    kernel = FlowKernel(1, 4)
    for flow in (1, 2):
        kernel.count(0, key(flow), 100)
    reader = table(kernel)
    reader.read(10)
    kernel.count(0, key(1), 50, packets=3)
    kernel.count(0, key(3), 70)
    assert {key(1): Amount(50, 3), key(3): Amount(70, 1)} == reader.read(10).grown
    assert {} == reader.read(10).grown


def test_a_flow_is_the_sum_of_its_cpus() -> None:
    """Also where it is too small on one of them to be among the first there."""
    kernel = FlowKernel(3, 4)
    reader = table(kernel, 3)
    reader.read(1)
    kernel.count(0, key(1), 1000)
    kernel.count(1, key(1), 10)
    kernel.count(1, key(2), 500)
    kernel.count(2, key(1), 1)
    grown = reader.read(1).grown
    assert Amount(1011, 3) == grown[key(1)]
    assert max(grown, key=grown.__getitem__) == key(1)


def test_a_flow_that_takes_a_place_begins_at_zero() -> None:
    """The former owner's bytes are not its own; the change is an eviction."""
    kernel = FlowKernel(1, 1)
    for flow in range(8):
        kernel.count(0, key(flow), 1000)
    reader = table(kernel)
    reader.read(10)
    kernel.count(0, key(8), 30)
    reading = reader.read(10)
    assert {key(8): Amount(30, 1)} == reading.grown
    assert (8, 9, 1) == (reading.entries, reading.inserts, reading.evictions)


def test_the_largest_are_wanted() -> None:
    """Of a thousand flows those that grew most."""
    kernel = FlowKernel(2, 64)
    reader = table(kernel, 2)
    reader.read(5)
    for flow in range(1000):
        kernel.count(flow % 2, key(flow), 60 + flow)
    grown = reader.read(5).grown
    assert [key(flow) for flow in (999, 998, 997, 996, 995)] == sorted(grown, key=grown.__getitem__, reverse=True)[:5]


def test_an_entry_that_changes_hands_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading its counts and its key, whatever was stored: next time it counts from its begin."""
    for stop in range(13):
        kernel = FlowKernel(1, 1)
        for flow in range(8):
            kernel.count(0, key(flow), 1000)
        reader = table(kernel)
        reader.read(10)
        kernel.count(0, key(0), 500)
        for flow in range(2, 8):
            kernel.count(0, key(flow), 1)
        stores = kernel.stores(0, key(8), 30)  # will replace flow 1, the least recently seen

        read_columns = reader._read_columns

        def and_then(cpu: int, stop: int = stop, read_columns=read_columns, stores=stores):  # type: ignore[no-untyped-def]
            columns = read_columns(cpu)
            for _ in range(stop):
                next(stores)
            return columns

        monkeypatch.setattr(reader, "_read_columns", and_then)
        first = reader.read(10).grown
        monkeypatch.setattr(reader, "_read_columns", read_columns)
        assert Amount(500, 1) == first[key(0)]
        assert key(8) not in first
        for _ in stores:
            continue
        assert {key(8): Amount(30, 1)} == reader.read(10).grown


def test_half_an_entry_is_nobody_s() -> None:
    """While the generation is odd, for as long as that takes."""
    kernel = FlowKernel(1, 1)
    for flow in range(8):
        kernel.count(0, key(flow), 1000)  # whose bytes are still there when the new key is
    reader = table(kernel)
    reader.read(10)
    stores = kernel.stores(0, key(8), 30)
    for _ in range(10):
        next(stores)
        assert {} == reader.read(10).grown
    for _ in stores:
        continue
    assert {key(8): Amount(30, 1)} == reader.read(10).grown


def test_a_key_is_not_found_where_it_only_seems_to_be() -> None:
    """Counts that look like a key, across the border of two entries, are none."""
    kernel = FlowKernel(1, 1)
    reader = table(kernel)
    for other in (2, 3):  # theirs are the first two entries
        kernel.count(0, key(other), 30)
    reader.read(1)
    kernel.count(0, key(1), 30)
    flow = key(1)
    struct.pack_into("24s", kernel.memory, 40, flow[:24])
    struct.pack_into("16s", kernel.memory, 64, flow[24:])
    assert {flow: Amount(30, 1)} == reader.read(1).grown


def test_memory_that_is_no_table_is_refused() -> None:
    """Not whole buckets, or no CPU."""
    for size, cpus in ((0, 1), (512, 0), (1024, 3), (64, 1)):
        with pytest.raises(BpfError, match="no table of flows"):
            FlowTable(memoryview(bytes(size)), cpus)
