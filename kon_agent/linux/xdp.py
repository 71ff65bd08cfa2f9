"""Which XDP programs an interface has, as rtnetlink tells everybody (IFLA_XDP, linux/if_link.h)."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from kon_agent.linux import rtnetlink

RTM_GETLINK = 18  # linux/rtnetlink.h
_IFLA_XDP = 43
# IFLA_XDP_DRV_PROG_ID, _SKB_, _HW_: the device's three modes can each have one.
_MODES: Mapping[int, str] = {5: "native", 6: "generic", 7: "hardware"}
_IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_U32 = struct.Struct("=I")


def programs(ifindex: int) -> dict[str, int]:
    """Return an interface's programs: mode ("native", "generic", "hardware") to the kernel's number of the program.

    Raises:
        OSError: refused, with the kernel's errno; ENODEV where the interface is gone.
    """
    answers = rtnetlink.ask(RTM_GETLINK, _IFINFO.pack(0, 0, ifindex, 0, 0))
    return parse_programs(answers[0]) if answers else {}


def parse_programs(body: bytes) -> dict[str, int]:
    """Return the programs of an RTM_NEWLINK message."""
    nested = rtnetlink.attributes(rtnetlink.attributes(body[_IFINFO.size :]).get(_IFLA_XDP, b""))
    return {
        mode: _U32.unpack(nested[kind])[0] for kind, mode in _MODES.items() if len(nested.get(kind, b"")) == _U32.size
    }
