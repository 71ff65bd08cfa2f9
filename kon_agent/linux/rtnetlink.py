"""Rtnetlink questions and orders: messages as plain bytes, and one exchange with the kernel at a time (rtnetlink(7)).

    message    length u32, type u16, flags u16, sequence u32, port u32, body, attributes     native byte order
    attribute  length u16 (its 4-byte head included), type u16, payload, padded to 4 bytes

Nothing is kept: every exchange opens its own socket, in the network namespace the calling thread is in.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

NLM_F_REQUEST = 0x1  # linux/netlink.h
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLMSG_ERROR = 2
NLMSG_DONE = 3

MAX_DATAGRAMS = 1024  # per answer: a table of filters that never ends must not keep the supervisor here
_BUFFER_BYTES = 64 * 1024  # the kernel puts at most 32 KiB into one datagram of a dump
_TIMEOUT_S = 1.0  # the kernel answers at once; the socket buffer lost the answer if it did not
_TYPE_MASK = 0x3FFF  # the upper bits say "nested" and "network byte order"
_MESSAGE = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_INT = struct.Struct("=i")


def message(kind: int, flags: int, body: bytes) -> bytes:
    """Return a message; `body` is its family header and attributes."""
    return _MESSAGE.pack(_MESSAGE.size + len(body), kind, flags | NLM_F_REQUEST, 1, 0) + body


def attribute(kind: int, payload: bytes) -> bytes:
    """Return an attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the type and body of each whole message in a datagram; what is cut short ends it."""
    at = 0
    while at + _MESSAGE.size <= len(datagram):
        length, kind, *_ = _MESSAGE.unpack_from(datagram, at)
        if length < _MESSAGE.size or at + length > len(datagram):
            return
        yield kind, datagram[at + _MESSAGE.size : at + length]
        at += length + -length % 4


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes in `data`, type to payload; of a repeated one the last, and none that is cut short."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            break
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4
    return found


def order(kind: int, flags: int, body: bytes) -> None:
    """Have the kernel change something, and wait until it has.

    Raises:
        OSError: refused, with the kernel's errno; or there is no netlink here.
    """
    _exchange(message(kind, flags | NLM_F_ACK, body))


def ask(kind: int, body: bytes, *, is_dump: bool = False, protocol: int = socket.NETLINK_ROUTE) -> list[bytes]:
    """Return the bodies the kernel answers with: of one object, or of all (`is_dump`); of another netlink `protocol`.

    Raises:
        OSError: refused, with the kernel's errno; or there is no netlink here.
    """
    return _exchange(message(kind, NLM_F_DUMP if is_dump else NLM_F_ACK, body), protocol)


def _exchange(request: bytes, protocol: int = socket.NETLINK_ROUTE) -> list[bytes]:
    bodies: list[bytes] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as sock:
        sock.settimeout(_TIMEOUT_S)
        sock.bind((0, 0))
        sock.send(request)
        for _ in range(MAX_DATAGRAMS):
            for kind, body in messages(sock.recv(_BUFFER_BYTES)):
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    number = -_INT.unpack_from(body)[0] if len(body) >= _INT.size else 0
                    if number > 0:
                        raise OSError(number, os.strerror(number))
                    return bodies
                bodies.append(body)
    raise OSError(f"an answer of more than {MAX_DATAGRAMS} datagrams")
