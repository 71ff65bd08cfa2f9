"""kon_agent.linux.tc and xdp: what the kernel says of filters and programs, byte for byte."""

from __future__ import annotations

import struct

from kon_agent.linux import tc, xdp
from kon_agent.linux.rtnetlink import attribute
from kon_agent.linux.tc import Filter


def tcmsg(handle: int, priority: int) -> bytes:
    return struct.pack("=BxxxiIII", 0, 7, handle, tc.EGRESS, priority << 16 | 0x0300)


def u32(number: int) -> bytes:
    return struct.pack("=I", number)


def test_a_bpf_filter() -> None:
    """Priority, handle, name and program are read."""
    options = attribute(7, b"kon_tc_egress\0") + attribute(8, u32(1)) + attribute(11, u32(4711))
    body = tcmsg(0x6B6F6E, 3) + attribute(1, b"bpf\0") + attribute(2, options)
    assert Filter(3, 0x6B6F6E, "bpf", "kon_tc_egress", 4711) == tc.parse_filter(body)


def test_a_filter_of_another_kind() -> None:
    """It has no name and no program."""
    assert Filter(49152, 0x80000800, "u32") == tc.parse_filter(tcmsg(0x80000800, 49152) + attribute(1, b"u32\0"))


def test_a_message_cut_short_is_no_filter() -> None:
    """Nor is it an error."""
    assert None is tc.parse_filter(tcmsg(1, 1)[:-1])


def test_no_qdisc_no_filters() -> None:
    """Loopback has none here; asking takes no privilege."""
    assert [] == tc.filters(1)


def test_xdp_programs_by_mode() -> None:
    """Each mode of a device can have one."""
    nested = attribute(2, b"\x04") + attribute(5, u32(11)) + attribute(6, u32(12))
    body = bytes(16) + attribute(3, b"eth0\0") + attribute(43, nested)
    assert {"native": 11, "generic": 12} == xdp.parse_programs(body)


def test_no_xdp_program() -> None:
    """An interface without one says only that."""
    assert {} == xdp.parse_programs(bytes(16) + attribute(43, attribute(2, b"\0")))
    assert {} == xdp.parse_programs(b"")
