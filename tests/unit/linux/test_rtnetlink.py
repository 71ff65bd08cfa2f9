"""kon_agent.linux.rtnetlink: messages and attributes as bytes, and questions every kernel answers."""

from __future__ import annotations

import errno
import struct
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kon_agent.linux import rtnetlink

RTM_GETLINK = 18
RTM_NEWLINK = 16


def test_an_attribute_is_padded_to_four_bytes() -> None:
    """Its length says nothing of the padding."""
    assert struct.pack("=HH", 7, 1) + b"abc\0" == rtnetlink.attribute(1, b"abc")


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=50)))
def test_attributes_come_back(wanted: dict[int, bytes]) -> None:
    """What is written one after the other is read again."""
    data = b"".join(rtnetlink.attribute(kind, payload) for kind, payload in wanted.items())
    assert wanted == rtnetlink.attributes(data)


def test_flags_in_an_attributes_type_are_left_out() -> None:
    """The kernel marks nested ones."""
    assert {43: b""} == rtnetlink.attributes(rtnetlink.attribute(0x8000 | 43, b""))


@given(st.binary(max_size=200))
def test_any_bytes_are_read(data: bytes) -> None:
    """What is cut short or nonsense ends the reading and raises nothing."""
    rtnetlink.attributes(data)
    list(rtnetlink.messages(data))


def test_impossible_lengths_end_the_reading() -> None:
    """Shorter than their own head, at which it would stay for ever; longer than what is there, which would be cut."""
    assert [] == list(islice(rtnetlink.messages(bytes(64)), 2))
    assert {} == rtnetlink.attributes(bytes(8))
    assert {} == rtnetlink.attributes(struct.pack("=HH", 9, 1) + b"four")
    assert [] == list(rtnetlink.messages(struct.pack("=IHHII", 21, 16, 0, 1, 0) + b"four"))


def test_messages_of_a_datagram() -> None:
    """Each with its type and body; the one that is cut short is left out."""
    first, second = rtnetlink.message(16, 0, b"12345"), rtnetlink.message(17, 0, b"")
    datagram = first + bytes(3) + second
    assert [(16, b"12345"), (17, b"")] == list(rtnetlink.messages(datagram))
    assert [(16, b"12345")] == list(rtnetlink.messages(datagram[:-1]))


def test_loopback_is_answered() -> None:
    """Asked for one interface, the kernel answers with that one."""
    (body,) = rtnetlink.ask(RTM_GETLINK, struct.pack("=BxHiII", 0, 0, 1, 0, 0))
    assert b"lo\0" == rtnetlink.attributes(body[16:])[3]  # IFLA_IFNAME


def test_a_refusal_has_the_kernels_errno() -> None:
    """No interface has the highest number."""
    with pytest.raises(OSError, match="No such device") as refused:
        rtnetlink.ask(RTM_GETLINK, struct.pack("=BxHiII", 0, 0, 0x7FFFFFFF, 0, 0))
    assert errno.ENODEV == refused.value.errno
