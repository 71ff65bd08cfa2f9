"""kon_agent.bpf.tcp: the same layout on both sides, and rows read by it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from kon_agent.bpf import tcp
from kon_agent.errors import BpfError

HEADER = (Path(__file__).parents[3] / "ebpf" / "kon_tcp.h").read_text(encoding="utf-8")


def header_number(name: str) -> int:
    match = re.search(rf"(?:#define {name}|\b{name} =) (\d+)", HEADER)
    assert match, f"{name} is not in kon_tcp.h"
    return int(match[1])


def test_header_and_python_agree_on_every_number() -> None:
    """A reason, bound or size changed on one side only fails here."""
    assert tcp.FIRST_BOUND == header_number("KON_TCP_FIRST_BOUND")
    assert tcp.BUCKETS == header_number("KON_TCP_BUCKETS")
    for prefix, names, count in (
        ("KON_FAILED", tcp.FAILURES, "KON_FAILURES"),
        ("KON_ABORTED", tcp.ABORTS, "KON_ABORTS"),
        ("KON_RETRANSMIT", tcp.RETRANSMITS, "KON_RETRANSMITS"),
    ):
        assert len(names) == header_number(count)
        assert list(range(len(names))) == [header_number(f"{prefix}_{name.upper()}") for name in names]
    asserted = dict(re.findall(r"_Static_assert\(sizeof\(struct (\w+)\) == (\d+)", HEADER))
    assert {"kon_tcp_row": str(tcp.ROW_BYTES), "kon_tcp_settings": str(tcp.SETTINGS_BYTES)} == asserted


def test_the_columns_are_in_the_header_s_order() -> None:
    """Each member is read from where the structure has it."""
    body = HEADER[HEADER.index("struct kon_tcp_row {") : HEADER.index("} __attribute__((aligned(64)));")]
    assert re.findall(r"\b(\w+)(?:\[\w+\])?;", body) == list(tcp.Counts.__slots__)


def test_counts_are_the_sums_over_the_cpus() -> None:
    """Every column is added up over the rows; sums of times come in seconds."""
    first = list(range(1, tcp.COLUMNS + 1))
    second = [1000 * value for value in first]
    seen = tcp.read(memoryview(struct.pack(f"={2 * tcp.COLUMNS}Q", *first, *second)))
    assert (1001, 2002, 3003) == (seen.opened, seen.accepted, seen.closed)
    assert [1001 * column for column in range(4, 10)] == list(seen.failed.values())
    assert [1001 * column for column in range(10, 15)] == list(seen.aborted.values())
    assert {"syn": 15015, "data": 16016} == seen.retransmits
    assert (17017, 18018) == (seen.resets_sent, seen.resets_received)
    assert pytest.approx(19019e-9) == seen.connect.total_s
    assert [1001 * column for column in range(20, 42)] == seen.connect.counts
    assert pytest.approx(42042e-6) == seen.rtt.total_s
    assert [1001 * column for column in range(43, 65)] == seen.rtt.counts


def test_bounds_are_one_less_than_buckets() -> None:
    """From 64 µs, doubling, to 67 s; the last bucket has none."""
    assert tcp.BUCKETS - 1 == len(tcp.BOUNDS_S)
    assert (64e-6, 67.108864) == (tcp.BOUNDS_S[0], tcp.BOUNDS_S[-1])


def test_rows_of_another_size_are_refused() -> None:
    """What cannot be whole rows is an error, not a count."""
    with pytest.raises(BpfError):
        tcp.read(memoryview(bytes(tcp.ROW_BYTES + 8)))
