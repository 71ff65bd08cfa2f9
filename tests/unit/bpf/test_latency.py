"""kon_agent.bpf.latency, runqlat and biolat: the same layouts on both sides."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from kon_agent.bpf import biolat, latency, runqlat
from kon_agent.config.schema import BiolatConfig

EBPF = Path(__file__).parents[3] / "ebpf"


def number(header: str, name: str) -> int:
    """Return a number that a header defines."""
    match = re.search(rf"(?:#define {name}|\b{name} =) (\d+)", (EBPF / header).read_text(encoding="utf-8"))
    assert match, f"{name} is not in {header}"
    return int(match[1])


def asserted_bytes(header: str) -> int:
    """Return the one size that a header asserts."""
    (size,) = re.findall(
        r"_Static_assert\(sizeof\(struct \w*(?:row|latency)\) == (\d+)", (EBPF / header).read_text(encoding="utf-8")
    )
    return int(size)


def test_header_and_python_agree_on_the_histogram() -> None:
    """As many buckets and bytes on either side, and one bound less than there are buckets."""
    assert latency.BUCKETS == number("kon_latency.h", "KON_LATENCY_BUCKETS")
    assert latency.LATENCY_WORDS * 8 == asserted_bytes("kon_latency.h")
    assert latency.BUCKETS - 1 == len(latency.BOUNDS_S)
    assert (1e-06, 2e-06, 1.048576) == (latency.BOUNDS_S[0], latency.BOUNDS_S[1], latency.BOUNDS_S[-1])


def test_header_and_python_agree_on_rows() -> None:
    """The sizes the C side asserts are the ones this side reads by, and every column lies in its row."""
    assert runqlat.ROW_BYTES == asserted_bytes("kon_runqlat.h")
    assert biolat.ROW_BYTES == asserted_bytes("kon_biolat.h")
    assert runqlat.MISSED * 8 < runqlat.ROW_BYTES
    assert biolat.MISSED * 8 < biolat.ROW_BYTES


def test_header_and_python_agree_on_slots_and_operations() -> None:
    """A slot per device and one more; operations in the header's order."""
    assert biolat.DEVICES == number("kon_biolat.h", "KON_DEVICES")
    assert biolat.SLOTS == number("kon_biolat.h", "KON_SLOTS")
    assert len(biolat.OPERATIONS) == number("kon_biolat.h", "KON_OPERATIONS")
    for position, operation in enumerate(biolat.OPERATIONS):
        assert position == number("kon_biolat.h", f"KON_{operation.upper()}")


@pytest.mark.parametrize(("word", "major_minor"), [(8 << 20 | 16, (8, 16)), (259 << 20 | 1048575, (259, 1048575))])
def test_a_device_number_is_the_kernels(word: int, major_minor: tuple[int, int]) -> None:
    """Twelve bits of major number over twenty of minor number."""
    assert number("kon_biolat.h", "KON_MINOR_BITS") == 20
    assert major_minor == biolat.device_number(word)


def test_what_is_left_out_as_a_whole_is_left_out_in_the_kernel() -> None:
    """A pattern for all devices of a kind is the bit of its major number; any other is for user space."""
    header = (EBPF / "kon_biolat.h").read_text(encoding="utf-8")
    assert f"sizeof(struct kon_biolat_settings) == {biolat.SETTINGS_BYTES}" in header
    assert (1 << 7 | 1 << 1).to_bytes(4, sys.byteorder) == biolat.settings(BiolatConfig())
    assert bytes(4) == biolat.settings(BiolatConfig(exclude_devices=["loop1", "nvme*"]))


def test_a_histogram_is_read_where_it_begins() -> None:
    """Counts and sum of the second histogram of a row are those from its first column on."""
    columns = [*([0] * latency.LATENCY_WORDS), *range(latency.BUCKETS), 1_500_000_000]
    assert latency.Latency(list(range(latency.BUCKETS)), 1.5) == latency.latency_of(columns, latency.LATENCY_WORDS)
