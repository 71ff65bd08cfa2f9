"""What the kernel tells of drivers' XDP."""

from __future__ import annotations

import errno
import struct

import pytest

from kon_agent.linux import rtnetlink, xdpfeatures
from kon_agent.linux.xdpfeatures import parse_device, read_xdp_features

HEAD = struct.pack("=BBH", 1, 1, 0)


def test_a_device_is_parsed() -> None:
    """Its number and its features; attributes unknown here are passed over."""
    body = HEAD + rtnetlink.attribute(1, struct.pack("=I", 4)) + rtnetlink.attribute(9, b"new")
    assert (4, 43) == parse_device(body + rtnetlink.attribute(3, struct.pack("=Q", 43)))


@pytest.mark.parametrize("tail", [b"", rtnetlink.attribute(1, b"\4"), rtnetlink.attribute(3, bytes(8)), b"\xff"])
def test_what_is_no_device_is_none(tail: bytes) -> None:
    """Half of it is nothing."""
    assert None is parse_device(HEAD + tail)


def test_this_kernel_tells_of_the_loopback() -> None:
    """It has no native XDP of its own; a kernel that does not tell says ENOENT."""
    try:
        features = read_xdp_features()
    except OSError as err:
        assert errno.ENOENT == err.errno
        pytest.skip("needs Linux 6.3: generic netlink has no family `netdev`")
    assert 0 == features[1] & xdpfeatures.XDP_BASIC


@pytest.mark.parametrize("answers", [[], [HEAD], [HEAD + rtnetlink.attribute(1, b"\1")]])
def test_an_answer_that_is_none_is_an_error_of_the_system(
    answers: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks is ready for those alone."""
    monkeypatch.setattr(rtnetlink, "ask", lambda *_, **__: answers)
    with pytest.raises(OSError, match="generic netlink"):
        read_xdp_features()
