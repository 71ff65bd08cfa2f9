"""Frames of Ethernet as bytes, right to the last field that anything looks at, or wrong as asked."""

from __future__ import annotations

import struct

HERE = bytes.fromhex("020000000001")  # the addresses of the netns tests' link
THERE = bytes.fromhex("020000000002")
BROADCAST = b"\xff" * 6
MULTICAST = bytes.fromhex("01005e000001")

FIN, SYN, RST, ACK = 1, 2, 4, 16
IPV4_TCP, IPV4_UDP, IPV4_ICMP = 6, 17, 1
MORE_FRAGMENTS = 0x2000


def tcp(flags: int = ACK, payload: bytes = b"", data_offset: int = 5) -> bytes:
    """Return a TCP segment."""
    return struct.pack("!HHIIBBHHH", 40000, 80, 1, 1, data_offset << 4, flags, 1000, 0, 0) + payload


def udp(payload: bytes = bytes(20), length: int | None = None) -> bytes:
    """Return a UDP datagram."""
    return struct.pack("!HHHH", 40000, 9, 8 + len(payload) if length is None else length, 0) + payload


def icmp() -> bytes:
    """Return an echo reply that nobody waits for; ICMP and ICMPv6 have the same header."""
    return struct.pack("!BBHHH", 0, 0, 0, 1, 1) + bytes(32)


def ipv4(number: int, payload: bytes, *, version_ihl: int = 0x45, total: int | None = None, fragment: int = 0) -> bytes:
    """Return an Ethernet type and an IPv4 datagram; `total` is the length it says it has."""
    options = bytes(max(0, (version_ihl & 15) * 4 - 20))
    length = 20 + len(options) + len(payload) if total is None else total
    header = struct.pack("!BBHHHBBH", version_ihl, 0, length, 1, fragment, 64, number, 0)
    return b"\x08\x00" + header + b"\x0a\x4d\0\x02" + b"\x0a\x4d\0\x01" + options + payload


def ipv6(next_header: int, payload: bytes, *, version: int = 6, length: int | None = None) -> bytes:
    """Return an Ethernet type and an IPv6 datagram; `length` is the payload it says it has."""
    said = len(payload) if length is None else length
    return b"\x86\xdd" + struct.pack("!IHBB", version << 28, said, next_header, 64) + bytes(32) + payload


def extension(next_header: int, units: int = 0) -> bytes:
    """Return an extension header of IPv6, 8 bytes and as many more units."""
    return bytes([next_header, units]) + bytes(6 + 8 * units)


def fragment(next_header: int, offset: int, more: int = 0) -> bytes:
    """Return a fragment header of IPv6."""
    return struct.pack("!BBHI", next_header, 0, offset << 3 | more, 1)


def arp() -> bytes:
    """Return an Ethernet type and an ARP reply nobody asked for."""
    return b"\x08\x06" + bytes.fromhex("0001080006040002") + bytes(20)


def tagged(rest: bytes, ethertype: int = 0x8100) -> bytes:
    """Return a VLAN tag and what follows it."""
    return struct.pack("!HH", ethertype, 5) + rest


def double_tagged(rest: bytes) -> bytes:
    """Return a service tag, a customer tag, and what follows them."""
    return tagged(tagged(rest), 0x88A8)
