"""What XDP each network device's driver can do, as the kernel's generic netlink family `netdev` tells everybody.

Documentation/netlink/specs/netdev.yaml, from Linux 6.3 on. Nothing is attached to find out.
"""

from __future__ import annotations

import errno
import struct

from kon_agent.linux import rtnetlink

XDP_BASIC = 1  # enum netdev_xdp_act: the driver runs XDP programs
XDP_RX_SG = 32  # also on frames of several buffers, where the program takes those

_NETLINK_GENERIC = 16  # linux/netlink.h; `socket` does not name it
_GENL_ID_CTRL, _CTRL_CMD_GETFAMILY = 16, 3  # linux/genetlink.h
_CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 1, 2
_DEV_GET, _DEV_IFINDEX, _DEV_XDP_FEATURES = 1, 1, 3  # linux/netdev.h: NETDEV_CMD_DEV_GET, NETDEV_A_DEV_…
_HEAD = struct.Struct("=BBH")  # struct genlmsghdr: command, version, reserved
_U16, _U32, _U64 = struct.Struct("=H"), struct.Struct("=I"), struct.Struct("=Q")


def read_xdp_features() -> dict[int, int]:
    """Return what each device's driver can do, bits of `enum netdev_xdp_act`, by ifindex.

    Raises:
        OSError: the kernel does not tell: ENOENT before Linux 6.3, EPROTO where its answer is none.
    """
    name = rtnetlink.attribute(_CTRL_ATTR_FAMILY_NAME, b"netdev\0")
    answers = rtnetlink.ask(_GENL_ID_CTRL, _HEAD.pack(_CTRL_CMD_GETFAMILY, 1, 0) + name, protocol=_NETLINK_GENERIC)
    family = rtnetlink.attributes(b"".join(answers[:1])[_HEAD.size :]).get(_CTRL_ATTR_FAMILY_ID, b"")
    if len(family) != _U16.size:
        raise OSError(errno.EPROTO, "generic netlink does not say the number of its family netdev")
    devices = rtnetlink.ask(_U16.unpack(family)[0], _HEAD.pack(_DEV_GET, 1, 0), is_dump=True, protocol=_NETLINK_GENERIC)
    return dict(filter(None, map(parse_device, devices)))


def parse_device(body: bytes) -> tuple[int, int] | None:
    """Return ifindex and features in the answer about one device; None where it does not hold both."""
    found = rtnetlink.attributes(body[_HEAD.size :])
    ifindex, features = found.get(_DEV_IFINDEX, b""), found.get(_DEV_XDP_FEATURES, b"")
    if len(ifindex) != _U32.size or len(features) != _U64.size:
        return None
    return _U32.unpack(ifindex)[0], _U64.unpack(features)[0]
